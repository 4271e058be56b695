"""Paints the pixels of one frame: ground with shadows, then people and things, from what the rasteriser found."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from fasthmr.conventions import MASK_OTHER, MASK_SUBJECT
from fasthmr.data.synth.people import CLOTH_ROW, FOLDS, surface_color
from fasthmr.render.shading import TONE_STEPS, WHITE, ShadowMap, Sunlight, ground_shade, surface_shade, texel

#: the picture is rasterised at twice its size: pixel x shows samples 2x and 2x + 1
SAMPLES = 2
_SUBJECT_MESH, _OTHER_MESH = 0, 1
#: nearest and farthest sample of a pixel inside one surface differ less than this
_SAME_SURFACE = np.float32(1.01)
_TONE_SCALE = np.float32((TONE_STEPS - 1) / WHITE)


class Ground(NamedTuple):
    """The plane y = 0. `texture`: `shrunken`, repeated; `per_m`: texels of its full size per metre, 0 where the ground
    is not drawn (shadows still fall on it); `end` (3,): it reaches to where end[0] x + end[1] z = end[2]."""

    texture: np.ndarray
    per_m: np.float32
    end: np.ndarray


class Surfaces(NamedTuple):
    """All meshes of a frame together: mesh 0 is the subject, 1 the other person, the others are things.

    `faces` (F,3) int32; `first_face` (M+1,) where each mesh's faces begin, a mesh without any being absent; `vertices`
    and `normals` (V,3) float32, world; `rest` (V,4) float32, where patterns are painted, and the depth of wrinkles;
    `colors` (M,7,3) and `numbers` (M,8) float32, from `people.Appearance`.
    """

    faces: np.ndarray
    first_face: np.ndarray
    vertices: np.ndarray
    normals: np.ndarray
    rest: np.ndarray
    colors: np.ndarray
    numbers: np.ndarray


@numba.njit(cache=True, nogil=True)
def paint_ground(
    image: np.ndarray,
    face: np.ndarray,
    ray_from_pixel: np.ndarray,
    camera: np.ndarray,
    ground: Ground,
    shadow: ShadowMap,
    shadow_strength: float,
) -> None:
    """Paint the ground over the far picture.

    Args:
        image: (H,W,3) uint8, the far picture; changed in place.
        face: (2H,2W) from the rasteriser; pixels that meshes hide wholly are left alone.
        ray_from_pixel: (3,3) float32, pixel (x, y, 1) -> ray in the world, of length 1 on the optical axis.
        camera: (3,) float32, world.
        shadow_strength: in [0,1], how dark a full shadow is.
    """
    height, width = image.shape[:2]
    color = np.zeros(3, np.float32)
    m = ray_from_pixel
    one = np.float32(1)
    strength = np.float32(shadow_strength)
    texture = ground.texture
    step = np.sqrt(m[0, 0] ** 2 + m[1, 0] ** 2 + m[2, 0] ** 2)  # metres a pixel at 1 m
    smallest = int(np.log2(ground.texture.shape[1]))
    for y in range(height):
        fy = np.float32(y)
        for x in range(width):
            if (
                face[2 * y, 2 * x] >= 0
                and face[2 * y, 2 * x + 1] >= 0
                and face[2 * y + 1, 2 * x] >= 0
                and face[2 * y + 1, 2 * x + 1] >= 0
            ):
                continue
            fx = np.float32(x)
            dy = m[1, 0] * fx + m[1, 1] * fy + m[1, 2]
            if dy > np.float32(-1e-4):
                continue
            dx, dz = m[0, 0] * fx + m[0, 1] * fy + m[0, 2], m[2, 0] * fx + m[2, 1] * fy + m[2, 2]
            reach = -camera[1] / dy
            gx, gz = camera[0] + reach * dx, camera[2] + reach * dz
            if ground.end[0] * gx + ground.end[1] * gz > ground.end[2]:
                continue
            dark = one - strength * ground_shade(shadow, gx, gz)
            if ground.per_m > 0:
                # A pixel covers more of the ground along the view than across it, by `slant`; the blur is in between.
                slant = np.sqrt(dx * dx + dy * dy + dz * dz) / -dy
                texels = ground.per_m * step * reach * np.sqrt(slant * np.sqrt(slant))
                level, scale = 0, ground.per_m
                while texels > one and level < smallest:
                    texels *= np.float32(0.5)
                    scale *= np.float32(0.5)
                    level += 1
                texel(texture, level, gx * scale, gz * scale, color)
                for k in range(3):
                    image[y, x, k] = np.uint8(color[k] * dark)
            elif dark < 1:
                for k in range(3):
                    image[y, x, k] = np.uint8(image[y, x, k] * dark)


@numba.njit(cache=True, nogil=True)
def paint_surfaces(
    image: np.ndarray,
    face: np.ndarray,
    bary: np.ndarray,
    inverse_depth: np.ndarray,
    surfaces: Surfaces,
    light: Sunlight,
    shadow: ShadowMap,
) -> np.ndarray:
    """Paint people and things over the ground, their edges smooth.

    Args:
        image: (H,W,3) uint8; changed in place.
        face, bary, inverse_depth: fragments of `surfaces`, (2H,2W,...).

    Returns:
        (H,W) uint8 instances: 0 background and things, 1 the subject, 2 the other person: who shows in at least half
        of a pixel, the subject first.
    """
    height, width = image.shape[:2]
    label = np.zeros((height, width), np.uint8)
    total = np.zeros(3, np.float32)
    meshes = np.zeros(4, np.int64)
    for y in range(height):
        for x in range(width):
            covered = 0
            nearest, farthest = np.float32(0), np.float32(np.inf)
            for s in range(4):
                v, u = 2 * y + (s >> 1), 2 * x + (s & 1)
                meshes[s] = -1
                if face[v, u] >= 0:
                    mesh = 0
                    while face[v, u] >= surfaces.first_face[mesh + 1]:
                        mesh += 1
                    meshes[s] = mesh
                    covered += 1
                    nearest, farthest = max(nearest, inverse_depth[v, u]), min(farthest, inverse_depth[v, u])
            if covered == 0:
                continue
            subject, other = 0, 0
            for s in range(4):
                subject += meshes[s] == _SUBJECT_MESH
                other += meshes[s] == _OTHER_MESH
            if subject >= 2:
                label[y, x] = MASK_SUBJECT
            elif other >= 2:
                label[y, x] = MASK_OTHER
            total[:] = 0
            if covered == 4 and subject % 4 == 0 and other % 4 == 0 and nearest < farthest * _SAME_SURFACE:
                _add_light(total, face, bary, 2 * y, 2 * x, meshes[0], surfaces, light, shadow)
                share = np.float32(1)
            else:
                for s in range(4):
                    v, u = 2 * y + (s >> 1), 2 * x + (s & 1)
                    if meshes[s] >= 0:
                        _add_light(total, face, bary, v, u, meshes[s], surfaces, light, shadow)
                    else:
                        for k in range(3):
                            total[k] += image[y, x, k]
                share = np.float32(0.25)
            for k in range(3):
                image[y, x, k] = np.uint8(total[k] * share)
    return label


@numba.njit(cache=True, nogil=True)
def _add_light(
    total: np.ndarray,
    face: np.ndarray,
    bary: np.ndarray,
    v: int,
    u: int,
    mesh: int,
    surfaces: Surfaces,
    light: Sunlight,
    shadow: ShadowMap,
) -> None:
    """Add the stored colour (0..255) of the sample in row v and column u to `total` (3,)."""
    f = face[v, u]
    a, b, c = surfaces.faces[f, 0], surfaces.faces[f, 1], surfaces.faces[f, 2]
    wa, wb = bary[v, u, 0], bary[v, u, 1]
    wc = np.float32(1) - wa - wb
    n, p, rest = surfaces.normals, surfaces.vertices, surfaces.rest
    nx = wa * n[a, 0] + wb * n[b, 0] + wc * n[c, 0]
    ny = wa * n[a, 1] + wb * n[b, 1] + wc * n[c, 1]
    nz = wa * n[a, 2] + wb * n[b, 2] + wc * n[c, 2]
    length = np.sqrt(nx * nx + ny * ny + nz * nz) + np.float32(1e-6)
    nx, ny, nz = nx / length, ny / length, nz / length
    facing = nx * light.direction[0] + ny * light.direction[1] + nz * light.direction[2]
    if facing > 0:
        off = shadow.offset_m
        px = wa * p[a, 0] + wb * p[b, 0] + wc * p[c, 0] + off * nx
        py = wa * p[a, 1] + wb * p[b, 1] + wc * p[c, 1] + off * ny
        pz = wa * p[a, 2] + wb * p[b, 2] + wc * p[c, 2] + off * nz
        facing *= 1 - surface_shade(shadow, px, py, pz)
    else:
        facing = np.float32(0)
    ambient = np.float32(0.65) + np.float32(0.35) * ny  # the sky is above, and the floor is darker
    rx = wa * rest[a, 0] + wb * rest[b, 0] + wc * rest[c, 0]
    ry = wa * rest[a, 1] + wb * rest[b, 1] + wc * rest[c, 1]
    rz = wa * rest[a, 2] + wb * rest[b, 2] + wc * rest[c, 2]
    row, mixed, factor = surface_color(rx, ry, rz, mesh > _OTHER_MESH, surfaces.numbers[mesh])
    if row >= CLOTH_ROW:
        wrinkle = wa * rest[a, 3] + wb * rest[b, 3] + wc * rest[c, 3]
        factor *= np.float32(1) + surfaces.numbers[mesh, FOLDS] * wrinkle
    for k in range(3):
        color = surfaces.colors[mesh, row, k]
        if mixed > 0:
            color += mixed * (surfaces.colors[mesh, row + 1, k] - color)
        value = factor * color * (light.sun[k] * facing + light.sky[k] * ambient)
        total[k] += light.tone[min(TONE_STEPS - 1, int(max(np.float32(0), value) * _TONE_SCALE))]
