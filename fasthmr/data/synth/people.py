"""How synthetic people look: skin, hair and clothes, painted on the free body's T pose and evaluated at every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

#: skin from light to dark, hair, and a palette that clothes are varied from; RGB in [0,1]
_SKIN = ((0.94, 0.78, 0.68), (0.87, 0.67, 0.53), (0.76, 0.55, 0.40), (0.60, 0.42, 0.30), (0.43, 0.29, 0.20), (0.29, 0.19, 0.14))
_HAIR = ((0.08, 0.06, 0.05), (0.20, 0.12, 0.07), (0.38, 0.22, 0.11), (0.62, 0.45, 0.23), (0.55, 0.53, 0.50), (0.45, 0.16, 0.08))

# Where things are on the free body's mean T pose, metres (y up, pelvis near the origin).
_HAND_X, _ELBOW_X, _SHOULDER_X = 0.66, 0.44, 0.18
_NECK_Y, _CHIN_Y, _BROW_Y, _CROTCH_Y, _KNEE_Y, _ANKLE_Y = 0.40, 0.455, 0.60, -0.20, -0.50, -0.92
_EYE = (0.030, 0.566, 0.075)

PLAIN, STRIPES, CHECKS, BLOTCHES = range(4)
#: rows of `Appearance.colors`
_SKIN_ROW, _HAIR_ROW, _SHIRT_ROW, _SHIRT2_ROW, _TROUSERS_ROW, _TROUSERS2_ROW, _SHOES_ROW = range(7)


@dataclass(frozen=True)
class Appearance:
    """One person's look: `colors` (7,3) RGB in [0,1], `numbers` (8,) the measures of the clothes (see `random_appearance`)."""

    colors: np.ndarray
    numbers: np.ndarray


def random_appearance(rng: np.random.Generator) -> Appearance:
    """Draw skin, hair and clothes."""
    skin = _varied(rng, _SKIN[rng.integers(len(_SKIN))], 0.05)
    hair = _varied(rng, _HAIR[rng.integers(len(_HAIR))], 0.08)
    cloth = [_hsv(rng.uniform(), rng.uniform(0, 0.85), rng.uniform(0.12, 0.95)) for _ in range(4)]
    shoes = _hsv(rng.uniform(), rng.uniform(0, 0.5), rng.uniform(0.05, 0.9))
    colors = np.array([skin, hair, cloth[0], cloth[1], cloth[2], cloth[3], shoes], np.float32)
    sleeve = rng.choice([_SHOULDER_X + 0.02, rng.uniform(0.28, 0.40), rng.uniform(0.55, 0.645)], p=[0.12, 0.48, 0.40])
    leg = rng.choice([rng.uniform(-0.45, -0.33), rng.uniform(-0.70, -0.52), -0.91], p=[0.2, 0.15, 0.65])
    waist = rng.uniform(-0.10, 0.03)
    hair_low = rng.choice([0.40, 0.50, 0.56, 0.63], p=[0.25, 0.3, 0.3, 0.15])  # how far down the back of the head it grows
    patterns = rng.choice(4, size=2, p=[0.5, 0.2, 0.15, 0.15])
    numbers = np.array([sleeve, leg, waist, hair_low, patterns[0], patterns[1], rng.uniform(18, 90), rng.uniform(0.03, 0.14)], np.float32)
    return Appearance(colors, numbers)


def _varied(rng: np.random.Generator, color: tuple[float, ...], spread: float) -> np.ndarray:
    return np.clip(np.array(color) * rng.uniform(0.85, 1.15) * (1 + rng.normal(0, spread, 3)), 0.02, 1)


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    wave = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return value * (1 - saturation + saturation * np.clip(wave, 0, 1))


@numba.njit(cache=True, nogil=True, inline="always")
def _patterned(kind: int, x: float, y: float, z: float, frequency: float) -> bool:
    """Whether a point of the cloth has the second colour."""
    if kind == 1:
        return np.sin(y * frequency * 3) > 0.3
    if kind == 2:
        return (np.sin(y * frequency * 2) > 0) != (np.sin((x + z) * frequency * 2) > 0)
    if kind == 3:
        return np.sin(x * 37 + 2 * np.sin(y * 29)) + np.sin(y * 41 + 2 * np.sin(z * 31)) > 0.4
    return False


@numba.njit(cache=True, nogil=True, inline="always")
def surface_row(x: float, y: float, z: float, numbers: np.ndarray) -> int:
    """Row of `Appearance.colors` at a point of the T pose; -1 for an eye."""
    sleeve, leg, waist, hair_low, shirt_kind, trousers_kind, frequency = (
        numbers[0], numbers[1], numbers[2], numbers[3], int(numbers[4]), int(numbers[5]), numbers[6],
    )  # fmt: skip
    side = abs(x)
    if side < 0.15 and y > _CHIN_Y - 0.02:  # head
        dx, dy, dz = side - _EYE[0], y - _EYE[1], z - _EYE[2]
        if dx * dx + 2 * dy * dy < 0.00016 and dz > 0:
            return -1
        if y > _BROW_Y + 0.02 - 0.25 * max(0.0, z - 0.06) and (z < 0.10 or y > 0.625):
            return _HAIR_ROW
        if z < 0.015 and y > hair_low + 0.3 * max(0.0, z + 0.05):
            return _HAIR_ROW
        return _SKIN_ROW
    if y > _NECK_Y - 0.02 and side < 0.075:
        return _SKIN_ROW
    if side > sleeve:
        return _SKIN_ROW
    if y > waist or side > 0.22:
        return _SHIRT2_ROW if _patterned(shirt_kind, x, y, z, frequency) else _SHIRT_ROW
    if y < _ANKLE_Y:
        return _SHOES_ROW
    if y > leg:
        return _TROUSERS2_ROW if _patterned(trousers_kind, x, y, z, frequency * 0.7) else _TROUSERS_ROW
    return _SKIN_ROW
