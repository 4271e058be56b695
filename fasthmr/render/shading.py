"""Light and lens of the renderer: textures, shadows cast by a sun, the tone curve, and a sensor's blur and noise."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numba
import numpy as np

from fasthmr.render.raster import Fragments, rasterize

NOISE_PX = 512  # a power of two, so that wrapping is a mask
TONE_STEPS = 1024
#: linear light that maps to white; `tone_curve` covers 0 to this
WHITE = 1.25
_SHADOW_PX = 320
_SHADOW_MARGIN_PX = 6
_SUN_DISTANCE_M = 20.0


class Sunlight(NamedTuple):
    """`direction` (3,) unit, towards the sun, world; `sun` and `sky` (3,) linear RGB factors; `tone`: `tone_curve`."""

    direction: np.ndarray
    sun: np.ndarray
    sky: np.ndarray
    tone: np.ndarray


class ShadowMap(NamedTuple):
    """The scene as the sun sees it.

    `distance` (S,S) along the light to the first surface; `covered` (S,S) in [0,1] what lies in its shadow behind it,
    soft-edged; `from_world` (3,4) maps a point (x,y,z,1) in the world to texel column, row and distance along the
    light; `offset_m` is how far a point must be moved along its normal so that it does not shade itself.
    """

    distance: np.ndarray
    covered: np.ndarray
    from_world: np.ndarray
    offset_m: np.float32


def tone_curve(gamma: float) -> np.ndarray:
    """(TONE_STEPS,) float32 stored values 0 to 255 for linear light from 0 to WHITE."""
    return (255 * np.clip(np.linspace(0, WHITE, TONE_STEPS), 0, 1) ** (1 / gamma)).astype(np.float32)


def cast_shadows(
    vertices: np.ndarray, faces: np.ndarray, towards_sun: np.ndarray, softness_m: float, into: Fragments
) -> ShadowMap:
    """Look at a scene from the sun.

    Args:
        vertices: (V,3) float32, world.
        faces: (F,3) int32.
        towards_sun: (3,) unit; not straight up.
        softness_m: width of a shadow's edge on the ground.
        into: square fragments to draw into; overwritten.
    """
    forward = -towards_sun
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(forward, right), forward])
    seen = vertices @ axes.T.astype(np.float32)
    side = len(into.face)
    low, high = seen.min(0).astype(np.float64), seen.max(0).astype(np.float64)
    margin_m = 3 * softness_m  # the blurred edge needs room
    per_m = (side - 2 * _SHADOW_MARGIN_PX) / max(float((high - low)[:2].max()) + 2 * margin_m, 0.1)
    from_world = np.zeros((3, 4))
    from_world[:2, :3] = per_m * axes[:2]
    from_world[:2, 3] = _SHADOW_MARGIN_PX + per_m * (margin_m - low[:2])
    from_world[2, :3] = axes[2]
    from_world[2, 3] = _SUN_DISTANCE_M - low[2]
    into.clear()
    rasterize((vertices @ from_world[:, :3].T + from_world[:, 3]).astype(np.float32), faces, side, side, into)
    distance = np.full((side, side), np.inf, np.float32)
    np.divide(1, into.inverse_depth, out=distance, where=into.face >= 0)
    covered = cv2.GaussianBlur((into.face >= 0).astype(np.float32), (0, 0), max(0.6, softness_m * per_m))
    return ShadowMap(distance, covered, from_world.astype(np.float32), np.float32(0.006 + 1.5 / per_m))


def shadow_fragments() -> Fragments:
    """Fragments of the size that `cast_shadows` draws into."""
    return Fragments.empty(_SHADOW_PX, _SHADOW_PX)


@numba.njit(cache=True, nogil=True, inline="always")
def _mix(values: np.ndarray, u: np.float32, v: np.float32) -> np.float32:
    """Bilinear sample of (H,W) at column u and row v, which must be inside."""
    x, y = int(u), int(v)
    fx, fy = u - np.float32(x), v - np.float32(y)
    one = np.float32(1)
    top = values[y, x] * (one - fx) + values[y, x + 1] * fx
    bottom = values[y + 1, x] * (one - fx) + values[y + 1, x + 1] * fx
    return top * (one - fy) + bottom * fy


@numba.njit(cache=True, nogil=True)
def ground_shade(shadow: ShadowMap, x: np.float32, z: np.float32) -> np.float32:
    """How much of the sun is hidden at (x, 0, z) on the ground, in [0,1]."""
    m = shadow.from_world
    u, v = m[0, 0] * x + m[0, 2] * z + m[0, 3], m[1, 0] * x + m[1, 2] * z + m[1, 3]
    side = shadow.covered.shape[0]
    if u < 0 or v < 0 or u >= side - 1 or v >= side - 1:
        return np.float32(0)
    return _mix(shadow.covered, u, v)


@numba.njit(cache=True, nogil=True)
def surface_shade(shadow: ShadowMap, x: np.float32, y: np.float32, z: np.float32) -> np.float32:
    """How much of the sun is hidden at a point of a surface, moved off it by `offset_m`, in [0,1]."""
    m = shadow.from_world
    u = m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3]
    v = m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3]
    depth = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3] - shadow.offset_m
    side = shadow.distance.shape[0]
    if u < 1 or v < 1 or u >= side - 2 or v >= side - 2:
        return np.float32(0)
    column, row = int(u), int(v)
    one = np.float32(1)
    fu, fv = u - np.float32(column), v - np.float32(row)
    # Two by two comparisons around the point, weighted bilinearly: edges without steps.
    d = shadow.distance
    top = (one - fu) * (d[row, column] < depth) + fu * (d[row, column + 1] < depth)
    bottom = (one - fu) * (d[row + 1, column] < depth) + fu * (d[row + 1, column + 1] < depth)
    return top * (one - fv) + bottom * fv


def shrunken(texture: np.ndarray) -> np.ndarray:
    """A square texture (S,S,3), S a power of two, and below it itself at half, quarter ... size: (2S-1,S,3) uint8.

    Level k begins in row 2S - (2S >> k) and has the side S >> k. One array, because numba is slow with lists of them.
    """
    side = len(texture)
    levels = np.zeros((2 * side - 1, side, 3), np.uint8)
    row = 0
    while side:
        levels[row : row + side, :side] = cv2.resize(texture, (side, side), interpolation=cv2.INTER_AREA)
        row, side = row + side, side // 2
    return levels


@numba.njit(cache=True, nogil=True, inline="always")
def texel(levels: np.ndarray, level: int, u: np.float32, v: np.float32, out: np.ndarray) -> None:
    """Bilinear sample of one level of a `shrunken` texture, repeated, at its column u and row v; into `out` (3,)."""
    side = levels.shape[1]
    first, wrap = 2 * side - ((2 * side) >> level), (side >> level) - 1
    u0, v0 = np.floor(u), np.floor(v)
    fu, fv = u - u0, v - v0
    x0, y0 = int(u0) & wrap, first + (int(v0) & wrap)
    x1, y1 = (x0 + 1) & wrap, first + ((y0 - first + 1) & wrap)
    one = np.float32(1)
    a, b, c, d = (one - fu) * (one - fv), fu * (one - fv), (one - fu) * fv, fu * fv
    for k in range(3):
        out[k] = (
            a * np.float32(levels[y0, x0, k])
            + b * np.float32(levels[y0, x1, k])
            + c * np.float32(levels[y1, x0, k])
            + d * np.float32(levels[y1, x1, k])
        )


def sensor_noise(rng: np.random.Generator, std: float, grain_px: float) -> np.ndarray:
    """(NOISE_PX,NOISE_PX,3) float32 to add to stored values; `grain_px`: size of its grains, 0 for single pixels."""
    noise = rng.normal(0, 1, (NOISE_PX, NOISE_PX, 3)).astype(np.float32)
    if grain_px > 0.3:
        noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), grain_px), np.float32)
        noise /= noise.std()
    return np.float32(std) * noise


def expose(
    image: np.ndarray, blur_px: float, noise: np.ndarray, noise_at: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """What a camera makes of a picture (H,W,3) uint8: blurred, noisy, and black outside the sensor.

    Args:
        blur_px: standard deviation of the blur.
        noise: from `sensor_noise`; noise_at: (2,) rows and columns by which it is shifted.
        inside: (4,) first and last column and row that lie on the sensor.
    """
    blurred = cv2.GaussianBlur(image, (0, 0), blur_px) if blur_px > 0.25 else image.copy()
    _expose(blurred, noise, noise_at, inside)
    return blurred


@numba.njit(cache=True, nogil=True)
def _expose(image: np.ndarray, noise: np.ndarray, noise_at: np.ndarray, inside: np.ndarray) -> None:
    for y in range(image.shape[0]):
        row = (y + noise_at[0]) & (NOISE_PX - 1)
        for x in range(image.shape[1]):
            out = x < inside[0] or x > inside[1] or y < inside[2] or y > inside[3]
            column = (x + noise_at[1]) & (NOISE_PX - 1)
            for k in range(3):
                value = np.float32(0) if out else image[y, x, k] + noise[row, column, k] + np.float32(0.5)
                image[y, x, k] = np.uint8(min(np.float32(255), max(np.float32(0), value)))
