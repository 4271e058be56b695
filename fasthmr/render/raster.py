"""Z-buffer rasteriser on the CPU, compiled by numba: which triangle each pixel shows, and where in it."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

#: triangles with a vertex nearer than this are dropped (no clipping; nothing here films from inside a body).
NEAR_M = 0.05
#: how far outside a triangle, as a share of it, a pixel may lie: rounding must not open gaps between neighbours.
EDGE = np.float32(1e-4)


@dataclass(frozen=True)
class Fragments:
    """What each pixel shows. `face` (H,W) int32, -1 for nothing; `bary` (H,W,2) weights of the triangle's first two
    corners, perspective-correct, of no meaning where nothing is; `inverse_depth` (H,W) 1/metres, 0 for nothing."""

    face: np.ndarray
    bary: np.ndarray
    inverse_depth: np.ndarray

    @classmethod
    def empty(cls, width: int, height: int) -> Fragments:
        return cls(
            np.full((height, width), -1, np.int32),
            np.zeros((height, width, 2), np.float32),
            np.zeros((height, width), np.float32),
        )

    def clear(self) -> None:
        """Make them show nothing again."""
        self.face.fill(-1)
        self.inverse_depth.fill(0)


def project_points(points: np.ndarray, focal_px: float, center_px: tuple[float, float]) -> np.ndarray:
    """(V,3) camera frame, metres -> (V,3) float32 x, y in px and depth in metres."""
    depth = points[:, 2]
    safe = np.where(np.abs(depth) < 1e-6, 1e-6, depth)
    x = focal_px * points[:, 0] / safe + center_px[0]
    y = focal_px * points[:, 1] / safe + center_px[1]
    return np.stack([x, y, depth], axis=1).astype(np.float32)


def rasterize(
    points: np.ndarray, faces: np.ndarray, width: int, height: int, into: Fragments | None = None
) -> Fragments:
    """Draw triangles that face the camera.

    Args:
        points: (V,3) float32, x and y in px (pixel centres at integers), depth in metres, from `project_points`.
        faces: (F,3) int32, counter-clockwise seen from outside.
        width, height: of the result, px.
        into: draw on top of these, nearest wins; changed in place. The faces of different meshes are then told apart by
            the caller's numbering.
    """
    fragments = Fragments.empty(width, height) if into is None else into
    _rasterize(points, faces, fragments.face, fragments.bary, fragments.inverse_depth)
    return fragments


@numba.njit(cache=True, nogil=True)
def _rasterize(
    points: np.ndarray, faces: np.ndarray, face_out: np.ndarray, bary_out: np.ndarray, inverse_out: np.ndarray
) -> None:
    height, width = face_out.shape
    for f in range(faces.shape[0]):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        za, zb, zc = points[a, 2], points[b, 2], points[c, 2]
        if za <= NEAR_M or zb <= NEAR_M or zc <= NEAR_M:
            continue
        xa, ya, xb, yb, xc, yc = points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
        area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
        if area >= -1e-12:  # y points down, so a front face turns the other way round
            continue
        x0, x1 = max(0, int(np.ceil(min(xa, xb, xc)))), min(width - 1, int(np.floor(max(xa, xb, xc))))
        y0, y1 = max(0, int(np.ceil(min(ya, yb, yc)))), min(height - 1, int(np.floor(max(ya, yb, yc))))
        if x0 > x1 or y0 > y1:
            continue
        ia, ib, ic = np.float32(1) / za, np.float32(1) / zb, np.float32(1) / zc
        per_area = np.float32(1) / area
        # weights are linear in x and y: step them instead of computing them anew
        wa_x, wb_x = (yb - yc) * per_area, (yc - ya) * per_area
        for y in range(y0, y1 + 1):
            wa = ((xb - x0) * (yc - y) - (xc - x0) * (yb - y)) * per_area
            wb = ((xc - x0) * (ya - y) - (xa - x0) * (yc - y)) * per_area
            for x in range(x0, x1 + 1):
                wc = np.float32(1) - wa - wb
                if wa >= -EDGE and wb >= -EDGE and wc >= -EDGE:
                    inverse = wa * ia + wb * ib + wc * ic
                    if inverse > inverse_out[y, x]:
                        inverse_out[y, x] = inverse
                        face_out[y, x] = f
                        bary_out[y, x, 0] = wa * ia / inverse
                        bary_out[y, x, 1] = wb * ib / inverse
                wa += wa_x
                wb += wb_x


@numba.njit(cache=True, nogil=True)
def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals (V,3) float32, pointing out; the mean over a vertex's triangles, weighted by area."""
    normals = np.zeros_like(vertices)
    for f in range(faces.shape[0]):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        vx, vy, vz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in (a, b, c):
            normals[k, 0] += nx
            normals[k, 1] += ny
            normals[k, 2] += nz
    for i in range(len(normals)):
        length = np.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + np.float32(1e-12)
        normals[i] /= length
    return normals


@numba.njit(cache=True, nogil=True)
def interpolate(face: np.ndarray, bary: np.ndarray, faces: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of vertices (V,C) float32 at every pixel: (H,W,C), 0 where nothing is."""
    height, width = face.shape
    channels = values.shape[1]
    out = np.zeros((height, width, channels), np.float32)
    for y in range(height):
        for x in range(width):
            f = face[y, x]
            if f >= 0:
                wa, wb = bary[y, x, 0], bary[y, x, 1]
                wc = np.float32(1) - wa - wb
                a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
                for k in range(channels):
                    out[y, x, k] = wa * values[a, k] + wb * values[b, k] + wc * values[c, k]
    return out
