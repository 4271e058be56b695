"""Thins a mirror-symmetric triangle mesh by edge collapse; the vertices that stay are a subset and stay symmetric."""

from __future__ import annotations

import heapq

import numpy as np
from scipy.spatial import cKDTree

#: a collapse may turn no remaining face by more than about 70 degrees
_MIN_NORMAL_COSINE = 0.3
#: nor leave a face whose doubled area is below this share of its longest side squared
_MIN_ROUNDNESS = 0.05
#: keeps flat regions evenly dense: there the quadric error is zero for every collapse
_LENGTH_COST = 1e-9
_MIRROR = np.array([-1.0, 1.0, 1.0])


def mirror_pairs(vertices: np.ndarray, tolerance_m: float = 1e-5) -> np.ndarray:
    """For each vertex the one at its mirror image (x -> -x), its own index on the midline: (V,3) metres -> (V,) int64.

    Raises:
        ValueError: some vertex has no mirror image within `tolerance_m`.
    """
    distance, index = cKDTree(vertices).query(vertices * _MIRROR)
    if distance.max() > tolerance_m or (index[index] != np.arange(len(vertices))).any():
        raise ValueError(f"the mesh is not mirror-symmetric: a vertex is {distance.max():.2g} m from its mirror image")
    return index.astype(np.int64)


def decimate_symmetric(vertices: np.ndarray, faces: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Remove vertices of a closed mesh, symmetric in x, until about `target` are left.

    Half-edge collapses in order of quadric error (Garland and Heckbert 1997, section 4), made on the half x >= 0 and
    mirrored. Vertices only disappear, none moves: what is attached to a vertex (shapes, skinning weights) stays valid.

    Args:
        vertices: (V,3) metres, midline vertices at x = 0 exactly.
        faces: (F,3) vertex indices; no face crosses the midline.
        target: the number of vertices to stop at; one less may be left, as vertices go in pairs.

    Returns:
        The kept vertices' indices, ascending, and the faces in terms of them.

    Raises:
        ValueError: the mesh is not symmetric or a face crosses the midline.
    """
    mirror = mirror_pairs(vertices)
    half = _HalfMesh(vertices, faces)
    half.collapse_until(target)
    right = half.remaining_faces()
    # Mirroring turns a face inside out; reversing its corners turns it back.
    both = np.concatenate([right, mirror[right][:, ::-1]])
    kept = np.unique(both)
    new_index = np.full(len(vertices), -1)
    new_index[kept] = np.arange(len(kept))
    return kept, new_index[both]


class _HalfMesh:
    """The half x >= 0 of the mesh while it is being thinned. A collapse `gone -> stays` moves gone's faces to stays."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        self.positions = vertices
        self.on_midline = vertices[:, 0] == 0
        half = faces[vertices[faces][:, :, 0].mean(1) > 0]
        if (vertices[half][:, :, 0] < 0).any():
            raise ValueError("a face crosses the midline x = 0")
        self.faces: dict[int, tuple[int, ...]] = {i: tuple(int(v) for v in face) for i, face in enumerate(half)}
        self.faces_of: dict[int, set[int]] = {int(v): set() for v in np.unique(half)}
        for index, face in self.faces.items():
            for vertex in face:
                self.faces_of[vertex].add(index)
        self.quadrics = self._plane_quadrics(half)
        self.version = dict.fromkeys(self.faces_of, 0)
        # (cost, gone, stays, their versions): equal costs go by vertex index, so that every machine makes one mesh
        self.queue: list[tuple[float, int, int, int, int]] = []
        for vertex in self.faces_of:
            self._offer_collapses(vertex)

    def collapse_until(self, target: int) -> None:
        count = sum(1 if self.on_midline[v] else 2 for v in self.faces_of)
        while count > target and self.queue:
            _, gone, stays, gone_version, stays_version = heapq.heappop(self.queue)
            current = self.version.get(gone) == gone_version and self.version.get(stays) == stays_version
            if current and self._keeps_shape(gone, stays):
                self._collapse(gone, stays)
                count -= 1 if self.on_midline[gone] else 2

    def remaining_faces(self) -> np.ndarray:
        return np.array(list(self.faces.values()))

    def _plane_quadrics(self, half: np.ndarray) -> np.ndarray:
        """(V,4,4) sums, over the faces around a vertex, of area-weighted squared distances to the face's plane."""
        a, b, c = (self.positions[half[:, k]] for k in range(3))
        normal = np.cross(b - a, c - a)
        area = np.linalg.norm(normal, axis=1, keepdims=True)
        normal = normal / np.maximum(area, 1e-20)
        plane = np.concatenate([normal, -(normal * a).sum(1, keepdims=True)], axis=1)
        per_face = plane[:, :, None] * plane[:, None, :] * area[:, :, None]
        quadrics = np.zeros((len(self.positions), 4, 4))
        for corner in range(3):
            np.add.at(quadrics, half[:, corner], per_face)
        # A midline vertex also has the mirrored faces.
        flip = np.array([*_MIRROR, 1.0])
        quadrics[self.on_midline] += quadrics[self.on_midline] * np.outer(flip, flip)
        return quadrics

    def _neighbours(self, vertex: int) -> set[int]:
        return {v for face in self.faces_of[vertex] for v in self.faces[face]} - {vertex}

    def _offer_collapses(self, vertex: int) -> None:
        for other in self._neighbours(vertex):
            for gone, stays in ((vertex, other), (other, vertex)):
                if self.on_midline[gone] and not self.on_midline[stays]:
                    continue  # it would open the seam between the halves
                point = np.append(self.positions[stays], 1.0)
                length2 = ((self.positions[gone] - self.positions[stays]) ** 2).sum()
                cost = point @ (self.quadrics[gone] + self.quadrics[stays]) @ point + _LENGTH_COST * length2
                rounded = float(f"{cost:.9e}")  # rounding noise must not decide between equal costs
                heapq.heappush(self.queue, (rounded, gone, stays, self.version[gone], self.version[stays]))

    def _keeps_shape(self, gone: int, stays: int) -> bool:
        """Whether the collapse leaves a manifold surface, turns no face over and makes no needle."""
        vanishing = self.faces_of[gone] & self.faces_of[stays]
        if len(self._neighbours(gone) & self._neighbours(stays)) != len(vanishing):
            return False  # the link condition: else two sheets would be glued together
        if self.on_midline[gone] and len(vanishing) != 1:
            return False  # not an edge of the seam, though both ends are on it
        for face in self.faces_of[gone] - vanishing:
            before = self.positions[list(self.faces[face])]
            after = self.positions[[stays if v == gone else v for v in self.faces[face]]]
            old_normal = np.cross(before[1] - before[0], before[2] - before[0])
            new_normal = np.cross(after[1] - after[0], after[2] - after[0])
            area = np.linalg.norm(new_normal)
            longest2 = ((after - np.roll(after, 1, axis=0)) ** 2).sum(1).max()
            if area < max(1e-9, _MIN_ROUNDNESS * longest2):
                return False
            if old_normal @ new_normal < _MIN_NORMAL_COSINE * np.linalg.norm(old_normal) * area:
                return False
        return True

    def _collapse(self, gone: int, stays: int) -> None:
        for face in self.faces_of[gone] & self.faces_of[stays]:
            for vertex in self.faces.pop(face):
                self.faces_of[vertex].discard(face)
        for face in self.faces_of.pop(gone):
            self.faces[face] = tuple(stays if v == gone else v for v in self.faces[face])
            self.faces_of[stays].add(face)
        del self.version[gone]
        self.version[stays] += 1
        self.quadrics[stays] += self.quadrics[gone]
        self._offer_collapses(stays)
