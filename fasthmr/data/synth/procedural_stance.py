"""Actions of the procedural library on the spot: stand, squat, sit, kick, jump."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.interpolate import CubicHermiteSpline

from fasthmr.conventions import PELVIS
from fasthmr.data.synth.procedural_figure import Figure, FootPath, degrees, drift, keyed, smoothstep
from fasthmr.data.synth.quaternions import Array, X, about, slerp
from fasthmr.data.synth.skeleton import LEFT, RIGHT, SIDES, joint

GRAVITY = 9.81  # m/s^2


@dataclass(frozen=True)
class Stance:
    """Where the feet stand: per foot (left, right) metres sideways and forward of the pelvis, and toes out (rad)."""

    x: tuple[float, float]
    z: tuple[float, float]
    yaw: tuple[float, float]

    @staticmethod
    def random(rng: Generator, half_width: float, stagger: float, splay: float) -> Stance:
        """Feet about `half_width` metres from the middle, at most `stagger` metres ahead of one another."""
        left, right = half_width * rng.uniform(0.85, 1.15, 2)
        ahead = rng.uniform(-stagger, stagger) / 2
        out = splay * rng.uniform(0.6, 1.4, 2)
        return Stance((left, -right), (ahead, -ahead), (out[0], -out[1]))

    def path(self, side: int, x: Array | float = 0.0, z: Array | float = 0.0, pitch: Array | float = 0.0) -> FootPath:
        """The foot of one side, `x` and `z` metres from its place under the pelvis."""
        i = SIDES.index(side)
        return FootPath(self.x[i] + np.asarray(x), self.z[i] + np.asarray(z), 0.0, self.yaw[i], pitch)


def cycle(rng: Generator, t: Array, period: float) -> Array:
    """Time within a cycle of `period` seconds that began at a random moment."""
    return np.mod(t + rng.uniform(0, period), period)


def relaxed_arms(figure: Figure, rng: Generator) -> None:
    """Hanging arms that hardly move."""
    for side in SIDES:
        forward = degrees(rng, -8, 12) + drift(rng, figure.t, np.radians(4))
        down = degrees(rng, 68, 82) + drift(rng, figure.t, np.radians(2))
        bend = degrees(rng, 5, 35) + drift(rng, figure.t, np.radians(4))
        figure.hang_arm(side, forward, down, bend, degrees(rng, -35, 20))


def stand(figure: Figure, rng: Generator) -> None:
    """Stand with a small sway, now and then shifting the weight to the other leg."""
    t = figure.t
    stance = Stance.random(rng, rng.uniform(0.07, 0.2), 0.2, degrees(rng, 2, 18))
    height = figure.skeleton.standing_height - rng.uniform(0.002, 0.015) - 0.48 * max(0.0, max(stance.x) - 0.08) ** 2
    shift = rng.uniform(-0.05, 0.05) + drift(rng, t, 0.03, 0.05, 0.25)
    lean = -shift * rng.uniform(0.5, 1.5)
    figure.pelvis(degrees(rng, -4, 4), drift(rng, t, np.radians(5)), lean)
    back = drift(rng, t, 0.012)
    figure.legs(height, stance.path(LEFT, -shift, back), stance.path(RIGHT, -shift, back))
    breath = np.radians(1.2) * np.sin(2 * np.pi * (rng.uniform(0.2, 0.35) * t + rng.random()))
    turned = degrees(rng, -12, 12)
    figure.spine(degrees(rng, -4, 14) + breath, turned + drift(rng, t, np.radians(7)), -lean + degrees(rng, -4, 4))
    figure.head(degrees(rng, -8, 22) + drift(rng, t, np.radians(8)), 0.5 * turned + drift(rng, t, np.radians(35)), 0.0)
    relaxed_arms(figure, rng)


def squat(figure: Figure, rng: Generator) -> None:
    """Bend the knees and come up again, feet side by side (squat) or one in front (lunge)."""
    period = rng.uniform(1.8, 3.6)
    down = rng.uniform(0.25, 0.4)
    hold = rng.uniform(0.02, 0.3)
    bent = keyed(cycle(rng, figure.t, period) / period, [0, down, down + hold, 0.92, 1], [0, 1, 1, 0, 0])
    lunge = rng.random() < 0.35
    if lunge:
        stance = Stance.random(rng, rng.uniform(0.08, 0.14), 0.0, degrees(rng, 0, 8))
        ahead = rng.uniform(0.28, 0.4) * rng.choice((-1, 1))
        stance = Stance(stance.x, (ahead, -ahead), stance.yaw)
        deep, top, lean_most = rng.uniform(0.2, 0.36), 0.12, degrees(rng, 0, 20)
    else:
        stance = Stance.random(rng, rng.uniform(0.13, 0.24), 0.06, degrees(rng, 10, 30))
        deep, top, lean_most = rng.uniform(0.2, 0.5), 0.02 + 0.4 * max(stance.x) ** 2, degrees(rng, 20, 45)
    height = figure.skeleton.standing_height - top - deep * bent
    bow = lean_most * bent
    figure.pelvis(bow, 0.0, 0.0)
    # The hips go back as they go down, or one would fall.
    forward = 0.0 if lunge else 0.28 * deep * bent
    rear_heel = degrees(rng, 30, 45) * (0.55 + 0.45 * bent) if lunge else 0.0
    figure.legs(
        height,
        stance.path(LEFT, 0.0, forward, rear_heel if stance.z[0] < stance.z[1] else 0.0),
        stance.path(RIGHT, 0.0, forward, rear_heel if stance.z[1] < stance.z[0] else 0.0),
    )
    figure.spine(degrees(rng, 0, 8) + 0.35 * bow, drift(rng, figure.t, np.radians(4)), 0.0)
    figure.head(-0.8 * bow + drift(rng, figure.t, np.radians(6)), drift(rng, figure.t, np.radians(12)), 0.0)
    relaxed_arms(figure, rng)
    if rng.random() < 0.6:  # arms forward for balance
        raised = degrees(rng, 50, 95)
        bend, inwards = degrees(rng, 5, 60), degrees(rng, 78, 88)
        for side in SIDES:
            figure.hang_arm(side, 0.1 + raised * bent, inwards, 0.2 + bend * bent, degrees(rng, -15, 15))


def sit(figure: Figure, rng: Generator) -> None:
    """Sit down on something that is not shown, stay, and get up again."""
    t = figure.t
    seat = figure.skeleton.leg_length * rng.uniform(0.5, 0.66)
    stance = Stance.random(rng, rng.uniform(0.08, 0.2), 0.16, degrees(rng, 0, 16))
    moving, staying, standing = rng.uniform(1.0, 1.6), rng.uniform(4.0, 8.0), rng.uniform(0.2, 0.8)
    period = 2 * moving + staying + standing
    now = cycle(rng, t, period)
    marks = list(np.cumsum([0, moving, staying, moving, standing]))
    seated = keyed(now, marks, [0, 1, 1, 0, 0])
    # The trunk bows most while the weight is between feet and seat.
    bowing = np.sin(np.pi * seated) ** 2
    height = figure.skeleton.standing_height - 0.03 + (seat - figure.skeleton.standing_height + 0.03) * seated
    slump = degrees(rng, -22, 2)
    figure.pelvis(slump * seated + degrees(rng, 22, 34) * bowing, 0.0, 0.0)
    forward = rng.uniform(0.3, 0.46) * seated**1.5 + 0.06 * bowing
    figure.legs(height, stance.path(LEFT, 0.0, forward), stance.path(RIGHT, 0.0, forward))
    bow = degrees(rng, 5, 40) * seated + degrees(rng, 5, 15) * bowing
    turned = degrees(rng, -20, 20) * seated
    figure.spine(bow, turned + drift(rng, t, np.radians(5)), degrees(rng, -6, 6) * seated + drift(rng, t, 0.04))
    figure.head(degrees(rng, -25, 12) * seated + drift(rng, t, 0.12), turned + drift(rng, t, np.radians(30)), 0.0)
    for side in SIDES:  # hands on or beside the thighs
        lap = rng.random() < 0.75
        forward_arm = degrees(rng, 15, 45) if lap else degrees(rng, -15, 10)
        bend = degrees(rng, 30, 85) if lap else degrees(rng, 5, 20)
        arm = 0.05 + (forward_arm - 0.05) * seated
        figure.hang_arm(side, arm, degrees(rng, 66, 80), 0.2 + (bend - 0.2) * seated, degrees(rng, -10, 45) * seated)


def kick(figure: Figure, rng: Generator) -> None:
    """Kick forward or to the side with one leg, or pull up a knee; the other leg stands."""
    t = figure.t
    side = int(rng.choice(SIDES))
    tall = figure.skeleton.standing_height
    leg = figure.skeleton.leg_length
    pace = rng.uniform(0.85, 1.25)
    marks = pace * np.array((0.0, 0.35, 0.62, 0.78, 1.05, 1.5))
    now = cycle(rng, t, float(marks[-1] + rng.uniform(0.1, 0.5)))
    kind = rng.choice(("front", "low", "side", "knee"))
    rise = {"front": (40, 95), "low": (25, 50), "side": (40, 75), "knee": (60, 100)}[kind]
    up = degrees(rng, *rise)
    reach = leg * (rng.uniform(0.5, 0.62) if kind == "knee" else rng.uniform(0.95, 1.0))
    out = degrees(rng, 45, 80) if kind == "side" else degrees(rng, -8, 12)
    hip_x = abs(float(figure.skeleton.rest[joint("hip", LEFT), 0]))
    ankle_height = float(figure.skeleton.rest[joint("ankle", LEFT), 1] - figure.skeleton.sole_y)
    hip_height = tall - 0.012 - float(figure.skeleton.rest[PELVIS, 1] - figure.skeleton.rest[joint("hip", LEFT), 1])
    far, high = reach * np.sin(up), hip_height - ankle_height - reach * np.cos(up)
    back = rng.uniform(0.1, 0.45) if kind in ("front", "low") else 0.0
    strike_x, strike_z = hip_x + far * np.sin(out), far * np.cos(out)
    chambered = 0.62 if kind in ("front", "side") else 0.3
    x = keyed(now, marks, [0.09, 0.09, 0.3 * 0.09 + 0.7 * hip_x, strike_x, 0.5 * (hip_x + strike_x), 0.09])
    z = keyed(now, marks, [0.0, -back, chambered * 0.45, strike_z, 0.5 * strike_z, 0.0])
    y = keyed(now, marks, [0.0, 0.25 * back, max(0.18, chambered * high), high, max(0.12, 0.5 * high), 0.0])
    working = keyed(now, marks, [0, 0.4, 0.9, 1, 0.7, 0])
    y = y + 0.015 * smoothstep(working / 0.02)  # off the floor before it moves: it must not drag the body along
    yaw = side * (degrees(rng, 5, 15) + (0.5 * out if kind == "side" else 0.0) * working)
    shift = side * (0.05 * np.minimum(working * 3, 1.0))  # the weight is over the standing foot
    stand_in = hip_x * 0.55
    lean_back = (degrees(rng, 4, 16) + 0.1 * up) * keyed(now, marks, [0, -0.3, 0.5, 1, 0.6, 0])
    sideways = degrees(rng, 12, 28) * working if kind == "side" else 0.06 * working
    figure.pelvis(-lean_back, -side * degrees(rng, 0, 18) * working, side * sideways * 0.6)
    kicking = FootPath(side * x + shift * 0.3, z, y, yaw, np.radians(20) * np.sin(np.pi * working) ** 2)
    standing = FootPath(-side * stand_in + shift, 0.0, 0.0, -side * degrees(rng, 5, 25))
    figure.legs(tall - 0.012, *((kicking, standing) if side == LEFT else (standing, kicking)))
    # While the leg is up its foot follows the shin, toes pointed or pulled up.
    foot = about(X, figure.series(degrees(rng, -15, 30)))
    ankle = joint("ankle", side)
    figure.local[:, ankle] = slerp(figure.local[:, ankle], foot, smoothstep((y - 0.1) / 0.2))
    figure.spine(0.9 * lean_back + degrees(rng, 0, 10), side * degrees(rng, 0, 25) * working, -side * 0.3 * sideways)
    figure.head(degrees(rng, 0, 12) * working, drift(rng, t, np.radians(10)), 0.0)
    guard = rng.random() < 0.5
    for arm in SIDES:
        against = 1.0 if arm == -side else -0.6
        forward = degrees(rng, 10, 25) + against * degrees(rng, 10, 45) * working
        if guard:
            figure.hang_arm(arm, degrees(rng, 25, 45) + 0.2 * forward, degrees(rng, 72, 84), degrees(rng, 100, 128))
        else:
            down = degrees(rng, 68, 78) - degrees(rng, 0, 35) * working
            figure.hang_arm(arm, forward, down, degrees(rng, 15, 45), degrees(rng, -15, 15))


def jump(figure: Figure, rng: Generator) -> None:
    """Crouch, jump 8 to 45 cm high (on the spot or forward), fly as gravity has it, and land softly."""
    rise = rng.uniform(0.08, 0.45)
    take_off_speed = float(np.sqrt(2 * GRAVITY * rise))
    flight_s = 2 * take_off_speed / GRAVITY
    forward = rng.uniform(0.0, 1.6) if rng.random() < 0.5 else 0.0
    tall = figure.skeleton.standing_height
    heel = degrees(rng, 35, 50)
    at_off = tall + 0.045  # on the balls of the feet
    low, landing = tall - rng.uniform(0.15, 0.4), tall - rng.uniform(0.12, 0.35)
    push_s = 2.2 * (at_off - low) / take_off_speed
    marks = np.cumsum([0, rng.uniform(0.3, 0.5), push_s, flight_s, rng.uniform(0.16, 0.24), rng.uniform(0.4, 0.6)])
    heights = [tall - 0.02, low, at_off, at_off, landing, tall - 0.02]
    slopes = [0.0, 0.0, take_off_speed, -take_off_speed, 0.0, 0.0]
    now = cycle(rng, figure.t, float(marks[-1] + rng.uniform(0.0, 0.5)))
    clamped = np.clip(now, 0, marks[-1])
    height = CubicHermiteSpline(marks, heights, slopes)(clamped)
    flown = np.clip((now - marks[2]) / flight_s, 0.0, 1.0)
    tuck = rng.uniform(0.0, 0.3) * min(1.0, rise / 0.25)
    foot_height = np.where((flown > 0) & (flown < 1), height - at_off + tuck * np.sin(np.pi * flown) ** 2, 0.0)
    pushing = keyed(now, [marks[1], marks[2], marks[3], marks[3] + 0.1], [0.0, 1.0, 1.0, 0.0])
    pitch = heel * smoothstep((pushing - 0.4) / 0.6)
    bent = np.clip((tall - height) / 0.35, 0.0, 1.0) * (1 - np.sin(np.pi * flown))
    bow = degrees(rng, 20, 45) * bent + degrees(rng, 0, 30) * (tuck / 0.3) * np.sin(np.pi * flown) ** 2
    stance = Stance.random(rng, rng.uniform(0.08, 0.16), 0.04, degrees(rng, 2, 14))
    behind = 0.12 * bent - forward * 0.11 * keyed(
        now, [0.0, marks[1], marks[2], 0.5 * (marks[2] + marks[3]), marks[3], marks[-1]], [0, 0, 1, 0, -1, 0]
    )
    figure.pelvis(bow, 0.0, 0.0)
    paths = []
    for side in SIDES:
        i = SIDES.index(side)
        paths.append(FootPath(stance.x[i], stance.z[i] + behind, foot_height, stance.yaw[i], pitch))
    figure.legs(height, *paths)
    figure.lift = foot_height
    figure.flight_velocity = figure.flight_velocity + np.array((0.0, 0.0, forward))
    figure.spine(0.5 * bow, drift(rng, figure.t, np.radians(3)), 0.0)
    figure.head(-0.9 * bow, drift(rng, figure.t, np.radians(8)), 0.0)
    back, up = degrees(rng, 15, 50), degrees(rng, 30, 160)
    swing_marks = [0.0, marks[1], marks[2] + 0.3 * flight_s, marks[3], marks[4], marks[-1]]
    swing = keyed(now, swing_marks, [0.05, -back, up, 0.7 * up, 0.25 * up, 0.05])
    bend = keyed(now, swing_marks, [0.2, 0.35, degrees(rng, 10, 60), 0.4, 0.5, 0.2])
    down = degrees(rng, 70, 80)
    for side in SIDES:
        figure.hang_arm(side, swing * rng.uniform(0.85, 1.15), down, bend, degrees(rng, -10, 10))
