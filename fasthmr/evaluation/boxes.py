"""A detector's boxes in place of those that clips were stored with: read, made square, kept inside the stored crops."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasthmr.data.convert.reading import read_npz
from fasthmr.data.crops import CROP_SCALE
from fasthmr.data.headers import image_shape
from fasthmr.data.schema import Clip
from fasthmr.geometry.boxes import apply_affine, invert_affine, square_box

#: boxes that differ by less are the same
_SAME_PX = 0.01


class Placed(NamedTuple):
    """A clip of T frames with detected boxes.

    Attributes:
        clip: with `box_center` and `box_size` replaced.
        missing: (T,) bool, frames without a detection; their box is between those of the frames around.
        fitted: (T,) bool, frames whose box was moved or shrunk.
    """

    clip: Clip
    missing: np.ndarray
    fitted: np.ndarray


class Detections:
    """Boxes from an .npz file: for each clip, by its key, an array (T, 4) of x0, y0, x1, y1, px of the full image; NaN
    in frames in which the person was not found.

    Args:
        path: the file.

    Raises:
        ValueError: it is no .npz file of plain arrays.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read([])
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()

    def place(self, clip: Clip) -> Placed:
        """The clip as the network sees it with these boxes.

        A square around each box is what a stored box is: the network's crop is 1.2 times as wide. Pictures are stored
        in crops of 1.5 times their own box, beyond which nothing is known, so a box whose crop leaves the stored one is
        shrunk to its width and moved into it.

        Raises:
            ValueError: no boxes of this clip, of another number of frames, or one that is nowhere near the person.
        """
        corners = self._of(clip)
        found = np.isfinite(corners).all(1)
        frames = np.arange(len(clip))
        corners = np.stack([np.interp(frames, frames[found], column[found]) for column in corners.T], 1)
        center, size = square_box(corners.reshape(-1, 2, 2))
        crop_px = image_shape(clip.frames[0])[0]
        stored = apply_affine(invert_affine(clip.crop_from_image.astype(np.float64)), [[0, 0], [crop_px, crop_px]])
        low, high = stored[:, 0], stored[:, 1]
        apart = ((corners[:, 2:] <= low) | (corners[:, :2] >= high)).any(1) & found & clip.valid
        if apart.any():
            frame = int(apart.argmax())
            raise ValueError(
                f"boxes {self.path}: that of clip {clip.key}, frame {frame}, {corners[frame].round(1).tolist()}, does "
                f"not touch the stored crop {stored[frame].round(1).ravel().tolist()}: it is another person's. Write "
                "NaN for a person who was not found"
            )
        side = np.minimum(CROP_SCALE * size, (high - low).min(1))
        inside = np.clip(center, low + side[:, None] / 2, high - side[:, None] / 2)
        fitted = (np.abs(inside - center).max(1) > _SAME_PX) | (CROP_SCALE * size - side > _SAME_PX)
        placed = replace(clip, box_center=inside.astype(np.float32), box_size=(side / CROP_SCALE).astype(np.float32))
        return Placed(placed, ~found, fitted)

    def _read(self, keys: list[str]) -> dict[str, np.ndarray]:
        """The arrays of these clips, of those that there are; the others are not unpacked."""
        if not self.path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        try:
            return {key: np.asarray(array, np.float64) for key, array in read_npz(self.path, [], keys).items()}
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"boxes {self.path} is no .npz file of boxes (T, 4), an array for each clip: {error}"
            ) from error

    def _of(self, clip: Clip) -> np.ndarray:
        """(T, 4) as they are in the file, checked."""
        where = f"boxes {self.path}"
        found_of = self._read([clip.key])
        if clip.key not in found_of:
            raise ValueError(f"{where} has none of clip {clip.key}: an array (T, 4) of that name is wanted")
        corners = found_of[clip.key]
        if corners.shape != (len(clip), 4):
            raise ValueError(f"{where}: {clip.key} must have shape ({len(clip)}, 4), got {corners.shape}")
        found = np.isfinite(corners).all(1)
        if not found.any():
            raise ValueError(f"{where}: nobody was found in clip {clip.key}, all of its boxes are NaN")
        empty = found & ~(corners[:, 2:] > corners[:, :2]).all(1)
        if empty.any():
            frame = int(empty.argmax())
            raise ValueError(
                f"{where}: that of clip {clip.key}, frame {frame}, must have x0 < x1 and y0 < y1, got "
                f"{corners[frame].tolist()}"
            )
        return corners
