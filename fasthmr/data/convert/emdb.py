"""EMDB: people with electromagnetic sensors, in the wild (Kaufmann et al. 2023).

    P0/09_outdoor_walk/P0_09_outdoor_walk_data.pkl
    P0/09_outdoor_walk/images/00000.jpg                 30 fps

Of a pickle are read: `gender`, `emdb1` and `emdb2`, `good_frames_mask` (n), `camera`: `intrinsics` (3,3), `extrinsics`
(n,4,4) world to camera; `smpl`: `poses_root` (n,3), `poses_body` (n,69), `trans` (n,3), `betas` (10); and `bboxes`:
`bboxes` (n,4) x0 y0 x1 y1, `invalid_idxs`. A frame without a valid box gets its mesh's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.reading import ConvertError, Picture, inside, numbers, read_pickle
from fasthmr.data.convert.source import Need
from fasthmr.data.convert.track import GENDERS, Track, TrackList, Tracks, clean_key, gender_of, square_of_corners

_SITE = "https://eth-ait.github.io/emdb"


@dataclass(frozen=True)
class Emdb:
    """EMDB under `root`; the splits are EMDB-1 (17 sequences, poses in the camera), EMDB-2 (paths) and all."""

    title: ClassVar[str] = "EMDB"
    licence: ClassVar[str] = f"EMDB is for non-commercial research: apply for it at {_SITE}"
    splits: ClassVar[tuple[str, ...]] = ("emdb1", "emdb2", "all")
    longest: ClassVar[int] = 0

    root: Path
    split: str

    def needs(self) -> Sequence[Need]:
        return (
            Need("P*/*/*_data.pkl", "labels", _SITE),
            Need("P*/*/images/*.jpg", "pictures", _SITE),
        )

    def units(self) -> list[str]:
        return [p.relative_to(self.root).as_posix() for p in sorted(self.root.glob("P*/*/*_data.pkl"))]

    def open(self, unit: str) -> Tracks:
        labels = read_pickle(inside(self.root, unit))
        if self.split != "all":
            if self.split not in labels:
                raise ConvertError(f"{unit} has no {self.split!r}; it has {', '.join(sorted(map(str, labels)))}")
            if not bool(labels[self.split]):
                return TrackList([])
        return TrackList([_track(labels, unit)])


def _track(labels: Mapping[str, Any], unit: str) -> Track:
    camera, smpl = (_section(labels, name, unit) for name in ("camera", "smpl"))
    extrinsics = numbers(camera, "extrinsics", (None, 4, 4), unit)
    frames = len(extrinsics)
    pose = [numbers(smpl, name, (frames, width), unit) for name, width in (("poses_root", 3), ("poses_body", 69))]
    folder = Path(unit).parent
    center, size = _boxes(labels, frames, unit)
    return Track(
        key=clean_key(f"emdb-{folder.parent.name}_{folder.name}"),
        source=f"emdb:{folder.parent.name}/{folder.name}",
        fps=30.0,
        pictures=[Picture((folder / "images" / f"{i:05d}.jpg").as_posix()) for i in range(frames)],
        valid=numbers(labels, "good_frames_mask", (frames,), unit) > 0,
        gender=gender_of(labels.get("gender"), GENDERS, unit),
        intrinsics=np.broadcast_to(numbers(camera, "intrinsics", (3, 3), unit), (frames, 3, 3)),
        pose=np.concatenate(pose, axis=1).reshape(frames, NUM_JOINTS, 3),
        betas=np.broadcast_to(numbers(smpl, "betas", (NUM_BETAS,), unit), (frames, NUM_BETAS)),
        translation=numbers(smpl, "trans", (frames, 3), unit),
        cam_from_world=extrinsics,
        center=center,
        size=size,
    )


def _boxes(labels: Mapping[str, Any], frames: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Centre (n,2) and side (n,), 0 where there is no valid box."""
    boxes = _section(labels, "bboxes", unit)
    center, size = square_of_corners(numbers(boxes, "bboxes", (frames, 4), unit))
    invalid = numbers(boxes, "invalid_idxs", (None,), unit).astype(int)
    if len(invalid) and not (invalid.min() >= 0 and invalid.max() < frames):
        raise ConvertError(f"{unit}: invalid_idxs must lie in [0, {frames}), got {invalid.min()} to {invalid.max()}")
    size[invalid] = 0
    return center, size


def _section(labels: Mapping[str, Any], name: str, unit: str) -> Mapping[str, Any]:
    section = labels.get(name)
    if not isinstance(section, dict):
        raise ConvertError(f"{unit} has no dictionary {name!r}; it has {', '.join(sorted(map(str, labels)))}")
    return section
