"""Films a scene: everything that stays the same over a clip, prepared once, and any of its frames painted from it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from fasthmr.data.synth.backgrounds import Background
from fasthmr.data.synth.occluders import Thing
from fasthmr.data.synth.painter import SAMPLES, Ground, Surfaces, paint_ground, paint_surfaces
from fasthmr.data.synth.people import Appearance, wrinkles
from fasthmr.data.synth.scene import CameraPath, Light
from fasthmr.render.raster import Fragments, rasterize, vertex_normals
from fasthmr.render.shading import (
    NOISE_PX,
    Sunlight,
    cast_shadows,
    expose,
    sensor_noise,
    shadow_fragments,
    shrunken,
    tone_curve,
)

#: the far picture is looked up at every so many pixels, and in between by interpolation
_FAR_STEP_PX = 16
#: how much wider the far picture is than the view
_FAR_MARGIN = 1.3


@dataclass(frozen=True)
class Figure:
    """Somebody to be filmed: `vertices` (T,V,3) float32, world, metres, and a look."""

    vertices: np.ndarray
    look: Appearance


class Film:
    """A clip's camera, light, place, people and things; `frame` paints.

    Args:
        camera, light, background, things: the scene.
        figures: the subject, and perhaps somebody else.
        faces: (F,3) int32 of the body.
        paint_on: (V,3) float32 from `people.paint_coordinates`.
        rng: draws what the lens and the sensor do.
        noise: largest standard deviation of the sensor's noise, in grey values of 255.
        grain_px: how many pixels of the crops one pixel of the full image becomes; so coarse are blur and noise.
    """

    def __init__(
        self,
        camera: CameraPath,
        light: Light,
        background: Background,
        figures: list[Figure],
        things: list[Thing],
        faces: np.ndarray,
        paint_on: np.ndarray,
        rng: np.random.Generator,
        noise: float,
        grain_px: float,
    ) -> None:
        self._camera, self._light, self._figures, self._things = camera, light, figures, things
        parts, counts, start = [], [], 0
        for _ in figures:
            parts.append(faces + start)
            counts.append(len(faces))
            start += len(paint_on)
        counts += [0] * (2 - len(figures))  # the second mesh is the other person's, even if there is none
        for thing in things:
            parts.append(thing.faces + start)
            counts.append(len(thing.faces))
            start += len(thing.rest)
        self._faces = np.ascontiguousarray(np.concatenate(parts), np.int32)
        self._first_face = np.cumsum([0, *counts], dtype=np.int64)
        rest = np.concatenate([paint_on] * len(figures) + [t.rest for t in things])
        self._rest = np.concatenate([rest, wrinkles(rest)[:, None]], axis=1)
        looks = [f.look for f in figures]
        looks += [looks[0]] * (2 - len(looks)) + [t.look for t in things]
        self._colors, self._numbers = np.stack([k.colors for k in looks]), np.stack([k.numbers for k in looks])

        self._far = background.far
        self._far_from_view = _far_from_view(camera, background.far)
        self._mean_view = Rotation.from_matrix(camera.rotation).mean().as_matrix()
        self._ground = self._make_ground(background)
        # What surrounds people colours the light on them.
        tint = background.far.reshape(-1, 3).mean(0) / max(float(background.far.mean()), 1.0)
        sky = light.sky * (0.75 + 0.25 * tint)
        self._sunlight = Sunlight(
            light.direction.astype(np.float32),
            light.sun.astype(np.float32),
            sky.astype(np.float32),
            tone_curve(light.gamma),
        )
        self._blur_px = float(np.hypot(rng.uniform(0, 0.6), 0.45 * max(0.0, grain_px - 1)))
        self._noise = sensor_noise(rng, noise * rng.uniform() ** 2, 0.4 * grain_px if grain_px > 1 else 0.0)
        self._noise_at = rng.integers(0, NOISE_PX, (len(camera.position), 2))
        self._shadow_fragments = shadow_fragments()
        self._fragments: dict[tuple[int, int], Fragments] = {}

    def frame(self, t: int, crop_from_image: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Paint frame `t` as seen through a crop.

        Args:
            t: number of the frame.
            crop_from_image: (2,3) full-image px -> crop px, without rotation.
            width, height: of the crop.

        Returns:
            (H,W,3) uint8 RGB and (H,W) uint8 instances.
        """
        rotation, position = self._camera.rotation[t], self._camera.position[t]
        vertices = np.concatenate(
            [f.vertices[t] for f in self._figures] + [s.rest + s.path[t].astype(np.float32) for s in self._things]
        )
        crop_camera = np.vstack([crop_from_image, [0, 0, 1]]) @ self._camera.intrinsics
        fragments = self._rasterized(vertices, rotation, position, crop_camera, width, height)
        shadow = cast_shadows(
            vertices, self._faces, self._light.direction, self._light.softness_m, self._shadow_fragments
        )
        surfaces = Surfaces(
            self._faces, self._first_face, vertices, vertex_normals(vertices, self._faces), self._rest, self._colors,
            self._numbers,
        )  # fmt: skip
        ray_from_pixel = rotation.T @ np.linalg.inv(crop_camera)
        image = self._far_picture(ray_from_pixel, width, height)
        paint_ground(
            image, fragments.face, ray_from_pixel.astype(np.float32), position.astype(np.float32), self._ground, shadow,
            self._light.shadow,
        )  # fmt: skip
        label = paint_surfaces(
            image, fragments.face, fragments.bary, fragments.inverse_depth, surfaces, self._sunlight, shadow
        )
        (x0, x1), (y0, y1) = crop_from_image @ np.array([[0, 0, 1], [*(self._camera.image_size - 1), 1]]).T
        inside = np.array([np.ceil(x0), np.floor(x1), np.ceil(y0), np.floor(y1)], np.float32)
        label[: max(0, int(inside[2]))] = 0
        label[max(0, int(inside[3]) + 1) :] = 0
        label[:, : max(0, int(inside[0]))] = 0
        label[:, max(0, int(inside[1]) + 1) :] = 0
        return expose(image, self._blur_px, self._noise, self._noise_at[t], inside), label

    def _rasterized(
        self,
        vertices: np.ndarray,
        rotation: np.ndarray,
        position: np.ndarray,
        crop_camera: np.ndarray,
        width: int,
        height: int,
    ) -> Fragments:
        """Fragments of all meshes; sample u of a row lies at pixel (u - 1/2) / 2."""
        # In double precision up to here, so that cameras far from the origin lose nothing.
        to_samples = np.array([[SAMPLES, 0, 0.5], [0, SAMPLES, 0.5], [0, 0, 1]]) @ crop_camera @ rotation
        homogeneous = vertices @ to_samples.T - to_samples @ position
        depth = homogeneous[:, 2:]
        points = np.concatenate([homogeneous[:, :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth), depth], 1)
        size = (SAMPLES * width, SAMPLES * height)
        if size not in self._fragments:
            self._fragments[size] = Fragments.empty(*size)
        fragments = self._fragments[size]
        fragments.clear()
        return rasterize(points.astype(np.float32), self._faces, *size, into=fragments)

    def _far_picture(self, ray_from_pixel: np.ndarray, width: int, height: int) -> np.ndarray:
        """(H,W,3) uint8: the far picture, bent around the camera so that it has no edge where the camera may look."""
        columns, rows = -(-width // _FAR_STEP_PX) + 1, -(-height // _FAR_STEP_PX) + 1
        x, y = np.meshgrid(np.arange(columns) * _FAR_STEP_PX, np.arange(rows) * _FAR_STEP_PX)
        rays = np.stack([x, y, np.ones_like(x)], -1) @ (self._mean_view @ ray_from_pixel).T
        yaw = np.arctan2(rays[..., 0], rays[..., 2])
        pitch = np.arctan2(rays[..., 1], np.hypot(rays[..., 0], rays[..., 2]))
        scale, column, row = self._far_from_view
        grid = np.stack([scale * yaw + column, scale * pitch + row], -1).astype(np.float32)
        # resize puts its samples at the middles of cells: shift by the grid's own half cell and cut
        full = cv2.resize(grid, None, fx=_FAR_STEP_PX, fy=_FAR_STEP_PX, interpolation=cv2.INTER_LINEAR)
        half = _FAR_STEP_PX // 2
        at = full[half : half + height, half : half + width]
        x_map, y_map = cv2.split(at)
        return np.asarray(cv2.remap(self._far, x_map, y_map, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101))

    def _make_ground(self, background: Background) -> Ground:
        """The ground as far as the wall, which stands across the mean line of sight, behind everybody."""
        sight = self._mean_view[2, [0, 2]]
        sight = sight / max(float(np.linalg.norm(sight)), 1e-6)
        deepest = max(float((f.vertices[:, ::7, [0, 2]] @ sight).max()) for f in self._figures)
        end = np.array([*sight, min(deepest + background.wall_m, 1e6)], np.float32)
        if background.ground is None:
            return Ground(np.zeros((1, 1, 3), np.uint8), np.float32(0), end)
        return Ground(shrunken(background.ground), np.float32(len(background.ground) / background.tile_m), end)


def _far_from_view(camera: CameraPath, far: np.ndarray) -> tuple[float, float, float]:
    """Texels a radian and the middle's column and row: the far picture is somewhat larger than the view."""
    width, height = camera.image_size
    focal = camera.intrinsics[0, 0]
    far_height, far_width = far.shape[:2]
    wide, tall = 2 * np.arctan(width / 2 / focal), 2 * np.arctan(height / 2 / focal)
    return min(far_width / wide, far_height / tall) / _FAR_MARGIN, far_width / 2, far_height / 2
