"""A whole picture in a square: what the field of view is read from."""

from __future__ import annotations

import cv2
import numpy as np

_PADDING = 255


def letterboxed(picture: np.ndarray, side_px: int = 256) -> np.ndarray:
    """Shrink a picture to a square of its longer side, centred, white where there is none of it.

    As CameraHMR's (`CameraHMR/mesh_estimator.py`): sides are cut to whole pixels, interpolation is by area.

    Args:
        picture: (H, W, 3) uint8.
        side_px: of the square.

    Returns:
        (side_px, side_px, 3) uint8.

    Raises:
        ValueError: it is no such picture.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or 0 in picture.shape:
        raise ValueError(f"a picture must be (H, W, 3) uint8, got {picture.shape} of {picture.dtype}")
    height, width = picture.shape[:2]
    aspect = width / height
    size = (side_px, int(side_px / aspect)) if aspect > 1 else (int(side_px * aspect), side_px)
    size = (max(1, size[0]), max(1, size[1]))
    left, top = (side_px - size[0]) // 2, (side_px - size[1]) // 2
    square = np.full((side_px, side_px, 3), _PADDING, np.uint8)
    square[top : top + size[1], left : left + size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return square
