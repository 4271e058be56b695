"""The network's crop cut from a larger picture: the same interpolation for training and for videos.

Anti-aliasing follows HMR2.0 (`4D-Humans/hmr2/datasets/vitdet_dataset.py`): bilinear, with a Gaussian before it of
sigma (r/2 - 1)/2 only where the picture shrinks by r > 2.2. Stored crops of 384 px shrink about 1.2 times and are
therefore only interpolated, as the original's are: a sharper or softer filter here would show a network made from
published weights a picture it was not trained on.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch

from fasthmr.conventions import CROP_PX, IMAGE_MEAN, IMAGE_STD, MASK_BACKGROUND
from fasthmr.geometry.boxes import apply_affine, compose_affine, invert_affine

#: the network crop is this many times the tight person box: room for hands that move out of a detector's box, and
#: the columns 32:-32 that HMR2.0 does not look at. Stored crops are 1.5 times the box, so jitter has room as well.
CROP_SCALE = 1.2
#: side of the stored crop over that of the box: room for jitter
STORED_SCALE = 1.5
#: pixels around a stored crop that its edge's blur may look at
_MARGIN_PX = 16
#: HMR2.0 blurs where the picture shrinks by more than this.
_BLUR_ABOVE_SHRINK = 2.2


def cut_image(picture: np.ndarray, network_from_picture: np.ndarray, out: np.ndarray) -> None:
    """Warp a picture to the network's crop; black outside the picture.

    Args:
        picture: (H,W,3) uint8 RGB.
        network_from_picture: (2,3) affine, px of the picture -> px of the crop.
        out: (3,256,256) uint8, overwritten.
    """
    cv2.split(_shrunk(picture, network_from_picture, CROP_PX), list(out))


def cut_stored(picture: np.ndarray, crop_from_picture: np.ndarray, side_px: int) -> np.ndarray:
    """The crop that a shard stores, (side_px,side_px,3) uint8 RGB; black outside the picture (H,W,3)."""
    corners = apply_affine(invert_affine(crop_from_picture), [[0, 0], [side_px, side_px]])
    low = np.clip(np.floor(corners[0]).astype(int) - _MARGIN_PX, 0, None)
    high = np.ceil(corners[1]).astype(int) + _MARGIN_PX
    part = picture[low[1] : max(high[1], low[1] + 1), low[0] : max(high[0], low[0] + 1)]
    if not part.size:
        return np.zeros((side_px, side_px, 3), np.uint8)
    return _shrunk(part, compose_affine(crop_from_picture, [[1, 0, low[0]], [0, 1, low[1]]]), side_px)


def _shrunk(picture: np.ndarray, crop_from_picture: np.ndarray, side_px: int) -> np.ndarray:
    a = crop_from_picture
    shrink = 1 / math.sqrt(abs(a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]))
    if shrink > _BLUR_ABOVE_SHRINK:
        picture = cv2.GaussianBlur(picture, (0, 0), (shrink / 2 - 1) / 2)
    side = (side_px, side_px)
    return cv2.warpAffine(picture, a, side, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def cut_mask(mask: np.ndarray, network_from_mask: np.ndarray, out: np.ndarray) -> None:
    """Warp an instance mask to the network's crop; background outside the mask.

    Args:
        mask: (H,W) uint8 instance labels.
        network_from_mask: (2,3) affine, px of the mask -> px of the crop.
        out: (256,256) uint8, overwritten.
    """
    cv2.warpAffine(
        mask, network_from_mask, (CROP_PX, CROP_PX), dst=out, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT,
        borderValue=MASK_BACKGROUND,
    )  # fmt: skip


def normalised(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, 256, 256) uint8 RGB -> float32 by ImageNet's mean and standard deviation of [0, 1], as HMR2.0's input."""
    images = images.float().div_(255.0)
    mean = images.new_tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    std = images.new_tensor(IMAGE_STD).view(1, 3, 1, 1)
    return images.sub_(mean).div_(std)
