"""NeuralAnnot's fits of SMPL (Moon et al. 2022) to films by calibrated cameras.

A fit is {pose (72), shape (10), trans (3)} in the world, metres; a camera is {R (3,3), t (3,) mm, f (2,), c (2,)}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.reading import Picture, numbers
from fasthmr.data.convert.track import Track
from fasthmr.data.schema import Status

#: what fits are
FITS: dict[str, Status] = dict.fromkeys(("joints2d", "joints3d", "pose", "betas", "translation"), "pseudo")


def pinhole(focal: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """(T,2), (T,2) px -> (T,3,3)."""
    intrinsics = np.zeros((len(focal), 3, 3))
    intrinsics[:, [0, 1], [0, 1]] = focal
    intrinsics[:, :2, 2] = middle
    intrinsics[:, 2, 2] = 1
    return intrinsics


def fitted_track(
    key: str,
    source: str,
    fps: float,
    pictures: Sequence[Picture],
    fits: Sequence[Mapping[str, Any]],
    camera: Mapping[str, Any],
    boxes: tuple[np.ndarray, np.ndarray],
    where: str,
) -> Track:
    """A track of T pictures by one camera, of T fits and boxes (centre (T,2), side (T,))."""
    frames = len(pictures)
    cam_from_world = np.eye(4)
    cam_from_world[:3, :3] = numbers(camera, "R", (3, 3), where)
    cam_from_world[:3, 3] = numbers(camera, "t", (3,), where) / 1000
    focal, middle = (np.tile(numbers(camera, name, (2,), where), (frames, 1)) for name in ("f", "c"))
    flat = [{name: np.asarray(value, np.float64).reshape(-1) for name, value in fit.items()} for fit in fits]
    return Track(
        key=key,
        source=source,
        fps=fps,
        pictures=pictures,
        valid=np.ones(frames, bool),
        intrinsics=pinhole(focal, middle),
        pose=np.stack([numbers(f, "pose", (3 * NUM_JOINTS,), where) for f in flat]).reshape(frames, NUM_JOINTS, 3),
        betas=np.stack([numbers(f, "shape", (NUM_BETAS,), where) for f in flat]),
        translation=np.stack([numbers(f, "trans", (3,), where) for f in flat]),
        cam_from_world=np.broadcast_to(cam_from_world, (frames, 4, 4)),
        center=boxes[0],
        size=boxes[1],
        status=FITS,
    )
