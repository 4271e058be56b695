"""Human3.6M (Ionescu et al. 2014), with HybrIK's or NeuralAnnot's labels.

    images/s_01_act_02_subact_01_ca_01/s_01_act_02_subact_01_ca_01_000001.jpg
    annotations/*train*.json, *test*.json               HybrIK's, COCO's layout; or, if there are none:
    annotations/Human36M_subject1_data.json             COCO's layout: images with subject, action_idx, subaction_idx,
                                                        cam_idx, frame_idx; annotations with bbox
    annotations/Human36M_subject1_camera.json           camera -> R (3,3), t (3,) mm, f (2,), c (2,)
    annotations/Human36M_subject1_SMPL_NeuralAnnot.json action -> sub-action -> frame -> pose, shape, trans

HybrIK's annotations hold, in millimetres and the camera frame: `bbox` x y w h, `cam_param` {f, c}, `smpl_joints`
(24|29,3), `betas` (10), `thetas` (24,3), `root_coord` (3). NeuralAnnot's fits are in the world,
metres. Both are fits:
all is pseudo but the camera. Picture numbers count at 25 fps (the pictures are every second of the films').
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.coco import Image, boxes, images_of, runs, sequences
from fasthmr.data.convert.neural_annot import FITS, fitted_track, pinhole
from fasthmr.data.convert.reading import ConvertError, Picture, inside, numbers, read_json
from fasthmr.data.convert.source import Need
from fasthmr.data.convert.track import Track, TrackList, Tracks, clean_key

_SITE = "http://vision.imar.ro/human3.6m"
_HYBRIK = "https://github.com/Jeff-sjtu/HybrIK"
_NEURAL_ANNOT = "https://github.com/mks0601/NeuralAnnot_RELEASE"
_FPS = 25.0
_SUBJECTS = {"train": (1, 5, 6, 7, 8), "test": (9, 11)}


@dataclass(frozen=True)
class Human36M:
    """Human3.6M under `root`."""

    title: ClassVar[str] = "Human3.6M"
    licence: ClassVar[str] = f"Human3.6M is for non-commercial research: register at {_SITE}"
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    longest: ClassVar[int] = 128

    root: Path
    split: str

    def needs(self) -> Sequence[Need]:
        hybrik = Need(f"annotations/*{self.split}*.json", "labels of HybrIK", _HYBRIK)
        fits = Need(
            f"annotations/Human36M_subject{_SUBJECTS[self.split][0]}_SMPL_NeuralAnnot.json",
            f"labels of NeuralAnnot, with _data.json and _camera.json; or annotations/*{self.split}*.json of HybrIK",
            f"{_NEURAL_ANNOT} or {_HYBRIK}",
        )
        return (hybrik if self._hybrik() else fits, Need("images/*", "pictures", _SITE))

    def units(self) -> list[str]:
        found = self._hybrik() or [
            path
            for subject in _SUBJECTS[self.split]
            for path in self.root.glob(f"annotations/Human36M_subject{subject}_SMPL_NeuralAnnot.json")
        ]
        return [path.relative_to(self.root).as_posix() for path in found]

    def open(self, unit: str) -> Tracks:
        path = inside(self.root, unit)
        read, without = _fitted if unit.endswith("_SMPL_NeuralAnnot.json") else _annotated, list[str]()
        return TrackList(read(path, unit, without), without)

    def _hybrik(self) -> list[Path]:
        return sorted(self.root.glob(f"annotations/*{self.split}*.json"))


def _annotated(path: Path, unit: str, unlabelled: list[str]) -> Iterator[Track]:
    """HybrIK's labels; the names of pictures without are added to `unlabelled`."""
    for folder, images in sequences(images_of(read_json(path), unit, unlabelled)):
        for run, step in runs(images):
            frames = len(run)
            where = f"{unit}: {folder}"
            labels = [image.label for image in run]
            camera = [label.get("cam_param") or {} for label in labels]
            focal = np.stack([numbers(c, "f", (2,), where) for c in camera])
            middle = np.stack([numbers(c, "c", (2,), where) for c in camera])
            joints = np.stack([_joints29(label, where) for label in labels])
            center, size = boxes(labels, where)
            yield Track(
                key=clean_key(f"h36m-{folder}_{run[0].number:06d}"),
                source=f"h36m:{folder}",
                fps=_FPS / step,
                pictures=[Picture(f"images/{image.name}") for image in run],
                valid=np.ones(frames, bool),
                intrinsics=pinhole(focal, middle),
                pose=np.stack([_angles(label, where) for label in labels]),
                betas=np.stack([numbers(label, "betas", (NUM_BETAS,), where) for label in labels]),
                pelvis=joints[:, 0, :3],
                joints3d=joints if (joints[:, NUM_JOINTS:, 3] > 0).all() else None,
                center=center,
                size=size,
                status=FITS,
            )


def _fitted(path: Path, unit: str, unlabelled: list[str]) -> Iterator[Track]:
    """NeuralAnnot's labels; the names of pictures without are added to `unlabelled`."""
    fits = read_json(path)
    beside = unit.removesuffix("_SMPL_NeuralAnnot.json")
    stem = path.name.removesuffix("_SMPL_NeuralAnnot.json")
    data, cameras = (read_json(path.with_name(f"{stem}_{kind}.json")) for kind in ("data", "camera"))
    for folder, images in sequences(images_of(data, f"{beside}_data.json", unlabelled)):

        def fit(image: Image) -> Mapping[str, Any] | None:
            found: Any = fits
            for name in ("action_idx", "subaction_idx", "frame_idx"):
                found = found.get(str(image.about.get(name))) if isinstance(found, dict) else None
            return found

        unlabelled += [image.name for image in images if fit(image) is None]
        for run, step in runs([image for image in images if fit(image) is not None]):
            number = str(run[0].about.get("cam_idx"))
            if number not in cameras:
                raise ConvertError(f"{beside}_camera.json has no camera {number!r}; it has {', '.join(cameras)}")
            where = f"{unit}: {folder}"
            yield fitted_track(
                clean_key(f"h36m-{folder}_{run[0].number:06d}"),
                f"h36m:{folder}",
                _FPS / step,
                [Picture(f"images/{image.name}") for image in run],
                [fit(image) or {} for image in run],
                cameras[number],
                boxes([image.label for image in run], where),
                where,
            )


def _joints29(label: Mapping[str, Any], where: str) -> np.ndarray:
    """(29,4) metres, camera frame, and confidence; of files with 24 joints, or none but the root, the rest are 0."""
    joints = np.zeros((29, 4))
    if "smpl_joints" in label:
        given = numbers(label, "smpl_joints", (None, 3), where)
        if len(given) not in (NUM_JOINTS, 29):
            raise ConvertError(f"{where}: smpl_joints must be of 24 or 29 joints, got {len(given)}")
    else:
        given = numbers(label, "root_coord", (3,), where)[None]
    joints[: len(given), :3] = given / 1000
    joints[: len(given), 3] = 1
    return joints


def _angles(label: Mapping[str, Any], where: str) -> np.ndarray:
    """(24,3), which some versions of the file write as 72 numbers."""
    flat = np.asarray(label["thetas"], np.float64).reshape(-1) if "thetas" in label else None
    return numbers({**label, "thetas": flat} if flat is not None else label, "thetas", (72,), where).reshape(24, 3)
