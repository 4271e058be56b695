"""A mesh drawn over a picture, or from the side on white: what TensorBoard and reports show."""

from __future__ import annotations

import numpy as np

from fasthmr.render.raster import interpolate, project_points, rasterize, vertex_normals

#: light from above the camera, a little from its left (camera frame, y down)
_LIGHT = np.array([-0.3, -0.5, -0.8], np.float32) / np.float32(np.linalg.norm([-0.3, -0.5, -0.8]))
_AMBIENT = 0.35


def overlay_mesh(
    image: np.ndarray,
    vertices_camera: np.ndarray,
    faces: np.ndarray,
    focal_px: float,
    center_px: tuple[float, float],
    color: tuple[float, float, float] = (0.55, 0.75, 0.95),
    opacity: float = 0.85,
) -> np.ndarray:
    """Draw a shaded mesh over an image.

    Args:
        image: (H,W,3) uint8 RGB; not changed.
        vertices_camera: (V,3) metres, camera frame (x right, y down, z forward).
        faces: (F,3).
        focal_px, center_px: pinhole camera of the image.
        color: RGB in [0,1].
        opacity: of the mesh.

    Returns:
        (H,W,3) uint8 RGB.
    """
    height, width = image.shape[:2]
    faces = np.ascontiguousarray(faces, np.int32)
    vertices = np.ascontiguousarray(vertices_camera, np.float32)
    fragments = rasterize(project_points(vertices, focal_px, center_px), faces, width, height)
    normals = interpolate(fragments.face, fragments.bary, faces, vertex_normals(vertices, faces))
    light = _AMBIENT + (1 - _AMBIENT) * np.clip(normals @ _LIGHT, 0, 1)
    shaded = 255 * light[..., None] * np.array(color, np.float32)
    alpha = opacity * (fragments.face >= 0)[..., None]
    return np.clip(alpha * shaded + (1 - alpha) * image, 0, 255).astype(np.uint8)


def side_view(
    vertices: np.ndarray,
    faces: np.ndarray,
    size_px: int,
    color: tuple[float, float, float] = (0.55, 0.75, 0.95),
    middle: np.ndarray | None = None,
    extent_m: float | None = None,
) -> np.ndarray:
    """The mesh on white, seen from the camera's right: turned by 90 degrees about the camera's vertical axis.

    Args:
        vertices: (V,3) metres in a frame with y down, such as the camera frame.
        faces: (F,3).
        size_px: side of the result.
        color: RGB in [0,1].
        middle: (3,) what is at the picture's centre; None: the middle of the mesh.
        extent_m: metres that 0.9 of the picture's side show; None: as many as fit the mesh. Both are given for videos,
            where a picture fitted to every frame would jump.

    Returns:
        (size_px,size_px,3) uint8 RGB.
    """
    middle = (vertices.min(0) + vertices.max(0)) / 2 if middle is None else middle
    x, y, z = (vertices - middle).T
    # What was in front of the person (towards the first camera) is now on the left.
    turned = np.stack([z, y, -x], axis=1)
    if extent_m is None:
        extent_m = max(float(np.ptp(turned[:, 0])), float(np.ptp(turned[:, 1])), 1e-3)
    distance = 10 * extent_m  # far enough to look orthographic
    turned[:, 2] += distance
    focal_px = 0.9 * size_px * distance / extent_m
    white = np.full((size_px, size_px, 3), 255, np.uint8)
    return overlay_mesh(white, turned, faces, focal_px, (size_px / 2, size_px / 2), color, opacity=1.0)
