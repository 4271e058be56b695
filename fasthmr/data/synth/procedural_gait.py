"""Stepping actions of the procedural library: walk, run, turn, and the steps under a dance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from fasthmr.data.synth.procedural_figure import Figure, FootPath, degrees, drift, smoothstep
from fasthmr.data.synth.quaternions import Array
from fasthmr.data.synth.skeleton import LEFT, RIGHT


@dataclass(frozen=True)
class Gait:
    """A way of stepping. Each foot stands still on the floor for `duty` of a stride, then swings to its next place.

    Attributes:
        hertz: strides (two steps) a second.
        duty: share of a stride in which a foot is on the floor; below 0.5 the body flies between steps.
        speed, sideways: metres a second forward and to the left.
        yaw_rate: radians a second to the left.
        half_width, splay: half the distance of the feet in metres, and how far the toes point outwards in radians.
        clearance: metres a foot is lifted when it swings; heel_first: whether the heel lands before the ball.
        push_off: radians the heel is lifted when the foot leaves the floor.
        trail: metres by which the feet touch down nearer to the pelvis than they leave the floor behind it, halved.
        crouch: metres the pelvis is below where the legs would be straight; bob: metres it moves up and down.
        sway, twist, list_: sideways shift (m), turn and tilt of the pelvis (radians) with every stride.
    """

    hertz: float
    duty: float
    speed: float
    sideways: float
    yaw_rate: float
    half_width: float
    splay: float
    clearance: float
    heel_first: bool
    push_off: float
    trail: float
    crouch: float
    bob: float
    sway: float
    twist: float
    list_: float


def step(figure: Figure, gait: Gait, phase: Array, bow: float) -> None:
    """Put the legs of `figure` into `gait`; `phase` (T,) counts strides, 0 when the left foot touches down."""
    beat = 2 * np.pi * phase
    # Shifted towards the standing foot: furthest left in the middle of the left foot's stance.
    sway = gait.sway * np.cos(beat - np.pi * gait.duty)
    figure.pelvis(bow, -gait.twist * np.cos(beat), -gait.list_ * np.cos(beat - np.pi * gait.duty))
    left = _foot_path(gait, np.mod(phase, 1.0), LEFT, sway)
    right = _foot_path(gait, np.mod(phase + 0.5, 1.0), RIGHT, sway)
    # A walker is highest over the standing foot, a runner lowest.
    rhythm = np.cos(2 * (beat - np.pi * gait.duty))
    height = figure.skeleton.standing_height - gait.crouch + gait.bob * (rhythm if gait.duty > 0.5 else -rhythm)
    figure.legs(height, left, right)
    figure.yaw_rate = figure.yaw_rate + gait.yaw_rate
    figure.lift = figure.lift + np.minimum(figure.series(left.height), figure.series(right.height))
    figure.flight_velocity = figure.flight_velocity + np.array((gait.sideways, 0.0, gait.speed))


def _foot_path(gait: Gait, phase: Array, side: int, sway: Array) -> FootPath:
    stance = phase / gait.duty
    swing = (phase - gait.duty) / (1 - gait.duty)
    on_floor = phase < gait.duty
    period = 1 / gait.hertz

    def there_and_back(rate: float) -> Array:
        """Offset whose rate of change on the floor is exactly -rate, and which returns with the same slope."""
        half = 0.5 * rate * gait.duty * period
        slope = -rate * (1 - gait.duty) * period
        w = np.clip(swing, 0.0, 1.0)
        back = half * (4 * w**3 - 6 * w**2 + 1) * -1 + slope * (2 * w**3 - 3 * w**2 + w)
        return np.where(on_floor, half * (1 - 2 * stance), back)

    yaw = there_and_back(gait.yaw_rate)
    x = side * gait.half_width * np.cos(yaw) + there_and_back(gait.sideways) - sway
    z = -side * gait.half_width * np.sin(yaw) + there_and_back(gait.speed) - gait.trail
    w = np.clip(swing, 0.0, 1.0)
    height = np.where(on_floor, 0.0, gait.clearance * np.sin(np.pi * w**0.8) ** 2)
    landing = np.radians(-14) if gait.heel_first else 0.0
    # The heel rises in the last third of the stance; in the swing the toes come up and the foot gets ready to land.
    lifted = gait.push_off * smoothstep((stance - 0.62) / 0.55)
    at_off = gait.push_off * float(smoothstep(np.array(0.38 / 0.55)))
    slope_off = gait.push_off * 6 * (0.38 / 0.55) * (1 - 0.38 / 0.55) / 0.55 / gait.duty * (1 - gait.duty)
    falling = at_off * (1 - smoothstep(w / 0.8)) + slope_off * w * (1 - np.clip(w / 0.5, 0, 1)) ** 2
    reaching = landing * smoothstep((w - 0.55) / 0.45)
    rolled = landing * (1 - smoothstep(stance / 0.22))
    pitch = np.where(on_floor, lifted + rolled, falling + reaching)
    return FootPath(x, z, height, yaw + side * gait.splay, pitch)


def swing_arms(figure: Figure, rng: Generator, phase: Array, swing: float, bend: float, bend_more: float) -> None:
    """Arms that swing against the legs: the left one is in front when the right foot is."""
    down, forward, twist = degrees(rng, 70, 80), degrees(rng, -3, 8), degrees(rng, -25, 15)
    lag = rng.uniform(-0.04, 0.04)
    for side, shift in ((LEFT, 0.5), (RIGHT, 0.0)):
        wave = np.cos(2 * np.pi * (phase + shift + lag))
        uneven = rng.uniform(0.8, 1.2)
        figure.hang_arm(side, forward + uneven * swing * wave, down, bend + bend_more * (0.5 + 0.5 * wave), twist)


def walk(figure: Figure, rng: Generator) -> None:
    """Walk at 0.6 to 1.8 m/s (now and then backwards or sideways), straight or on a curve."""
    speed = rng.uniform(0.6, 1.8)
    hertz = float(0.42 + 0.34 * speed + rng.uniform(-0.07, 0.07))
    kind = rng.random()
    forward, sideways = speed, rng.uniform(-0.05, 0.05)
    if kind < 0.08:
        forward = -0.6 * speed
    elif kind < 0.16:
        forward, sideways = rng.uniform(-0.1, 0.1), rng.choice((-1, 1)) * rng.uniform(0.3, 0.6)
    gait = Gait(
        hertz=hertz,
        duty=rng.uniform(0.58, 0.64),
        speed=forward,
        sideways=sideways,
        yaw_rate=degrees(rng, -35, 35) if rng.random() < 0.6 else 0.0,
        half_width=rng.uniform(0.05, 0.10) + abs(sideways) * 0.18,
        splay=degrees(rng, 0, 12),
        clearance=rng.uniform(0.03, 0.09),
        heel_first=forward > 0.3,
        push_off=degrees(rng, 38, 52) * np.clip(forward / 1.2, 0.3, 1.0),
        trail=0.02 * forward,
        crouch=0.01 + 0.02 * (forward / hertz) ** 2 + rng.uniform(0.0, 0.015),
        bob=0.004 + 0.012 * (forward / hertz) ** 2,
        sway=rng.uniform(0.015, 0.035),
        twist=degrees(rng, 3, 8) * np.sign(forward),
        list_=degrees(rng, 2, 5),
    )
    phase = hertz * figure.t + rng.random()
    lean = degrees(rng, 0, 5)
    step(figure, gait, phase, lean)
    figure.spine(degrees(rng, -4, 8), 2 * gait.twist * np.cos(2 * np.pi * phase), 0.0)
    figure.head(drift(rng, figure.t, np.radians(8)) - lean, drift(rng, figure.t, np.radians(30)), 0.0)
    swing_arms(figure, rng, phase, degrees(rng, 8, 22) * speed, degrees(rng, 8, 25), degrees(rng, 0, 25))


def run(figure: Figure, rng: Generator) -> None:
    """Run at 2 to 4.5 m/s, with a flight between steps."""
    speed = rng.uniform(2.0, 4.5)
    hertz = float(1.15 + 0.09 * speed + rng.uniform(-0.08, 0.08))
    duty = float(0.46 - 0.035 * speed + rng.uniform(-0.02, 0.02))
    gait = Gait(
        hertz=hertz,
        duty=duty,
        speed=speed,
        sideways=0.0,
        yaw_rate=degrees(rng, -40, 40) if rng.random() < 0.5 else 0.0,
        half_width=rng.uniform(0.03, 0.07),
        splay=degrees(rng, 0, 8),
        clearance=rng.uniform(0.16, 0.22) + 0.05 * speed,
        heel_first=False,
        push_off=degrees(rng, 45, 60),
        trail=0.03 * speed,
        crouch=0.05 + 0.012 * speed + rng.uniform(0.0, 0.02),
        bob=rng.uniform(0.02, 0.035),
        sway=rng.uniform(0.005, 0.02),
        twist=degrees(rng, 5, 10),
        list_=degrees(rng, 2, 4),
    )
    phase = hertz * figure.t + rng.random()
    lean = degrees(rng, 4, 12)
    step(figure, gait, phase, lean)
    figure.spine(degrees(rng, 0, 10), 2.2 * gait.twist * np.cos(2 * np.pi * phase), 0.0)
    figure.head(-lean + drift(rng, figure.t, np.radians(6)), drift(rng, figure.t, np.radians(15)), 0.0)
    swing_arms(figure, rng, phase, degrees(rng, 28, 48), degrees(rng, 65, 95), degrees(rng, 0, 25))


def turn(figure: Figure, rng: Generator) -> None:
    """Turn on the spot or nearly so, 45 to 200 degrees a second, with small steps."""
    hertz = rng.uniform(0.8, 1.3)
    to_left = rng.choice((-1, 1))
    gait = Gait(
        hertz=hertz,
        duty=rng.uniform(0.6, 0.68),
        speed=rng.uniform(-0.1, 0.35),
        sideways=rng.uniform(-0.05, 0.05),
        yaw_rate=to_left * min(degrees(rng, 45, 200), np.radians(115) * hertz),
        half_width=rng.uniform(0.08, 0.14),
        splay=degrees(rng, 3, 14),
        clearance=rng.uniform(0.03, 0.08),
        heel_first=False,
        push_off=degrees(rng, 10, 25),
        trail=0.0,
        crouch=rng.uniform(0.02, 0.06),
        bob=rng.uniform(0.0, 0.012),
        sway=rng.uniform(0.02, 0.045),
        twist=0.0,
        list_=degrees(rng, 1, 4),
    )
    phase = hertz * figure.t + rng.random()
    step(figure, gait, phase, degrees(rng, 0, 4))
    leading = to_left * degrees(rng, 0, 22)
    figure.spine(degrees(rng, -3, 8), leading, drift(rng, figure.t, np.radians(4)))
    figure.head(drift(rng, figure.t, np.radians(10)), leading + drift(rng, figure.t, np.radians(15)), 0.0)
    swing_arms(figure, rng, phase, degrees(rng, 3, 14), degrees(rng, 10, 35), degrees(rng, 0, 15))


def dance_steps(figure: Figure, rng: Generator, hertz: float) -> Array:
    """Small steps in time, with the hips: returns the phase in strides."""
    gait = Gait(
        hertz=hertz,
        duty=rng.uniform(0.55, 0.7),
        speed=rng.uniform(-0.25, 0.25),
        sideways=rng.uniform(-0.25, 0.25),
        yaw_rate=degrees(rng, -90, 90) * float(rng.random() < 0.6),
        half_width=rng.uniform(0.10, 0.20),
        splay=degrees(rng, 5, 20),
        clearance=rng.uniform(0.02, 0.16),
        heel_first=False,
        push_off=degrees(rng, 15, 40),
        trail=0.0,
        crouch=rng.uniform(0.04, 0.12),
        bob=rng.uniform(0.01, 0.03),
        sway=rng.uniform(0.03, 0.08),
        twist=degrees(rng, 0, 18),
        list_=degrees(rng, 2, 9),
    )
    phase = hertz * figure.t + rng.random()
    step(figure, gait, phase, degrees(rng, -3, 8))
    return phase
