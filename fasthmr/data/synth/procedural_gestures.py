"""What the procedural library does with arms and trunk: reach, wave, dance, and ways of holding the arms."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from fasthmr.data.synth.procedural_figure import Figure, degrees, drift, keyed
from fasthmr.data.synth.procedural_gait import dance_steps
from fasthmr.data.synth.procedural_stance import Stance, cycle, relaxed_arms, stand
from fasthmr.data.synth.quaternions import Z, about
from fasthmr.data.synth.skeleton import LEFT, RIGHT, SIDES, joint

#: elbow direction (out, up, forward) of an arm in front of the body
ELBOW_DOWN = np.array((0.35, -1.0, -0.3))


def wave_arm(figure: Figure, rng: Generator, side: int) -> None:
    """Raise one hand above the shoulder and wave it."""
    beat = 2 * np.pi * (rng.uniform(1.0, 2.4) * figure.t + rng.random())
    high = rng.uniform(0.4, 0.85)
    centre = np.array((rng.uniform(0.1, 0.4), high, rng.uniform(0.12, 0.35)))
    span = rng.uniform(0.06, 0.22)
    wrist = centre + np.stack((span * np.sin(beat), 0.15 * span * np.cos(2 * beat), 0 * beat), axis=-1)
    shrug = np.radians(8) + 0.25 * high
    figure.add(joint("collar", side), about(Z, side * figure.series(shrug)))
    figure.put_hand(side, wrist, np.array((1.0, -0.6, -0.2)))
    figure.add(joint("wrist", side), about(Z, side * np.radians(rng.uniform(0, 25)) * np.sin(beat - 0.6)))


def hold_arm(figure: Figure, rng: Generator, side: int) -> None:
    """Keep one hand on the hip, chest, ear or head, hold it out, forward or up, or talk with it."""
    t = figure.t
    kind = rng.choice(("hip", "chest", "ear", "head", "out", "front", "talk", "up"))
    centre, elbow = {
        "hip": ((0.03, -0.78, 0.08), (1.0, 0.0, -0.7)),
        "chest": ((-0.35, -0.3, 0.42), (1.0, -0.6, 0.1)),
        "ear": ((-0.05, 0.32, 0.22), (0.5, -1.0, 0.3)),
        "head": ((-0.2, 0.55, 0.05), (1.0, 0.1, 0.2)),
        "out": ((0.9, 0.1, 0.25), (0.1, -1.0, -0.4)),
        "front": ((0.0, -0.1, 0.85), (0.5, -1.0, 0.0)),
        "talk": ((0.05, -0.4, 0.55), (0.6, -1.0, -0.4)),
        "up": ((0.15, 0.95, 0.1), (1.0, 0.0, 0.4)),
    }[str(kind)]
    wide = {"talk": 0.16, "out": 0.2, "front": 0.15, "up": 0.12}.get(str(kind), 0.02)
    quick = 1.2 if kind == "talk" else 0.5
    wrist = np.stack([c + rng.uniform(-0.4, 0.4) * wide + drift(rng, t, wide, 0.1, quick) for c in centre], axis=-1)
    figure.put_hand(side, wrist, np.array(elbow) + rng.uniform(-0.15, 0.15, 3))


def wave(figure: Figure, rng: Generator) -> None:
    """Stand and wave with one hand, sometimes with both."""
    stand(figure, rng)
    side = int(rng.choice(SIDES))
    wave_arm(figure, rng, side)
    if rng.random() < 0.2:
        wave_arm(figure, rng, -side)


def reach(figure: Figure, rng: Generator) -> None:
    """Reach with one hand or both for something high, low, near or far, and come back."""
    t = figure.t
    period = rng.uniform(2.2, 4.5)
    now = cycle(rng, t, period) / period
    out = keyed(now, [0.0, 0.3, rng.uniform(0.45, 0.6), 0.9, 1.0], [0, 1, 1, 0, 0])
    side = int(rng.choice(SIDES))
    azimuth, elevation = degrees(rng, -35, 100), degrees(rng, -65, 75)
    low = max(0.0, -elevation / np.radians(65))
    stance = Stance.random(rng, rng.uniform(0.09, 0.2), 0.25, degrees(rng, 3, 15))
    azimuth *= 1 - 0.5 * low
    most = 0.15 + degrees(rng, 30, 60) * low
    bow = most * out
    figure.pelvis(bow, 0.25 * side * azimuth * out, 0.0)
    dip = rng.uniform(0.02, 0.3) * low
    height = figure.skeleton.standing_height - 0.03 - 0.3 * max(stance.x) ** 2 - dip * out
    # The hips go back as the trunk bows.
    forward = (0.18 * np.sin(bow) + 0.25 * dip) * out
    figure.legs(height, stance.path(LEFT, 0.0, forward), stance.path(RIGHT, 0.0, forward))
    turned = side * azimuth * 0.35 * out
    figure.spine(0.05 + 0.8 * bow - 0.15 * np.maximum(elevation, 0) * out, turned, -side * 0.12 * out)
    figure.head(-0.4 * elevation * out - 0.4 * bow, 0.5 * turned + drift(rng, t, 0.1), 0.0)
    relaxed_arms(figure, rng)
    far = rng.uniform(0.7, 1.0)
    arms = [side] if rng.random() < 0.65 else [side, -side]
    for arm in arms:
        across = azimuth * 0.6 if len(arms) == 1 else degrees(rng, -5, 20)
        # The chest bows with the trunk, and the target is given in its frame.
        from_chest = min(elevation + 1.4 * most, 1.35)
        level = np.cos(from_chest)
        target = far * np.array((np.sin(across) * level, np.sin(from_chest), np.cos(across) * level))
        wrist = target + np.stack([drift(rng, t, 0.05) for _ in range(3)], axis=-1)
        raise_collar = arm * out * (0.12 + 0.2 * max(0.0, float(np.sin(elevation))))
        figure.add(joint("collar", arm), about(Z, raise_collar))
        elbow = ELBOW_DOWN if from_chest > -0.6 else np.array((0.9, -0.2, -0.7))
        figure.put_hand(arm, wrist, elbow, out)


def dance(figure: Figure, rng: Generator) -> None:
    """Steps in time with arms, hips and trunk on harmonics of the beat."""
    hertz = rng.uniform(0.6, 1.15)
    beat = 2 * np.pi * dance_steps(figure, rng, hertz)

    def harmonics(amplitude: float) -> np.ndarray:
        """A periodic curve of the first three half-beats within `amplitude`."""
        share = rng.dirichlet((3.0, 3.0, 1.0))
        shifts = rng.uniform(0, 2 * np.pi, 3)
        return amplitude * sum(w * np.sin(k * beat + s) for w, k, s in zip(share, (0.5, 1, 2), shifts, strict=True))

    figure.spine(0.05 + harmonics(0.35), harmonics(0.55), harmonics(0.4))
    figure.head(harmonics(0.25), harmonics(0.5), harmonics(0.25))
    mirrored = rng.random() < 0.5
    centre, swing = rng.uniform((-0.1, -0.5, 0.4), (0.6, 0.7, 0.7)), rng.uniform((0.15, 0.2, 0.1), (0.45, 0.7, 0.3))
    curves = np.stack([c + harmonics(a) for c, a in zip(centre, swing, strict=True)], axis=-1)
    for side in SIDES:
        wrist = curves
        if not mirrored and side == RIGHT:
            wrist = np.stack([c + harmonics(a) for c, a in zip(centre, swing, strict=True)], axis=-1)
        wrist = wrist * np.minimum(1.0, 0.97 / np.linalg.norm(wrist, axis=-1, keepdims=True))
        lifted = 0.12 + 0.25 * wrist[:, 1]
        figure.add(joint("collar", side), about(Z, side * lifted))
        figure.put_hand(side, wrist, np.array((0.7, -0.9, -0.9)))
