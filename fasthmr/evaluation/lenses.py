"""Focal lengths that CameraHMR is told in place of those that clips were stored with."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from fasthmr.data.convert.reading import read_npz
from fasthmr.data.schema import Clip
from fasthmr.evaluation.config import DIAGONAL
from fasthmr.pipeline import default_intrinsics


class Lenses:
    """Focal lengths of whole clips; the principal point, of which CameraHMR is told nothing, is the image's centre.

    Args:
        source: `diagonal`, for that of each image; or an .npz file that has for each clip, by its key, a number, px of
            the full image.

    Raises:
        ValueError: it is no .npz file of plain arrays.
        OSError: it cannot be read.

    Attributes:
        sha256: of the file, or None.
    """

    def __init__(self, source: str) -> None:
        self._path = None if source == DIAGONAL else Path(source)
        self.sha256 = None if self._path is None else hashlib.sha256(self._path.read_bytes()).hexdigest()
        self._read([])

    def place(self, clip: Clip) -> Clip:
        """The clip with this focal length.

        Raises:
            ValueError: there is none of this clip, or it is not one positive number.
        """
        intrinsics = default_intrinsics(clip.image_size).numpy()
        if self._path is not None:
            found = self._read([clip.key])
            if clip.key not in found:
                raise ValueError(f"intrinsics {self._path} has no focal length of clip {clip.key}")
            focal_px = found[clip.key]
            if focal_px.shape != () or not 0 < focal_px < np.inf:
                got = f"{focal_px.tolist()!r:.80}"
                raise ValueError(f"intrinsics {self._path}: {clip.key} must be one positive number, px, got {got}")
            intrinsics[[0, 1], [0, 1]] = focal_px
        return replace(clip, intrinsics=intrinsics, status={**clip.status, "intrinsics": "pseudo"})

    def _read(self, keys: list[str]) -> dict[str, np.ndarray]:
        """The numbers of these clips, of those that there are."""
        if self._path is None:
            return {}
        try:
            return {key: np.asarray(value, np.float64) for key, value in read_npz(self._path, [], keys).items()}
        except (ValueError, TypeError) as error:
            raise ValueError(f"intrinsics {self._path} is no .npz file of focal lengths: {error}") from error
