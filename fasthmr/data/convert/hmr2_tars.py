"""The tars of labelled pictures that 4D-Humans trains on (Goel et al. 2023): clips of one frame.

    DATASET/000000.tar              any folders; uncompressed
        KEY.jpg | .jpeg | .png      a picture
        KEY.data.pyd                a pickle: a list of dictionaries, one a person
        KEY.detection.npz           optional: masks

Of a dictionary are read: `keypoints_2d` (44,3) px and confidence, `keypoints_3d` (44,4) metres and confidence, `center`
(2,) and `scale` (2,) = side / 200, `body_pose` (72,) with the root, `betas` (10,), `has_body_pose`, `has_betas`. There
is no camera, and therefore no place in space: pose, shape and joints have labels, translation and intrinsics none. The
3D keypoints are relative to an origin of their own. What is kept of the 44: `keypoints.FROM_44`.

`detection.npz` is taken to hold `masks` (N,H,W), of the people in the picture in any order, as bool or 0 and 1. The
tracked person is whose mask lies on most of the labelled keypoints.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from fasthmr.conventions import MASK_OTHER, MASK_SUBJECT, NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.keypoints import FROM_44, joints29
from fasthmr.data.convert.masks import share_on
from fasthmr.data.convert.reading import (
    ConvertError,
    Picture,
    inside,
    numbers,
    pickled_list,
    read_npz,
    read_part,
    tar_members,
)
from fasthmr.data.convert.source import Need
from fasthmr.data.convert.track import Track, Tracks, clean_key
from fasthmr.data.crops import CROP_SCALE
from fasthmr.data.schema import Status
from fasthmr.geometry.boxes import hmr2_box_size

_SITE = "https://github.com/shubham-goel/4D-Humans (fetch_training_data.sh)"
_PICTURES = ("jpg", "jpeg", "png")
_LABELS, _MASKS = "data.pyd", "detection.npz"
_KEYPOINTS = 44


@dataclass(frozen=True)
class Hmr2Tars:
    """4D-Humans' training tars under `root`."""

    title: ClassVar[str] = "4D-Humans' training tars"
    licence: ClassVar[str] = "The pictures have the licences of their data sets: Human3.6M, COCO, MPII, AVA and others"
    splits: ClassVar[tuple[str, ...]] = ("all",)
    longest: ClassVar[int] = 1

    root: Path
    split: str

    def needs(self) -> Sequence[Need]:
        return (Need("**/*.tar", "pictures and labels", _SITE),)

    def units(self) -> list[str]:
        return [p.relative_to(self.root).as_posix() for p in sorted(self.root.glob("**/*.tar"))]

    def open(self, unit: str) -> Tracks:
        return _Tar(self.root, unit)


@dataclass(frozen=True)
class _Sample:
    """A person in a picture."""

    name: str
    picture: Picture
    labels: Mapping[str, Any]
    masks: tuple[int, int] | None  # offset and size


class _Tar:
    """The people in a tar; pictures and masks are only located. Labels that cannot be read take the place of one."""

    def __init__(self, root: Path, unit: str) -> None:
        self._unit, self._path = unit, inside(root, unit)
        members: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in tar_members(self._path):
            stem, _, extension = PurePosixPath(name).name.partition(".")
            key = str(PurePosixPath(name).parent / stem)
            members.setdefault(key, {})[extension] = (offset, size)
        self._samples: list[_Sample | ConvertError] = []
        self.unlabelled: list[str] = []
        for key, files in members.items():
            try:
                people = self._people(key, files)
            except ConvertError as error:
                people = [error]
            self._samples += people
            self.unlabelled += [] if people else [f"{unit}: {key}"]

    def _people(self, key: str, files: Mapping[str, tuple[int, int]]) -> list[_Sample | ConvertError]:
        where = f"{self._path}: {key}"
        found = [files[extension] for extension in _PICTURES if extension in files]
        if not found or _LABELS not in files:
            raise ConvertError(f"{where} has only {', '.join(sorted(files))}; it takes a picture and .{_LABELS}")
        people = pickled_list(read_part(self._path, *files[_LABELS]), f"{where}.{_LABELS}")
        picture = Picture(self._unit, *found[0])
        return [_Sample(f"{key}_{i}", picture, labels, files.get(_MASKS)) for i, labels in enumerate(people)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Track:
        sample = self._samples[number]
        if isinstance(sample, ConvertError):
            raise sample
        labels, where = sample.labels, f"{self._unit}: {sample.name}"
        points = numbers(labels, "keypoints_2d", (_KEYPOINTS, 3), where)
        points3d = numbers(labels, "keypoints_3d", (_KEYPOINTS, 4), where)
        scale = numbers(labels, "scale", (2,), where)
        status: dict[str, Status] = dict.fromkeys(("joints2d", "joints3d", "pose", "betas"), "pseudo")
        return Track(
            key=clean_key(f"hmr2-{PurePosixPath(self._unit).with_suffix('')}_{sample.name}"),
            source=f"4dhumans:{self._unit}/{sample.name}",
            fps=1.0,
            pictures=[sample.picture],
            valid=np.ones(1, bool),
            pose=_flagged(labels, "body_pose", 3 * NUM_JOINTS, where, (1, NUM_JOINTS, 3)),
            betas=_flagged(labels, "betas", NUM_BETAS, where, (1, NUM_BETAS)),
            joints2d=joints29(points[None], FROM_44),
            joints3d=joints29(points3d[None], FROM_44) if (points3d[:, 3] > 0).any() else None,
            center=numbers(labels, "center", (2,), where)[None],
            # HMR2.0 cuts this box as it is, widened to 192:256: ours crops at CROP_SCALE times the tight box
            size=np.asarray(hmr2_box_size(200 * scale))[None] / CROP_SCALE,
            mask=self._masks(sample, points) if sample.masks else None,
            status=status,
        )

    def _masks(self, sample: _Sample, points: np.ndarray) -> Any:
        def mask(_: int) -> np.ndarray:
            assert sample.masks is not None
            content = io.BytesIO(read_part(self._path, *sample.masks))
            shown = read_npz(content, ("masks",))["masks"] > 0
            if shown.ndim != 3 or not len(shown):
                raise ConvertError(f"{self._unit}: {sample.name}: masks must be (N,H,W), got {shown.shape}")
            on_points = [share_on(one, points[points[:, 2] > 0, :2]) for one in shown]
            label = np.where(shown.any(0), MASK_OTHER, 0).astype(np.uint8)
            if max(on_points) > 0:
                label[shown[int(np.argmax(on_points))]] = MASK_SUBJECT
            return label

        return mask


def _flagged(labels: Mapping[str, Any], name: str, width: int, where: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A label with a flag `has_NAME` beside it; None where it is off."""
    flag = f"has_{name}"
    if flag not in labels or not numbers(labels, flag, None, where).all():
        return None
    return numbers(labels, name, (width,), where).reshape(shape)
