"""Person boxes and the affine maps between the full image and square crops of it.

Convention: pixels (x right, y down) with the centres of pixels at integers, as in OpenCV. `crop_from_image` is a 2x3
matrix: crop_px = A[:, :2] @ image_px + A[:, 2]. All is NumPy in float64 and batched over leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: width and height of the part of the crop that HMR2.0's backbone sees.
HMR2_ASPECT = (192, 256)


def square_box(points: ArrayLike, padding: float = 1.0) -> tuple[Array, Array]:
    """Centre and side of the smallest upright square around points.

    Args:
        points: (..., N, 2) px, finite; N of one frame, with any leading dimensions such as time.
        padding: factor on the side, e.g. 1.2.

    Returns:
        centre (..., 2) and side (...), px. The centre is that of the tight rectangle.
    """
    xy = np.asarray(points, np.float64)
    if xy.ndim < 2 or xy.shape[-1] != 2 or xy.shape[-2] == 0:
        raise ValueError(f"points must have shape (..., N, 2) with N > 0, got {xy.shape}")
    if not padding > 0:
        raise ValueError(f"padding must be positive, got {padding}")
    low, high = xy.min(-2), xy.max(-2)
    return (low + high) / 2, (high - low).max(-1) * padding


def hmr2_box_size(extent: ArrayLike) -> Array:
    """Side of HMR2.0's square crop around a box: the box is first widened or heightened to 192:256.

    The backbone sees only the middle 192 of the crop's 256 columns, so a box that is wide for its height needs a larger
    crop, or its sides would be cut off (`4D-Humans/hmr2/datasets/utils.py`). CameraHMR takes the larger side as it is.
    A worked number: 300 wide and 200 high becomes 300 x 400, so the side is 400.

    Args:
        extent: (..., 2) width and height of the box, px.

    Returns:
        (...) px.
    """
    wh = np.asarray(extent, np.float64)
    width, height = HMR2_ASPECT
    return np.maximum(wh[..., 1], wh[..., 0] * height / width)


def crop_affine(center: ArrayLike, size: ArrayLike, out_px: float) -> Array:
    """Map from the full image to a square crop: the box's centre lands on out_px / 2, its side becomes out_px.

    Args:
        center: (..., 2) px of the full image.
        size: (...) side of the box, px of the full image, positive.
        out_px: side of the crop.

    Returns:
        (..., 2, 3) crop_from_image.
    """
    middle, side = np.asarray(center, np.float64), np.asarray(size, np.float64)
    if not (side > 0).all():
        raise ValueError(f"size must be positive, got {side.min()}")
    scale = out_px / side
    affine = np.zeros((*np.broadcast_shapes(scale.shape, middle.shape[:-1]), 2, 3))
    affine[..., 0, 0] = affine[..., 1, 1] = scale
    affine[..., 2] = out_px / 2 - scale[..., None] * middle
    return affine


def compose_affine(a_from_b: ArrayLike, b_from_c: ArrayLike) -> Array:
    """a_from_c, (..., 2, 3): first `b_from_c`, then `a_from_b`."""
    a, b = np.asarray(a_from_b, np.float64), np.asarray(b_from_c, np.float64)
    linear = a[..., :2] @ b[..., :2]
    shift = a[..., :2] @ b[..., 2:] + a[..., 2:]
    return np.concatenate((linear, shift), axis=-1)


def invert_affine(a_from_b: ArrayLike) -> Array:
    """b_from_a, (..., 2, 3). Raises numpy.linalg.LinAlgError where the map is singular."""
    affine = np.asarray(a_from_b, np.float64)
    linear = np.linalg.inv(affine[..., :2])
    return np.concatenate((linear, -linear @ affine[..., 2:]), axis=-1)


def apply_affine(a_from_b: ArrayLike, points: ArrayLike) -> Array:
    """Points of b in the pixels of a: affine (..., 2, 3), points (..., N, 2) -> (..., N, 2)."""
    affine, xy = np.asarray(a_from_b, np.float64), np.asarray(points, np.float64)
    return xy @ np.swapaxes(affine[..., :2], -1, -2) + affine[..., None, :, 2]


@dataclass(frozen=True)
class TokenGrid:
    """Where image tokens lie in a square crop: `rows` x `columns` patches of `patch_px`, the first one's corner at
    (`left_px`, `top_px`)."""

    rows: int
    columns: int
    patch_px: int
    left_px: int
    top_px: int
    crop_px: int
