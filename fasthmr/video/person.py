"""One person in a video: frames in step with masks and boxes, read once, checked one by one, boxes smoothed."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fasthmr.conventions import MASK_BACKGROUND, MASK_OTHER, MASK_SUBJECT
from fasthmr.geometry.boxes import square_box

#: a box is smoothed over so many standard deviations to both sides
_REACH = 4
_WHAT = ("frames", "masks", "boxes")
_NOTHING = object()

#: centre x and y, and side of a square, px
SquareBox = tuple[float, float, float]


class PersonFrame(NamedTuple):
    """A full image (H, W, 3) uint8 RGB, its instance mask (H, W) uint8 of `conventions.MASK_*`, and the smallest square
    around the person; None where the person is not seen."""

    image: np.ndarray
    mask: np.ndarray
    box: SquareBox | None


def person_frames(
    frames: Iterable[np.ndarray],
    masks: Iterable[np.ndarray],
    boxes: ArrayLike | None = None,
    subject: int = MASK_SUBJECT,
    least_px: int = 1,
    smoothing: float = 0.0,
) -> Iterator[PersonFrame]:
    """Frames with the person's mask and box; holds back as many as the smoothing of the boxes reaches, no more.

    Args:
        frames: T full images (H, W, 3) uint8 RGB of one size.
        masks: T masks (H, W): bool, True on the person; or whole numbers, instance labels, 0 for background.
        boxes: (T, 4) the person's tight box x0, y0, x1, y1, px; NaN where there is none. None: those of the masks.
        subject: the person's label in masks of labels.
        least_px: with fewer pixels in its mask, the person is not seen.
        smoothing: standard deviation, in frames, of the Gaussian that boxes of masks are averaged with over the frames
            around that have one; boxes that are given are taken as they are.

    Raises:
        ValueError: frames, masks or boxes of different numbers, sizes or types; says which and where.
    """
    if subject < 1:
        raise ValueError(f"subject must be a label of at least 1 (0 is background), got {subject}")
    given = None if boxes is None else _checked_boxes(boxes)
    return _smoothed(_in_step(frames, masks, given, subject, least_px), smoothing if given is None else 0.0)


def _in_step(
    frames: Iterable[np.ndarray],
    masks: Iterable[np.ndarray],
    boxes: np.ndarray | None,
    subject: int,
    least_px: int,
) -> Iterator[PersonFrame]:
    streams: list[Iterable[np.ndarray]] = [frames, masks] if boxes is None else [frames, masks, boxes]
    shape: tuple[int, ...] | None = None
    for number, together in enumerate(itertools.zip_longest(*streams, fillvalue=_NOTHING)):
        if any(item is _NOTHING for item in together):
            ended, more = (
                " and ".join(name for name, item in zip(_WHAT, together, strict=False) if (item is _NOTHING) == gone)
                for gone in (True, False)
            )
            raise ValueError(f"there are {number} {ended}, but more {more}: every frame needs its own")
        image, mask = np.asarray(together[0]), np.asarray(together[1])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"frame {number} must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        shape = image.shape if shape is None else shape
        if image.shape != shape:
            raise ValueError(f"frame {number} is {_size(image)} px, those before are {shape[1]} x {shape[0]}")
        if mask.shape != shape[:2]:
            got = f"{_size(mask)} px" if mask.ndim == 2 else f"of shape {mask.shape}"
            raise ValueError(f"mask {number} is {got}, its frame is {_size(image)} px")
        labels = _labels(mask, subject, number)
        box = None
        if np.count_nonzero(labels == MASK_SUBJECT) >= least_px:
            corners = _corners(labels) if boxes is None else boxes[number]
            if np.isfinite(corners).all():
                center, side = square_box(corners.reshape(2, 2))
                box = (float(center[0]), float(center[1]), float(side))
        yield PersonFrame(image, labels, box)


def _labels(mask: np.ndarray, subject: int, number: int) -> np.ndarray:
    """A mask in our own labels."""
    if mask.dtype == np.bool_:
        return np.where(mask, np.uint8(MASK_SUBJECT), np.uint8(MASK_BACKGROUND))
    if not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"mask {number} must be bool, or whole numbers (instance labels), got {mask.dtype}")
    others = np.where(mask == 0, np.uint8(MASK_BACKGROUND), np.uint8(MASK_OTHER))
    return np.where(mask == subject, np.uint8(MASK_SUBJECT), others)


def _corners(labels: np.ndarray) -> np.ndarray:
    """First and last column and row of the person: x0, y0, x1, y1."""
    person = labels == MASK_SUBJECT
    columns, rows = np.flatnonzero(person.any(0)), np.flatnonzero(person.any(1))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float64)


def _smoothed(source: Iterable[PersonFrame], deviation: float) -> Iterator[PersonFrame]:
    reach = math.ceil(_REACH * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(deviation, 1e-9)) ** 2)
    outside: tuple[PersonFrame | None, ...] = (None,) * reach
    around: deque[PersonFrame | None] = deque(outside, maxlen=2 * reach + 1)
    for item in itertools.chain(source, outside):
        around.append(item)
        middle = around[reach] if len(around) == around.maxlen else None
        if middle is None:
            continue  # not enough of what follows has been read yet
        if middle.box is not None and reach:
            known = [(w, f.box) for w, f in zip(weights, around, strict=True) if f is not None and f.box is not None]
            x, y, side = np.average([box for _, box in known], axis=0, weights=[w for w, _ in known]).tolist()
            middle = middle._replace(box=(x, y, side))
        yield middle


def _checked_boxes(boxes: ArrayLike) -> np.ndarray:
    array = np.asarray(boxes, np.float64)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must be (T, 4) = x0, y0, x1, y1 in px, got {array.shape}")
    empty = np.isfinite(array).all(1) & ~((array[:, 2] > array[:, 0]) & (array[:, 3] > array[:, 1]))
    if empty.any():
        number = int(np.argmax(empty))
        raise ValueError(
            f"box {number} must have x0 < x1 and y0 < y1, got {array[number].tolist()}; NaN where nobody is seen"
        )
    return array


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"
