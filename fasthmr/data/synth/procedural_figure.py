"""A posed figure over time, on which the actions of the procedural library are sketched, and curves to move it by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from fasthmr.conventions import NUM_JOINTS, PELVIS
from fasthmr.data.synth.quaternions import Array, X, Y, Z, about, from_rotvec, multiply, rotate, slerp
from fasthmr.data.synth.skeleton import LEFT, SIDES, Skeleton, joint, place_arm, place_leg

SPINE = ("spine1", "spine2", "spine3")


def smoothstep(x: Array) -> Array:
    """0 below 0, 1 above 1, in between smooth with flat ends."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3 - 2 * x)


def keyed(t: Array, times: Array | list[float], values: Array | list[float]) -> Array:
    """Smooth curve through key values without overshoot, constant before the first and after the last: t's shape."""
    return PchipInterpolator(times, values)(np.clip(t, times[0], times[-1]))


def drift(rng: np.random.Generator, t: Array, amplitude: float, low_hz: float = 0.1, high_hz: float = 0.8) -> Array:
    """A wandering curve: three sines of random frequency and phase that together stay within `amplitude`."""
    share = rng.dirichlet(np.ones(3))
    hertz = rng.uniform(low_hz, high_hz, 3)
    phase = rng.uniform(0, 2 * np.pi, 3)
    return amplitude * (share * np.sin(2 * np.pi * hertz * t[:, None] + phase)).sum(1)


def degrees(rng: np.random.Generator, low: float, high: float) -> float:
    """A uniform angle between `low` and `high` degrees, in radians."""
    return float(np.radians(rng.uniform(low, high)))


@dataclass(frozen=True)
class FootPath:
    """Where a foot goes, in the frame that moves and heads with the pelvis; arrays (T,) or numbers.

    Attributes:
        x: metres to the left of the pelvis, for the ankle of the flat foot.
        z: metres forward of where that ankle is under the pelvis in the rest pose.
        height: metres between the floor and the lowest point of the foot.
        yaw, pitch: radians; positive pitch lifts the heel (turning about the ball), negative lifts the toes.
    """

    x: Array | float
    z: Array | float
    height: Array | float = 0.0
    yaw: Array | float = 0.0
    pitch: Array | float = 0.0


class Figure:
    """Local rotations of the 24 joints over time, starting as a person who stands with hanging arms.

    Attributes:
        t: (T,) seconds.
        local: (T, 24, 4) rotations relative to the parent; the pelvis' relative to the heading.
        yaw_rate: (T,) radians a second at which the heading turns left.
        lift: (T,) height of the lowest point of the feet above the floor: above 0 in the air only.
        flight_velocity: (T, 3) metres a second in the heading's frame, used while in the air.
    """

    def __init__(self, skeleton: Skeleton, t: Array) -> None:
        self.skeleton = skeleton
        self.t = t
        self.local = np.zeros((len(t), NUM_JOINTS, 4))
        self.local[..., 0] = 1.0
        self.yaw_rate = np.zeros(len(t))
        self.lift = np.zeros(len(t))
        self.flight_velocity = np.zeros((len(t), 3))

    def series(self, value: Array | float) -> Array:
        """`value` at every time: (T,)."""
        return np.broadcast_to(np.asarray(value, dtype=np.float64), self.t.shape)

    def rotvec(self, x: Array | float, y: Array | float, z: Array | float) -> Array:
        """Quaternions (T, 4) of the rotation vector (x, y, z) radians."""
        return from_rotvec(np.stack([self.series(v) for v in (x, y, z)], axis=-1))

    def pelvis(self, bow: Array | float = 0.0, turn: Array | float = 0.0, lean: Array | float = 0.0) -> None:
        """Turn the pelvis relative to the heading: bow forward, turn left, lean right. Call before `legs`."""
        self.local[:, PELVIS] = self.rotvec(bow, turn, lean)

    def spine(self, bow: Array | float = 0.0, turn: Array | float = 0.0, lean: Array | float = 0.0) -> None:
        """Add a bend of the whole back, shared by its three joints."""
        third = self.rotvec(*(self.series(v) / 3 for v in (bow, turn, lean)))
        for name in SPINE:
            self.add(joint(name), third)

    def head(self, bow: Array | float = 0.0, turn: Array | float = 0.0, lean: Array | float = 0.0) -> None:
        """Add a turn of the head, shared by neck and head."""
        half = self.rotvec(*(self.series(v) / 2 for v in (bow, turn, lean)))
        self.add(joint("neck"), half)
        self.add(joint("head"), half)

    def add(self, j: int, rotation: Array) -> None:
        """Turn joint j further, in its own frame."""
        self.local[:, j] = multiply(self.local[:, j], rotation)

    def legs(self, pelvis_height: Array | float, left: FootPath, right: FootPath) -> None:
        """Put both feet on their paths, with the pelvis `pelvis_height` metres above the floor."""
        rest, sole_y = self.skeleton.rest, self.skeleton.sole_y
        for side, path in zip(SIDES, (left, right), strict=True):
            ankle_rest = rest[joint("ankle", side)]
            heel, ball = self.skeleton.contacts[0 if side == LEFT else 3 :][:2]
            yaw, pitch = self.series(path.yaw), self.series(path.pitch)
            heading = about(Y, yaw)
            foot = multiply(heading, about(X, pitch))
            # The foot tips about the ball when the heel lifts, and about the heel when the toes lift.
            from_pivot = ankle_rest - np.where(pitch[:, None] > 0, ball, heel)
            tipped = rotate(foot, from_pivot) - rotate(heading, from_pivot)
            height = self.series(path.height)
            z = self.series(path.z) + ankle_rest[2] - rest[PELVIS, 2]
            level = np.stack((self.series(path.x), height + ankle_rest[1] - sole_y - pelvis_height, z), axis=-1)
            hip, knee, ankle = place_leg(self.skeleton, self.local[:, PELVIS], side, level + tipped, foot, yaw)
            for name, rotation in (("hip", hip), ("knee", knee), ("ankle", ankle)):
                self.local[:, joint(name, side)] = rotation
            # Toes stay on the floor while the heel rises, and let go slowly in the air.
            flat_toes = np.clip(pitch, 0.0, np.radians(58)) * (1 - 0.8 * smoothstep((height - 0.05) / 0.25))
            self.local[:, joint("foot", side)] = about(X, -flat_toes)

    def hang_arm(
        self,
        side: int,
        forward: Array | float = 0.0,
        down: Array | float = 1.33,
        bend: Array | float = 0.26,
        twist: Array | float = 0.0,
    ) -> None:
        """An arm that hangs `down` from the T pose and swings `forward`; the elbow bends, the palm turns back."""
        shoulder = multiply(about(X, -self.series(forward)), about(Z, -side * self.series(down)))
        self.local[:, joint("shoulder", side)] = multiply(shoulder, about(X, self.series(twist)))
        self.local[:, joint("elbow", side)] = about(Y, -side * self.series(bend))

    def put_hand(self, side: int, wrist: Array, elbow_towards: Array, weight: Array | float = 1.0) -> None:
        """Move the wrist to `wrist` (T, 3), blended with what the arm does already.

        Both vectors are in the chest's frame with x pointing away from the body's middle (so the same numbers serve
        both arms), `wrist` from the shoulder in arm lengths.
        """
        outwards = np.array((side, 1.0, 1.0))
        shoulder_j, elbow_j = joint("shoulder", side), joint("elbow", side)
        target = np.broadcast_to(wrist * outwards * self.skeleton.arm_length, (len(self.t), 3))
        pole = np.broadcast_to(elbow_towards * outwards, target.shape)
        collar = self.local[:, joint("collar", side)]
        shoulder, elbow = place_arm(self.skeleton, collar, side, target, pole)
        self.mix(shoulder_j, shoulder, weight)
        self.mix(elbow_j, elbow, weight)

    def mix(self, j: int, rotation: Array, weight: Array | float) -> None:
        """Blend joint j towards `rotation` (T, 4)."""
        self.local[:, j] = slerp(self.local[:, j], rotation, self.series(weight))

    def clench(self, rng: np.random.Generator) -> None:
        """Relaxed hands: fingers a little curled, wrists a little bent, each in its own way."""
        for side in SIDES:
            curl = degrees(rng, 5, 50) + drift(rng, self.t, np.radians(6))
            self.add(joint("hand", side), about(Z, -side * curl))
            bend = degrees(rng, -20, 20) + drift(rng, self.t, np.radians(10))
            swerve = degrees(rng, -10, 10) + drift(rng, self.t, np.radians(6))
            self.add(joint("wrist", side), self.rotvec(0.0, side * swerve, side * bend))
