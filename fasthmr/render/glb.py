"""A mesh as a GLB file, the binary form of glTF, which viewers, browsers and Blender open."""

from __future__ import annotations

import numpy as np
from trimesh import Trimesh
from trimesh.exchange.gltf import export_glb


def mesh_glb(vertices_camera: np.ndarray, faces: np.ndarray) -> bytes:
    """The bytes of a GLB file with one mesh.

    glTF is y up, and its camera looks along -z: the camera frame (x right, y down, z forward) turned half about x. A
    viewer's camera at the origin sees what the video's saw.

    Args:
        vertices_camera: (V,3) metres, camera frame.
        faces: (F,3).
    """
    turned = np.asarray(vertices_camera, np.float64) * [1, -1, -1]
    return export_glb(Trimesh(turned, np.asarray(faces), process=False).scene())
