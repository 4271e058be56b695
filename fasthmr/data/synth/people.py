"""How synthetic people look: skin, hair and clothes, painted on a body's T pose and evaluated at every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch

from fasthmr.body import BodyModel
from fasthmr.conventions import HEAD, JOINT_INDEX, NUM_BETAS

# RGB in [0,1] as stored (display values); they are made linear when a look is drawn.
_SKIN = (
    (0.94, 0.78, 0.68), (0.87, 0.67, 0.53), (0.76, 0.55, 0.40), (0.60, 0.42, 0.30), (0.45, 0.31, 0.23),
    (0.34, 0.24, 0.18),
)  # fmt: skip
_HAIR = (
    (0.08, 0.06, 0.05), (0.13, 0.08, 0.06), (0.23, 0.15, 0.09), (0.38, 0.24, 0.13), (0.66, 0.50, 0.29),
    (0.55, 0.53, 0.50), (0.42, 0.18, 0.09),
)  # fmt: skip
#: what most people wear: black, greys, white, navy, denim, beige, olive, brown, wine
_CLOTH = (
    (0.09, 0.09, 0.10), (0.25, 0.25, 0.27), (0.50, 0.50, 0.52), (0.93, 0.93, 0.91), (0.11, 0.14, 0.28),
    (0.25, 0.36, 0.54), (0.78, 0.71, 0.58), (0.34, 0.36, 0.22), (0.36, 0.24, 0.17), (0.43, 0.11, 0.16),
)  # fmt: skip
_DISPLAY_GAMMA = 2.0

# Where things are on the free body's mean T pose, metres (y up).
_SHOULDER_X = 0.18
_CHIN_Y, _BROW_Y, _ANKLE_Y = 0.455, 0.60, -0.92
_NECKLINE_Y, _NECKLINE_RADIUS, _NECK_Z = 0.30, 0.078, -0.025
_EYE = (0.030, 0.566, 0.075)
_MOUTH_Y = 0.507
_BALD = 0.65
#: heights and half-widths of its joints, by which other bodies are matched to it; the floor and the middle come first
_JOINTS_Y = ("left_ankle", "left_knee", "left_hip", "left_shoulder", "neck", "head", "head_top")
_JOINTS_X = ("left_shoulder", "left_elbow", "left_wrist", "left_middle_tip")
_LEVELS_Y = (-1.018, -0.942, -0.508, -0.129, 0.350, 0.429, 0.501, 0.678)
_LEVELS_X = (0.0, 0.179, 0.437, 0.669, 0.857)
_HEAD_Z = -0.020

PLAIN, STRIPES, CHECKS, BLOTCHES = range(4)
#: rows of `Appearance.colors`; rows from CLOTH_ROW on wrinkle, and a pattern's second colour follows its first
SKIN_ROW, HAIR_ROW, CLOTH_ROW, SHIRT2_ROW, TROUSERS_ROW, TROUSERS2_ROW, SHOES_ROW = range(7)
SHIRT_ROW = CLOTH_ROW
#: entries of `Appearance.numbers`: where sleeves, trouser legs, shirt and hair end (metres on the T pose), the patterns
#: of shirt and trousers, how fine they are (1/m), and how deep the cloth's folds
SLEEVE, LEG, WAIST, HAIR, SHIRT_KIND, TROUSERS_KIND, FREQUENCY, FOLDS = range(8)


@dataclass(frozen=True)
class Appearance:
    """One look: `colors` (7,3) float32 linear RGB in [0,1], `numbers` (8,) float32 the measures of the clothes."""

    colors: np.ndarray
    numbers: np.ndarray


def random_appearance(rng: np.random.Generator) -> Appearance:
    """Draw skin, hair and clothes."""
    tone = rng.integers(len(_SKIN))
    skin = _varied(rng, _SKIN[tone], 0.04)
    # Dark skin and fair hair seldom come together, but everybody may go grey.
    hair = _varied(rng, _HAIR[rng.integers(len(_HAIR) if tone < 3 or rng.uniform() < 0.1 else 3)], 0.06)
    shirt, trousers = random_cloth_color(rng), random_cloth_color(rng)
    shirt2, trousers2 = random_cloth_color(rng), random_cloth_color(rng)
    shoes = _varied(rng, _CLOTH[rng.integers(len(_CLOTH))], 0.05)
    numbers = np.zeros(8, np.float32)
    sleeves = [_SHOULDER_X + 0.02, rng.uniform(0.28, 0.40), rng.uniform(0.55, 0.645)]  # none, short, long
    legs = [rng.uniform(-0.45, -0.33), rng.uniform(-0.70, -0.52), -0.91]
    numbers[SLEEVE] = rng.choice(sleeves, p=[0.12, 0.48, 0.40])
    numbers[LEG] = rng.choice(legs, p=[0.2, 0.15, 0.65])
    numbers[WAIST] = rng.uniform(-0.14, 0.02)
    numbers[HAIR] = rng.choice([0.36, 0.44, 0.50, 0.56, _BALD], p=[0.2, 0.2, 0.25, 0.28, 0.07])
    numbers[SHIRT_KIND] = rng.choice(4, p=[0.5, 0.2, 0.15, 0.15])
    numbers[TROUSERS_KIND] = rng.choice(4, p=[0.76, 0.08, 0.08, 0.08])
    numbers[FREQUENCY], numbers[FOLDS] = rng.uniform(18, 80), rng.uniform(0.05, 0.2)
    display = np.array([skin, hair, shirt, shirt2, trousers, trousers2, shoes])
    return Appearance((display**_DISPLAY_GAMMA).astype(np.float32), numbers)


def random_thing_appearance(rng: np.random.Generator) -> Appearance:
    """Draw the look of a thing: a colour, and often a pattern in a second one."""
    colors = np.zeros((7, 3))
    colors[0], colors[1] = random_cloth_color(rng), random_cloth_color(rng)
    numbers = np.zeros(8, np.float32)
    numbers[SHIRT_KIND], numbers[FREQUENCY] = rng.choice(4, p=[0.4, 0.25, 0.15, 0.2]), rng.uniform(6, 40)
    return Appearance((colors**_DISPLAY_GAMMA).astype(np.float32), numbers)


def random_cloth_color(rng: np.random.Generator) -> np.ndarray:
    """Display RGB (3,): mostly what is worn most, sometimes anything."""
    if rng.uniform() < 0.6:
        return _varied(rng, _CLOTH[rng.integers(len(_CLOTH))], 0.06)
    return _hsv(rng.uniform(), rng.uniform(0.1, 0.75), rng.uniform(0.2, 0.95))


def paint_coordinates(body: BodyModel) -> np.ndarray:
    """(V,3) float32: where each vertex would be on the free body's mean T pose, for any body in SMPL's format.

    Looks are described by places on the free body. Heights and half-widths of another body are stretched piecewise, so
    that its joints come to the same places.
    """
    betas = torch.zeros(1, NUM_BETAS)
    vertices = body.rest_vertices(betas)[0].numpy().astype(np.float64)
    joints = body.rest_joints(betas)[0].numpy().astype(np.float64)
    heights = [joints[JOINT_INDEX[name], 1] for name in _JOINTS_Y]
    widths = [joints[JOINT_INDEX[name], 0] for name in _JOINTS_X]
    side = np.abs(vertices[:, 0])
    return np.stack(
        [
            np.sign(vertices[:, 0]) * np.interp(side, [0.0, *widths], _LEVELS_X),
            np.interp(vertices[:, 1], [vertices[:, 1].min(), *heights], _LEVELS_Y),
            vertices[:, 2] - joints[HEAD, 2] + _HEAD_Z,
        ],
        axis=1,
    ).astype(np.float32)


def wrinkles(paint_on: np.ndarray) -> np.ndarray:
    """(V,) float32 in [-1,1]: where cloth is lit more or less because it wrinkles."""
    x, y, z = paint_on.T
    return (np.sin(x * 31 + 3 * np.sin(y * 23)) * np.sin(y * 27 + 2 * np.sin(z * 33))).astype(np.float32)


def _varied(rng: np.random.Generator, color: tuple[float, ...], spread: float) -> np.ndarray:
    return np.clip(np.array(color) * rng.uniform(0.85, 1.15) * (1 + rng.normal(0, spread, 3)), 0.02, 1)


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    wave = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return value * (1 - saturation + saturation * np.clip(wave, 0, 1))


@numba.njit(cache=True, nogil=True, inline="always")
def _bent_wave(a: int, p: np.float32, b: int, q: np.float32) -> np.float32:
    return np.sin(np.float32(a) * p + np.float32(2) * np.sin(np.float32(b) * q))


@numba.njit(cache=True, nogil=True)
def _pattern(kind: int, x: np.float32, y: np.float32, z: np.float32, frequency: np.float32) -> np.float32:
    """How much of the second colour a point of the cloth has, in [0,1]; edges are soft, so that they do not flicker."""
    if kind == STRIPES:
        wave = np.sin(np.float32(3) * frequency * y) - np.float32(0.3)
    elif kind == CHECKS:
        wave = np.sin(np.float32(2) * frequency * y) * np.sin(np.float32(2) * frequency * (x + z))
    elif kind == BLOTCHES:
        wave = _bent_wave(37, x, 29, y) + _bent_wave(41, y, 31, z) - np.float32(0.4)
    else:
        return np.float32(0)
    return min(np.float32(1), max(np.float32(0), np.float32(0.5) + np.float32(2) * wave))


@numba.njit(cache=True, nogil=True)
def surface_color(
    x: np.float32, y: np.float32, z: np.float32, is_thing: bool, numbers: np.ndarray
) -> tuple[int, np.float32, np.float32]:
    """What a point of the T pose looks like.

    Returns:
        A row of `Appearance.colors`, how much of the next row is mixed in, in [0,1], and a factor on both.
    """
    none, one = np.float32(0), np.float32(1)
    frequency = numbers[FREQUENCY]
    if is_thing:
        return 0, _pattern(int(numbers[SHIRT_KIND]), x, y, z, frequency), one
    side = abs(x)
    if side < 0.15 and y > _CHIN_Y - 0.02:
        row, factor = _head_color(side, y, z, numbers[HAIR])
        return row, none, factor
    if y > numbers[HAIR] and z < -0.055 and side < 0.07 and numbers[HAIR] < _CHIN_Y - 0.05:
        return HAIR_ROW, none, one  # long hair covers the back of the neck
    if y > _NECKLINE_Y and side * side + (z - _NECK_Z) * (z - _NECK_Z) < _NECKLINE_RADIUS * _NECKLINE_RADIUS:
        return SKIN_ROW, none, one
    if side > numbers[SLEEVE]:
        return SKIN_ROW, none, one
    if y > numbers[WAIST] or side > 0.22:
        return SHIRT_ROW, _pattern(int(numbers[SHIRT_KIND]), x, y, z, frequency), one
    if y < _ANKLE_Y:
        return SHOES_ROW, none, one
    if y > numbers[LEG]:
        return TROUSERS_ROW, _pattern(int(numbers[TROUSERS_KIND]), x, y, z, frequency * np.float32(0.7)), one
    return SKIN_ROW, none, one


@numba.njit(cache=True, nogil=True)
def _head_color(side: np.float32, y: np.float32, z: np.float32, hair: np.float32) -> tuple[int, np.float32]:
    """Row and factor of `surface_color` on head and face; `hair`: how far down the back of the head it grows."""
    one, zero = np.float32(1), np.float32(0)
    if z > 0.04:
        dx, dy = side - _EYE[0], y - _EYE[1]
        if dx * dx + 2 * dy * dy < 0.00013:
            return SKIN_ROW, np.float32(0.06) if dx * dx + dy * dy < 0.00004 else np.float32(1.5)
        if abs(dx) < 0.018 and abs(dy - 0.021 + 6 * dx * dx) < 0.004:
            return HAIR_ROW, one  # brows
        if side < 0.024 and abs(y - _MOUTH_Y) < 0.007 - 8 * side * side:
            return SKIN_ROW, np.float32(0.6)
    if hair < _BALD:
        strands = np.float32(0.85) + np.float32(0.3) * np.float32(abs(np.sin(side * 260 + 9 * np.sin(z * 70 + y * 40))))
        edge = np.float32(0.006) * np.float32(np.sin(side * 170) + np.sin(z * 140 + y * 90))
        if y + edge > _BROW_Y + 0.02 - 0.25 * max(zero, z - np.float32(0.06)) and (z < 0.10 or y > 0.632):
            return HAIR_ROW, strands
        if z + edge < 0.015 and y + edge > hair + 0.3 * max(zero, z + np.float32(0.05)):
            return HAIR_ROW, strands
    return SKIN_ROW, one
