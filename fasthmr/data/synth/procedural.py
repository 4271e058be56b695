"""The built-in motion library: people who walk, run, turn, squat, sit, reach, wave, kick, jump and dance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from fasthmr.conventions import PELVIS
from fasthmr.data.synth.joint_limits import limited
from fasthmr.data.synth.motion import Motion
from fasthmr.data.synth.procedural_figure import SPINE, Figure, drift, smoothstep
from fasthmr.data.synth.procedural_gait import run, turn, walk
from fasthmr.data.synth.procedural_gestures import dance, hold_arm, reach, wave, wave_arm
from fasthmr.data.synth.procedural_stance import jump, kick, sit, squat, stand
from fasthmr.data.synth.quaternions import (
    Array,
    Y,
    about,
    multiply,
    resample,
    resample_linear,
    rotate,
    slerp,
    to_rotvec,
)
from fasthmr.data.synth.skeleton import SIDES, Skeleton, free_skeleton, joint

Action = Callable[[Figure, Generator], None]

#: action and how often it is chosen.
ACTIONS: dict[str, tuple[Action, float]] = {
    "stand": (stand, 0.10),
    "walk": (walk, 0.18),
    "run": (run, 0.09),
    "turn": (turn, 0.08),
    "squat": (squat, 0.08),
    "sit": (sit, 0.10),
    "reach": (reach, 0.12),
    "wave": (wave, 0.07),
    "kick": (kick, 0.07),
    "jump": (jump, 0.07),
    "dance": (dance, 0.14),
}
#: actions that leave the arms free to do something else
_ARMS_FREE = ("stand", "walk", "turn", "sit")

#: part of the fingerprint; raise it whenever the motions change.
_VERSION = 1
#: the library is evaluated on this grid and read off at the frames' times, so that a motion is the same at any fps.
_GRID_HZ = 120.0
#: metres: contacts this much above the lowest one carry a third of its weight.
_CONTACT_SOFTNESS = 0.003
#: metres above the floor at which a foot no longer holds the body.
_FLYING = 0.03


class ProceduralMotion:
    """A `MotionSource` that needs no files.

    A motion is one action, or several with smooth transitions. All joints stay within `joint_limits`, no foot sinks
    into the floor, and a foot that carries the body stands still.

    Args:
        actions: the actions to choose from; None for all of `ACTIONS`.

    Raises:
        ValueError: an action is not in the library.
    """

    name = "procedural"

    def __init__(self, actions: tuple[str, ...] | None = None) -> None:
        chosen = tuple(ACTIONS) if actions is None else actions
        unknown = sorted(set(chosen) - set(ACTIONS))
        if unknown or not chosen:
            raise ValueError(f"unknown actions {unknown}; choose some of {', '.join(ACTIONS)}")
        self.actions = chosen

    def sample(self, rng: Generator, frames: int, fps: float) -> Motion:
        """A motion of `frames` frames at `fps` with a heading uniform over the circle; see `MotionSource`."""
        if frames < 1 or not fps > 0:
            raise ValueError(f"a motion needs frames >= 1 and fps > 0, got frames={frames}, fps={fps}")
        skeleton = free_skeleton()
        seconds = (frames - 1) / fps
        t = np.arange(int(np.ceil(seconds * _GRID_HZ)) + 2) / _GRID_HZ

        names, figure, travel = self._perform(rng, skeleton, t, seconds)
        local = limited(figure.local)
        heading = rng.uniform(-np.pi, np.pi) + _integral(figure.yaw_rate)
        pelvis = _integral(rotate(about(Y, heading), travel))
        pelvis[:, 1] = figure.lift - _carried(skeleton.contact_points(local))[0]
        local[:, PELVIS] = multiply(about(Y, heading), local[:, PELVIS])

        rows = np.arange(frames) / fps * _GRID_HZ
        pelvis = resample_linear(pelvis, rows)
        pelvis[:, (0, 2)] -= pelvis[:, (0, 2)].mean(0)
        return Motion(
            # Limited again: a slerp between two allowed poses may pass outside by a hundredth of a degree.
            pose=to_rotvec(limited(resample(local, rows))).astype(np.float32),
            translation=(pelvis - skeleton.rest[PELVIS]).astype(np.float32),
            fps=fps,
            name="+".join(names),
        )

    def fingerprint(self) -> str:
        """Short hash of the library's version, the chosen actions and the skeleton that the motions stand on."""
        rest = np.round(free_skeleton().rest, 4).tolist()
        return hashlib.sha256(repr((self.name, _VERSION, self.actions, rest)).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """What the source holds, as JSON values."""
        return {"motion": self.name, "actions": list(self.actions), "version": _VERSION}

    def _perform(self, rng: Generator, skeleton: Skeleton, t: Array, seconds: float) -> tuple[list[str], Figure, Array]:
        """Act one or more actions, each blended into the one before: their names, the figure, and its `_travel`."""
        count = 1 + rng.poisson(seconds / 4.0) if seconds > 1.0 else 1
        starts = np.sort(rng.uniform(0.1, 0.9, count - 1)) * seconds
        name, figure = self._act(rng, skeleton, t)
        names, travel = [name], _travel(figure)
        for start in starts:
            name, after = self._act(rng, skeleton, t, before=names[-1])
            weight = smoothstep((t - start) / rng.uniform(0.5, 0.9) + 0.5)
            figure.local = slerp(figure.local, after.local, weight[:, None])
            figure.yaw_rate = figure.yaw_rate + weight * (after.yaw_rate - figure.yaw_rate)
            figure.lift = figure.lift + weight * (after.lift - figure.lift)
            # Of each action by itself: halfway between two poses no foot need be at rest.
            travel = travel + weight[:, None] * (_travel(after) - travel)
            names.append(name)
        return names, figure, travel

    def _act(self, rng: Generator, skeleton: Skeleton, t: Array, before: str = "") -> tuple[str, Figure]:
        """One action, another than `before` if there is a choice."""
        choice = [name for name in self.actions if name != before] or list(self.actions)
        weights = np.array([ACTIONS[name][1] for name in choice])
        name = choice[rng.choice(len(choice), p=weights / weights.sum())]
        figure = Figure(skeleton, t)
        ACTIONS[name][0](figure, rng)
        if name in _ARMS_FREE:
            for side in SIDES:
                if rng.random() < 0.2:
                    (wave_arm if rng.random() < 0.2 else hold_arm)(figure, rng, side)
        figure.clench(rng)
        _vary(figure, rng)
        return name, figure


def _vary(figure: Figure, rng: Generator) -> None:
    """Small differences in posture between people and moments, on all joints but the legs' (which hold the floor)."""
    spread = {name: 4.0 for name in SPINE} | {"neck": 8.0, "head": 10.0}
    for side in SIDES:
        prefix = "left_" if side > 0 else "right_"
        spread |= {prefix + "collar": 5.0, prefix + "shoulder": 4.0, prefix + "foot": 2.0}
    for name, size in spread.items():
        radians = np.radians(size)
        x, y, z = (rng.normal(0.0, 0.6 * radians) + drift(rng, figure.t, 0.4 * radians) for _ in range(3))
        figure.add(joint(name), figure.rotvec(x, y, z))
    for side in SIDES:  # the forearm turns about its own axis, which no placing of hands decides
        twist = np.radians(rng.uniform(-45, 45)) + drift(rng, figure.t, np.radians(12))
        figure.add(joint("elbow", side), figure.rotvec(twist, 0.0, 0.0))


def _carried(points: Array) -> tuple[Array, Array]:
    """Height (T,) of the floor under the contacts (T, 6, 3), and the share (T, 6) of the weight that each carries."""
    lowest = points[..., 1].min(1, keepdims=True)
    share = np.exp((lowest - points[..., 1]) / _CONTACT_SOFTNESS)
    total = share.sum(1, keepdims=True)
    # A smooth minimum: never above the lowest contact, so nothing sinks, and at most a few millimetres below it.
    return lowest[:, 0] - _CONTACT_SOFTNESS * np.log(total[:, 0]), share / total


def _travel(figure: Figure) -> Array:
    """Velocity (T, 3) of the pelvis in the heading's frame with which the contacts that carry weight stand still."""
    points = figure.skeleton.contact_points(limited(figure.local))
    turning = figure.yaw_rate[:, None, None] * np.cross((0.0, 1.0, 0.0), points)
    moved = np.gradient(points, 1 / _GRID_HZ, axis=0) + turning
    held = -(_carried(points)[1][..., None] * moved).sum(1)
    flying = smoothstep(figure.lift / _FLYING)[:, None]
    return held + flying * (figure.flight_velocity - held)


def _integral(rate: Array) -> Array:
    """Integral over the grid from its first time, by the trapezoid rule: shape of `rate`."""
    steps = 0.5 * (rate[1:] + rate[:-1]) / _GRID_HZ
    return np.concatenate((np.zeros_like(rate[:1]), np.cumsum(steps, axis=0)))
