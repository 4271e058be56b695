"""Things that stand, hang or pass in front of synthetic people: boxes, posts, bars and balls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fasthmr.data.synth.people import Appearance, random_thing_appearance

_TAU = 2 * np.pi


@dataclass(frozen=True)
class Thing:
    """One thing. `rest` (N,3) float32 metres around the origin; `faces` (F,3) int32, counter-clockwise from outside;
    `path` (T,3) where it is, world; `look` its colours."""

    rest: np.ndarray
    faces: np.ndarray
    path: np.ndarray
    look: Appearance


def random_things(rng: np.random.Generator, subject: np.ndarray, eye: np.ndarray) -> list[Thing]:
    """Draw one to three things between a camera and a person.

    Args:
        rng: random numbers.
        subject: (T,29,3) the person's joints, world, metres.
        eye: (T,3) the camera's positions.
    """
    frames = len(subject)
    middle, viewer = subject.mean((0, 1)), eye.mean(0)
    across = np.cross([0.0, 1.0, 0.0], middle - viewer)
    across /= max(float(np.linalg.norm(across)), 1e-6)
    things = []
    for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2])):
        share = rng.uniform(0.4, 0.85)  # of the way to the person; sizes shrink with it, what they hide does not
        spot = viewer + share * (middle - viewer) + across * rng.uniform(-0.45, 0.45) * share
        path = np.repeat(spot[None], frames, 0)
        if rng.uniform() < 0.25:
            path = path + across * (np.linspace(-0.5, 0.5, frames) * rng.uniform(-2.0, 2.0) * share)[:, None]
        kind = rng.choice(["box", "post", "bar", "ball"], p=[0.45, 0.2, 0.15, 0.2])
        tall = rng.uniform(0.25, 1.1) * share
        if kind == "box":
            rest, faces = _prism(4, np.array([rng.uniform(0.15, 0.6) * share, tall, rng.uniform(0.1, 0.5) * share]))
            rest = _turned(rest, rng.uniform(0, _TAU))
            height = tall / 2 if rng.uniform() < 0.75 else rng.uniform(0.6, 1.6)
        elif kind == "post":
            tall = rng.uniform(1.0, 3.0)
            width = rng.uniform(0.06, 0.25) * share
            rest, faces = _prism(16, np.array([width, tall, width]))
            height = tall / 2
        elif kind == "bar":  # a rail, or the back of a bench
            thick = rng.uniform(0.04, 0.2) * share
            rest, faces = _prism(4, np.array([rng.uniform(1.0, 4.0), thick, 0.04]))
            rest = _turned(rest, np.arctan2(-across[2], across[0]) + rng.normal(0, 0.2))
            height = rng.uniform(0.3, 1.2)
        else:
            size = rng.uniform(0.12, 0.45, 3) * share
            rest, faces = _ball(size)
            height = size[1] / 2 if rng.uniform() < 0.4 else rng.uniform(0.3, 1.6)
        path[:, 1] = height
        things.append(Thing(rest.astype(np.float32), faces, path, random_thing_appearance(rng)))
    return things


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Points turned about the vertical axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]).T


def _prism(corners: int, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An upright prism of a width, height and depth; every side has vertices of its own: its edges are sharp."""
    around = _TAU * (np.arange(corners) + 0.5) / corners
    ring = np.stack([np.sin(around), np.zeros(corners), np.cos(around)], 1)
    ring /= np.ptp(ring, axis=0).max()
    half = np.array([0, 0.5, 0])
    low, high = ring - half, ring + half
    points: list[np.ndarray] = []
    faces: list[list[int]] = []
    for i in range(corners):
        j, first = (i + 1) % corners, 4 * i
        points += [low[i], low[j], high[j], high[i]]
        faces += [[first, first + 1, first + 2], [first, first + 2, first + 3]]
    first = len(points)
    points += list(high)
    faces += [[first, first + i, first + i + 1] for i in range(1, corners - 1)]
    first = len(points)
    points += list(low)
    faces += [[first, first + i + 1, first + i] for i in range(1, corners - 1)]
    return np.array(points) * size, np.array(faces, np.int32)


def _ball(size: np.ndarray, rings: int = 8, corners: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid of a width, height and depth."""
    down = np.pi * np.arange(rings + 1) / rings
    around = _TAU * np.arange(corners) / corners
    y = np.outer(np.cos(down), np.ones(corners))
    x, z = np.outer(np.sin(down), np.sin(around)), np.outer(np.sin(down), np.cos(around))
    points = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    faces = []
    for r in range(rings):
        for i in range(corners):
            j = (i + 1) % corners
            a, b, c, d = r * corners + i, r * corners + j, (r + 1) * corners + i, (r + 1) * corners + j
            faces += [[a, c, d], [a, d, b]]
    return 0.5 * points * size, np.array(faces, np.int32)
