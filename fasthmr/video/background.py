"""Masks without a segmenter: what differs from the background, for one person before a camera that stands still.

A median over time is no background where the person hardly leaves their place. So it is done in two rounds:

1. what differs from the median says roughly where the person is, and from that GrabCut (Rother et al. 2004) learns
   the colours of the person and of the place; it then cuts the person out of some frames;
2. the median over those frames without what was cut out is the background. A mask is what differs from it, cleaned:
   specks and thin lines go, small holes close, the largest piece stays. What the person never uncovers is theirs.

All of it on small pictures: a mask only says where to look and which patches show the person. Things that the person
holds or kicks are masked with them; shadows may be. For anything else use masks from a segmenter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

#: longest side of the pictures that are compared, px
_WORK_PX = 320
#: frames, spread over the video, that the background is learnt from
_SAMPLES = 40
#: of which so many teach the colours
_COLOUR_SAMPLES = 8
#: largest difference of a channel, grey values, that is still the same thing
_SAME = 25
#: something happens where the difference is larger in this share of the frames
_ACTIVE_SHARE = 0.02
#: more of the picture than this cannot be one person who moves
_MOST_ACTIVE = 0.6
#: a person covers at least this share of the picture
_LEAST_PERSON = 0.001
#: a place must be seen uncovered in so many of the samples
_LEAST_SEEN = 2
_GRABCUT_ROUNDS = 4
#: so much around the place where something happens shows what the place looks like
_MARGIN_PX = 24
_UNUSED = (0, 0, 1, 1)  # a rectangle that OpenCV wants and, given a mask, does not look at


@dataclass(frozen=True)
class StaticBackground:
    """A background that a person moves in front of.

    Attributes:
        plate: (h, w, 3) float32 RGB, small.
        hidden: (h, w) bool, places that are never uncovered.
    """

    plate: np.ndarray
    hidden: np.ndarray

    @classmethod
    def learn(cls, frames: Iterable[np.ndarray]) -> StaticBackground:
        """Learn it from a video's frames (H, W, 3) uint8 RGB; keeps small copies of some.

        Raises:
            ValueError: there are fewer than two frames, nothing moves, or all does because the camera moves.
        """
        sampled = _sampled(frames)
        if len(sampled) < 2:
            raise ValueError(f"a background is learnt from a video, got {len(sampled)} frames: give masks instead")
        small = np.stack(sampled)
        differs = _difference(small, np.median(small, axis=0)) > _SAME
        active = differs.mean(0) > _ACTIVE_SHARE
        if active.mean() > _MOST_ACTIVE:
            raise ValueError(
                f"{active.mean():.0%} of the picture changes: a background can only be learnt where the camera stands "
                "still; give masks from a segmenter"
            )
        person = np.stack([_hull(frame) for frame in differs])
        if not person.any():
            raise ValueError("nothing moves in the video, so nothing tells the person from the background: give masks")
        stage = cv2.dilate(_largest(cv2.morphologyEx(_bytes(active), cv2.MORPH_CLOSE, _disc(9))), _disc(5)) > 0
        covered = _cut_out(small, person, stage)
        uncovered = np.where(covered[..., None], np.nan, small.astype(np.float32))
        hidden = (~covered).sum(0) < _LEAST_SEEN
        uncovered[:, hidden] = 0
        return cls(np.nanmedian(uncovered, axis=0).astype(np.float32), hidden)

    def person_mask(self, frame: np.ndarray) -> np.ndarray:
        """The person in a frame (H, W, 3) uint8 RGB: (H, W) bool, empty where they are not seen."""
        differs = (_difference(_shrunken(frame), self.plate) > _SAME) | self.hidden
        mask = cv2.morphologyEx(_bytes(differs), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
        mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, _disc(5)), cv2.MORPH_OPEN, _disc(3))
        mask = _largest(mask)
        if mask.mean() < _LEAST_PERSON:
            mask = np.zeros_like(mask)
        size = (frame.shape[1], frame.shape[0])
        return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5


def _sampled(frames: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Small copies of up to twice `_SAMPLES` frames, evenly spread over a video of unknown length."""
    kept: list[np.ndarray] = []
    every = 1
    for number, frame in enumerate(frames):
        if number % every == 0:
            kept.append(_shrunken(frame))
        if len(kept) == 2 * _SAMPLES:
            kept, every = kept[::2], 2 * every
    return kept


def _shrunken(frame: np.ndarray) -> np.ndarray:
    scale = min(1.0, _WORK_PX / max(frame.shape[:2]))
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def _difference(frames: np.ndarray, plate: np.ndarray) -> np.ndarray:
    """(..., h, w) largest difference of a channel."""
    return np.abs(frames.astype(np.float32) - plate).max(-1)


def _cut_out(frames: np.ndarray, person: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """(N, h, w) bool: where the person is in frames, with a margin; `person` is a first guess, all within `stage`."""
    cv2.setRNGSeed(0)  # GrabCut begins with random clusters
    covered = np.zeros(person.shape, bool)
    around = np.s_[:, *(_span(np.asarray(stage.any(axis))) for axis in (1, 0))]  # no time is spent on what is far away
    frames, person, stage, inside = frames[around], person[around], stage[around[1:]], covered[around]
    labels = np.where(stage, cv2.GC_PR_BGD, cv2.GC_BGD).astype(np.uint8)
    guesses = np.where(person, cv2.GC_PR_FGD, labels)
    seen = np.flatnonzero(person.any((1, 2)))
    teachers = seen[np.linspace(0, len(seen) - 1, min(_COLOUR_SAMPLES, len(seen))).round().astype(int)]
    place_colours, person_colours = np.zeros((1, 65)), np.zeros((1, 65))  # five Gaussians each, OpenCV's format
    cv2.grabCut(
        np.concatenate(frames[teachers]), np.concatenate(guesses[teachers]), _UNUSED, place_colours, person_colours,
        _GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK,
    )  # fmt: skip
    for number, (frame, guess) in enumerate(zip(frames, guesses, strict=True)):
        cv2.grabCut(frame, guess, _UNUSED, place_colours, person_colours, 1, cv2.GC_EVAL_FREEZE_MODEL)
        inside[number] = cv2.dilate(_bytes((guess == cv2.GC_FGD) | (guess == cv2.GC_PR_FGD)), _disc(7)) > 0
    return covered


def _span(places: np.ndarray) -> slice:
    """From the first to the last of (N,) bool, and a margin."""
    where = np.flatnonzero(places)
    return slice(max(0, int(where[0]) - _MARGIN_PX), int(where[-1]) + 1 + _MARGIN_PX)


def _hull(differs: np.ndarray) -> np.ndarray:
    """(h, w) bool: the convex hull of the largest piece of what differs; bits that are near count as one piece.

    Convex, because the median may hold the middle of the person, which then does not differ from it.
    """
    ragged = cv2.morphologyEx(_bytes(differs), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    points = cv2.findNonZero(_largest(cv2.dilate(ragged, _disc(15))) & ragged)
    hull = np.zeros_like(ragged)
    if points is not None:
        cv2.fillConvexPoly(hull, cv2.convexHull(points), 1)
    return hull > 0


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected piece of a (h, w) uint8 mask."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    if count == 1:
        return mask
    return _bytes(labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())


def _bytes(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8)


def _disc(size: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
