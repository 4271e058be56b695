"""3DPW: people outdoors, filmed by hand (von Marcard et al. 2018).

    sequenceFiles/{train,validation,test}/SEQ.pkl      Python 2's pickle
    imageFiles/SEQ/image_00000.jpg                     30 fps

Of a pickle are read, per person: `poses` (N,72) and `trans` (N,3) in the world at 30 Hz, `betas` (>=10), `genders`
"m" or "f", `campose_valid` (N); and for all: `cam_poses` (N,4,4) world to camera, `cam_intrinsics` (3,3). Row i belongs
to picture i. (The keys that end in 60Hz, and `img_frame_ids`, which counts in them, are not needed.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.reading import ConvertError, Picture, inside, numbers, read_pickle
from fasthmr.data.convert.source import Need
from fasthmr.data.convert.track import Track, TrackList, Tracks, clean_key, gender_of
from fasthmr.data.schema import Gender

_SITE = "https://virtualhumans.mpi-inf.mpg.de/3DPW"
_GENDERS: dict[str, Gender] = {"m": "male", "f": "female"}


@dataclass(frozen=True)
class ThreeDPW:
    """3DPW under `root`."""

    title: ClassVar[str] = "3DPW"
    licence: ClassVar[str] = f"3DPW is for non-commercial research: accept its licence at {_SITE}"
    splits: ClassVar[tuple[str, ...]] = ("test", "validation", "train")
    longest: ClassVar[int] = 0

    root: Path
    split: str

    def needs(self) -> Sequence[Need]:
        return (
            Need(f"sequenceFiles/{self.split}/*.pkl", "labels", f"sequenceFiles.zip of {_SITE}"),
            Need("imageFiles/*/*.jpg", "pictures", f"imageFiles.zip of {_SITE}"),
        )

    def units(self) -> list[str]:
        found = sorted((self.root / "sequenceFiles" / self.split).glob("*.pkl"))
        return [p.relative_to(self.root).as_posix() for p in found]

    def open(self, unit: str) -> Tracks:
        return TrackList(_tracks(self.root, unit))


def _tracks(root: Path, unit: str) -> Iterator[Track]:
    labels = read_pickle(inside(root, unit))
    sequence = Path(unit).stem
    camera = numbers(labels, "cam_poses", (None, 4, 4), unit)
    frames = len(camera)
    intrinsics = numbers(labels, "cam_intrinsics", (3, 3), unit)
    for name in ("genders", "poses", "trans", "betas", "campose_valid"):
        if not isinstance(labels.get(name), list | tuple) or len(labels[name]) != len(labels["poses"]):
            raise ConvertError(f"{unit}: {name} must be a list with an entry a person; the file has {sorted(labels)}")
    for person in range(len(labels["poses"])):
        where = f"{unit}, person {person}"
        of_one = {name: labels[name][person] for name in ("poses", "trans", "betas", "campose_valid")}
        betas = numbers(of_one, "betas", (None,), where)
        if len(betas) < NUM_BETAS:
            raise ConvertError(f"{where}: betas must hold at least {NUM_BETAS} numbers, got {len(betas)}")
        yield Track(
            key=clean_key(f"3dpw-{sequence}_{person}"),
            source=f"3dpw/{unit.split('/')[1]}:{sequence}",
            fps=30.0,
            pictures=[Picture(f"imageFiles/{sequence}/image_{i:05d}.jpg") for i in range(frames)],
            valid=numbers(of_one, "campose_valid", (frames,), where) > 0,
            gender=gender_of(labels["genders"][person], _GENDERS, where),
            intrinsics=np.broadcast_to(intrinsics, (frames, 3, 3)),
            pose=numbers(of_one, "poses", (frames, 3 * NUM_JOINTS), where).reshape(frames, NUM_JOINTS, 3),
            betas=np.broadcast_to(betas[:NUM_BETAS], (frames, NUM_BETAS)),
            translation=numbers(of_one, "trans", (frames, 3), where),
            cam_from_world=camera,
            # a shape that takes more numbers than ours is not quite this one
            status=dict.fromkeys(("betas", "translation", "joints3d"), "pseudo") if betas[NUM_BETAS:].any() else {},
        )
