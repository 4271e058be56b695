"""What a motion is and where motions come from: the seam between moving people and rendering them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fasthmr.conventions import NUM_JOINTS


class MotionError(ValueError):
    """A motion, or a file of motions, is not what it should be."""


@dataclass(frozen=True)
class Motion:
    """T frames of one person in the world: y up, ground at y = 0, standing roughly at the origin.

    Attributes:
        pose: (T, 24, 3) float32 axis-angle in radians, SMPL's order; joint 0 turns the body in the world.
        translation: (T, 3) float32 metres, SMPL's `transl` (pelvis = rest pelvis + translation) for the free body of
            mean shape; another shape has to be set on the ground anew.
        fps: frames a second.
        name: what is seen, e.g. "walk+wave", or the clip's name and first frame.

    Raises:
        MotionError: wrong shape or dtype, or a number that is not finite.
    """

    pose: NDArray[np.float32]
    translation: NDArray[np.float32]
    fps: float
    name: str

    def __post_init__(self) -> None:
        frames = len(self.translation)
        for field, value, shape in (
            ("pose", self.pose, (frames, NUM_JOINTS, 3)),
            ("translation", self.translation, (frames, 3)),
        ):
            if value.shape != shape or value.dtype != np.float32:
                got = f"{value.dtype} {value.shape}"
                raise MotionError(f"motion {self.name!r}: {field} must be float32 {shape}, got {got}")
            if not np.isfinite(value).all():
                bad = int(np.argmin(np.isfinite(value).reshape(frames, -1).all(1)))
                raise MotionError(f"motion {self.name!r}: {field} is not finite in frame {bad}")
        if not self.fps > 0:
            raise MotionError(f"motion {self.name!r}: fps must be positive, got {self.fps}")

    def __len__(self) -> int:
        return len(self.translation)


class MotionSource(Protocol):
    """Makes motions from random numbers. `sample` is a pure function of `rng`'s state."""

    @property
    def name(self) -> str:
        """Short name for a clip's `source`, e.g. "procedural"."""
        ...

    def sample(self, rng: np.random.Generator, frames: int, fps: float) -> Motion:
        """A motion of exactly `frames` frames at `fps`, with a heading uniform over the circle."""
        ...

    def fingerprint(self) -> str:
        """Short hash of everything the motions depend on; equal hashes mean equal samples for equal `rng`."""
        ...

    def describe(self) -> dict[str, object]:
        """What the source holds, as JSON values."""
        ...


def load_motion_source(motion: str) -> MotionSource:
    """The source that a `--motion` setting names.

    Args:
        motion: "procedural" for the built-in library, otherwise the path of an AMASS-format folder or a pack npz.

    Raises:
        MotionError: nothing lies at that path, or what lies there is not a motion set.
    """
    # Both sources return the Motion of this module, so they can only be imported once it is complete.
    from fasthmr.data.synth.amass import MotionFolder
    from fasthmr.data.synth.procedural import ProceduralMotion

    if motion == "procedural":
        return ProceduralMotion()
    return MotionFolder(Path(motion))
