"""Paints one frame of a scene: the pixels of people, things and ground, from what the rasteriser found."""

from __future__ import annotations

import numba
import numpy as np

from fasthmr.data.synth.people import surface_row

NOISE_PX = 512  # a power of two, so that wrapping is a mask


@numba.njit(cache=True, nogil=True)
def _texel(texture: np.ndarray, u: float, v: float, out: np.ndarray) -> None:
    """Bilinear sample of a texture (H,W,3) uint8 at u, v in texels, repeated; into `out` (3,) 0..255."""
    height, width = texture.shape[:2]
    u0, v0 = np.floor(u), np.floor(v)
    fu, fv = np.float32(u - u0), np.float32(v - v0)
    x0, y0 = int(u0) % width, int(v0) % height
    x1, y1 = (x0 + 1) % width, (y0 + 1) % height
    for k in range(3):
        top = texture[y0, x0, k] * (1 - fu) + texture[y0, x1, k] * fu
        bottom = texture[y1, x0, k] * (1 - fu) + texture[y1, x1, k] * fu
        out[k] = top * (1 - fv) + bottom * fv


@numba.njit(cache=True, nogil=True)
def paint(
    face: np.ndarray,
    bary: np.ndarray,
    faces: np.ndarray,
    first_face: np.ndarray,
    normals: np.ndarray,
    rest: np.ndarray,
    colors: np.ndarray,
    numbers: np.ndarray,
    light_direction: np.ndarray,
    sun: np.ndarray,
    sky: np.ndarray,
    gamma_table: np.ndarray,
    ray_from_pixel: np.ndarray,
    far_from_ray: np.ndarray,
    camera_height: float,
    camera_xz: np.ndarray,
    far: np.ndarray,
    ground: np.ndarray,
    ground_scale: float,
    ground_mean: np.ndarray,
    shadow_map: np.ndarray,
    shadow_origin: np.ndarray,
    shadow_scale: float,
    shadow_strength: float,
    inside: np.ndarray,
    noise: np.ndarray,
    noise_at: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Colour and instance of every pixel of a crop.

    Args:
        face, bary: the rasteriser's fragments of all meshes together, (H,W) and (H,W,2).
        faces: (F,3) of all meshes, indices into all vertices.
        first_face: (M+1,) where each mesh's faces begin; mesh m has label m+1, the meshes after the second are things.
        normals, rest: (V,3) float32 in the world, and on the T pose, of all vertices.
        colors, numbers: (M,7,3) and (M,8) each mesh's appearance; things have one colour, `colors[m,0]`.
        light_direction, sun, sky: (3,) float32, see `scene.Light`.
        gamma_table: (1024,) uint8, linear light 0..1.25 to stored values.
        ray_from_pixel: (3,3) crop pixel (x, y, 1) -> ray in the world.
        far_from_ray: (3,3) ray in the world -> homogeneous texel of the far picture.
        camera_height, camera_xz: of the camera, metres, world.
        far, ground, ground_scale, ground_mean: textures; ground texels per metre, 0 for no ground; its mean colour.
        shadow_map, shadow_origin, shadow_scale, shadow_strength: (S,S) float32 in [0,1] on y=0; its corner (x,z), metres;
            texels per metre.
        inside: (4,) first and last column and row of the crop that lie in the full image; black outside.
        noise, noise_at: (512,512,3) float32 added to the stored values, and (2,) how far it is shifted.

    Returns:
        (H,W,3) uint8 RGB and (H,W) uint8: 0 background and things, 1 the first mesh, 2 the second.
    """
    height, width = face.shape
    image = np.zeros((height, width, 3), np.uint8)
    label = np.zeros((height, width), np.uint8)
    texel = np.zeros(3, np.float32)
    side = shadow_map.shape[0]
    for y in range(height):
        for x in range(width):
            if x < inside[0] or x > inside[1] or y < inside[2] or y > inside[3]:
                continue
            row_of_noise, column_of_noise = (y + noise_at[0]) & (NOISE_PX - 1), (x + noise_at[1]) & (NOISE_PX - 1)
            f = face[y, x]
            if f >= 0:
                mesh = 0
                while f >= first_face[mesh + 1]:
                    mesh += 1
                a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
                wa, wb = bary[y, x, 0], bary[y, x, 1]
                wc = np.float32(1) - wa - wb
                nx = wa * normals[a, 0] + wb * normals[b, 0] + wc * normals[c, 0]
                ny = wa * normals[a, 1] + wb * normals[b, 1] + wc * normals[c, 1]
                nz = wa * normals[a, 2] + wb * normals[b, 2] + wc * normals[c, 2]
                length = np.sqrt(nx * nx + ny * ny + nz * nz) + np.float32(1e-6)
                facing = max(
                    np.float32(0), (nx * light_direction[0] + ny * light_direction[1] + nz * light_direction[2]) / length
                )
                ambient = np.float32(0.62) + np.float32(0.38) * ny / length  # the sky is above, the floor is darker
                row, fold = 0, np.float32(1)
                if mesh < 2:
                    px = wa * rest[a, 0] + wb * rest[b, 0] + wc * rest[c, 0]
                    py = wa * rest[a, 1] + wb * rest[b, 1] + wc * rest[c, 1]
                    pz = wa * rest[a, 2] + wb * rest[b, 2] + wc * rest[c, 2]
                    row = surface_row(px, py, pz, numbers[mesh])
                    label[y, x] = mesh + 1
                    if row >= 2:  # cloth has folds
                        fold = np.float32(1) + numbers[mesh, 7] * np.float32(
                            np.sin(px * 31 + 3 * np.sin(py * 23)) * np.sin(py * 27 + 2 * np.sin(pz * 33))
                        )
                for k in range(3):
                    base = np.float32(0.04) if row < 0 else colors[mesh, row, k]
                    value = base * fold * (sun[k] * facing + sky[k] * ambient)
                    stored = np.float32(gamma_table[min(1023, int(max(np.float32(0), value) * np.float32(819.2)))])
                    image[y, x, k] = min(np.float32(255), max(np.float32(0), stored + noise[row_of_noise, column_of_noise, k]))
                continue
            dx = ray_from_pixel[0, 0] * x + ray_from_pixel[0, 1] * y + ray_from_pixel[0, 2]
            dy = ray_from_pixel[1, 0] * x + ray_from_pixel[1, 1] * y + ray_from_pixel[1, 2]
            dz = ray_from_pixel[2, 0] * x + ray_from_pixel[2, 1] * y + ray_from_pixel[2, 2]
            reach = np.float32(1e9)
            if dy < -1e-6:
                reach = -camera_height / dy
            gx, gz = camera_xz[0] + reach * dx, camera_xz[1] + reach * dz
            range_m = reach * np.sqrt(dx * dx + dz * dz)
            if ground_scale > 0 and range_m < 60:
                _texel(ground, gx * ground_scale, gz * ground_scale, texel)
                # far away the pattern is finer than a pixel: fade to its mean
                fade = min(np.float32(1), max(np.float32(0), (range_m - 6) / 14))
                for k in range(3):
                    texel[k] += fade * (ground_mean[k] - texel[k])
            else:
                u = far_from_ray[0, 0] * dx + far_from_ray[0, 1] * dy + far_from_ray[0, 2] * dz
                v = far_from_ray[1, 0] * dx + far_from_ray[1, 1] * dy + far_from_ray[1, 2] * dz
                w = far_from_ray[2, 0] * dx + far_from_ray[2, 1] * dy + far_from_ray[2, 2] * dz
                _texel(far, u / w, v / w, texel)
            dark = np.float32(1)
            if range_m < 60:
                su, sv = (gx - shadow_origin[0]) * shadow_scale, (gz - shadow_origin[1]) * shadow_scale
                if 0 <= su < side - 1 and 0 <= sv < side - 1:
                    iu, iv = int(su), int(sv)
                    fu, fv = su - iu, sv - iv
                    top = shadow_map[iv, iu] * (1 - fu) + shadow_map[iv, iu + 1] * fu
                    low = shadow_map[iv + 1, iu] * (1 - fu) + shadow_map[iv + 1, iu + 1] * fu
                    dark = 1 - shadow_strength * (top * (1 - fv) + low * fv)
            for k in range(3):
                image[y, x, k] = min(
                    np.float32(255), max(np.float32(0), texel[k] * dark + noise[row_of_noise, column_of_noise, k])
                )
    return image, label
