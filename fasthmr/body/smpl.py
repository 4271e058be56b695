"""BodyModel: shape and pose in, vertices and joints out, for any body in SMPL's format; skinning by `smplx`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from smplx.lbs import batch_rigid_transform, lbs
from torch import Tensor, nn

from fasthmr.body.files import FREE_BODY, BodyArrays, read_body_file
from fasthmr.conventions import NUM_BETAS, NUM_JOINTS, PARENTS24, PARENTS29


class BodyMismatchError(ValueError):
    """Labels, weights or results of two different bodies were about to be mixed."""


def require_same_body(expected_id: str, got_id: str | None, where: str) -> None:
    """Refuse to mix bodies: betas, joints and errors of different bodies are not comparable.

    The numbers decide, not the file's name: what follows the @ of the two ids.

    Args:
        expected_id: `BodyModel.id` of the body in use.
        got_id: the id stored in a checkpoint, shard or table; None where nothing is stored.
        where: what holds it, for the message, such as a path.

    Raises:
        BodyMismatchError: naming both ids.
    """
    if got_id is None or got_id.partition("@")[2] != expected_id.partition("@")[2]:
        raise BodyMismatchError(
            f"{where} belongs to {'no body' if got_id is None else f'body {got_id!r}'}, but this run uses body "
            f"{expected_id!r}: use data and checkpoints of one body (the option `body` chooses it)"
        )


@dataclass(frozen=True)
class BodyOutput:
    """A posed batch in metres: `vertices` (B,V,3), `joints` (B,24,3), and `joints29` (B,29,3) with the five leaves."""

    vertices: Tensor
    joints: Tensor
    joints29: Tensor


class BodyModel(nn.Module):
    """A body in SMPL's format: linear shapes, 24 joints, linear blend skinning (Loper et al. 2015, section 3).

    The rest pose is a T pose: y up, facing +z, left is +x. `rotations` act on column vectors, each relative to its
    parent. `translation` moves the whole body: the pelvis is at `rest_joints(betas)[:, 0] + translation`. The five
    leaves (head top, finger tips, toes) are rigid points of their parent joints, where HybrIK has them.

    It computes in float32, also under autocast. With torch.set_float32_matmul_precision below "highest", joints on a
    GPU would be wrong by up to a millimetre.

    Buffers are never saved: bodies are licensed to their users, so no checkpoint may hold one. A checkpoint holds `id`.

    Args:
        arrays: what a body file contains, checked.
        name: how the body is called in `id`.
    """

    faces: Tensor
    lbs_weights: Tensor
    mirror_index: Tensor | None
    _template: Tensor
    _shape_dirs: Tensor
    _pose_dirs: Tensor
    _regressor: Tensor
    _rest_template: Tensor
    _rest_dirs: Tensor

    def __init__(self, arrays: BodyArrays, name: str) -> None:
        super().__init__()
        self.name = name
        self.id = f"{name}@{_digest(arrays)}"
        # On the CPU for good: smplx walks the tree with them in Python, and each look would wait for the GPU.
        self._parents24, self._parents29 = torch.tensor(PARENTS24), torch.tensor(PARENTS29)
        rest_template, rest_dirs = _rest_joint_basis(arrays)
        buffers = {
            "faces": arrays.faces,
            "lbs_weights": arrays.weights,
            "mirror_index": arrays.mirror_index,
            "_template": arrays.template,
            "_shape_dirs": arrays.shape_dirs,
            "_pose_dirs": _smplx_pose_dirs(arrays.pose_dirs),
            "_regressor": arrays.joint_regressor,
            "_rest_template": rest_template,
            "_rest_dirs": rest_dirs,
        }
        for key, array in buffers.items():
            self.register_buffer(key, None if array is None else torch.from_numpy(array), persistent=False)

    @property
    def num_vertices(self) -> int:
        return len(self._template)

    def rest_vertices(self, betas: Tensor) -> Tensor:
        """Shaped vertices in the rest pose, (B,10) -> (B,V,3) metres."""
        with torch.autocast(betas.device.type, enabled=False):
            return self._template + torch.einsum("vck,bk->bvc", self._shape_dirs, betas.float())

    def rest_joints(self, betas: Tensor) -> Tensor:
        """Shaped joints and leaves in the rest pose, (B,10) -> (B,29,3) metres."""
        with torch.autocast(betas.device.type, enabled=False):
            return self._rest_template + torch.einsum("jck,bk->bjc", self._rest_dirs, betas.float())

    def joints29(self, rotations: Tensor, betas: Tensor, translation: Tensor | None = None) -> Tensor:
        """Posed joints and leaves without the vertices: the numbers of `forward(...).joints29`, far cheaper.

        Arguments and errors as for `forward`; returns (B,29,3) metres.
        """
        rotations, betas, translation = _checked(rotations, betas, translation)
        with torch.autocast(betas.device.type, enabled=False):
            # A leaf is a joint of its own that never turns.
            leaves = torch.eye(3, device=betas.device).expand(len(betas), len(PARENTS29) - NUM_JOINTS, 3, 3)
            joints, _ = batch_rigid_transform(
                torch.cat([rotations, leaves], dim=1), self.rest_joints(betas), self._parents29
            )
            return joints if translation is None else joints + translation[:, None]

    def forward(self, rotations: Tensor, betas: Tensor, translation: Tensor | None = None) -> BodyOutput:
        """Pose the body.

        Args:
            rotations: (B,24,3,3) rotation matrices; joint 0 is the orientation of the whole body, about the pelvis.
            betas: (B,10).
            translation: (B,3) metres, or None for zero.

        Raises:
            ValueError: a shape is wrong.
        """
        rotations, betas, translation = _checked(rotations, betas, translation)
        with torch.autocast(betas.device.type, enabled=False):
            vertices, _ = lbs(
                betas, rotations, self._template[None], self._shape_dirs, self._pose_dirs, self._regressor,
                self._parents24, self.lbs_weights, pose2rot=False,
            )  # fmt: skip
            if translation is not None:
                vertices = vertices + translation[:, None]
        joints29 = self.joints29(rotations, betas, translation)
        return BodyOutput(vertices, joints29[:, :NUM_JOINTS], joints29)


def load_body(path: str | Path = "free") -> BodyModel:
    """Load a body: "free" for the one in this package, or an SMPL_*.pkl, SMPL_*.npz or file of our own generator.

    Raises:
        FileNotFoundError: there is no such file; says where to get it and where to put it.
        BodyFileError: the file is not a body in SMPL's format, or holds something that may not be loaded.
    """
    if str(path) == "free":
        return BodyModel(read_body_file(FREE_BODY), "free")
    return BodyModel(read_body_file(Path(path)), Path(path).stem)


def _checked(rotations: Tensor, betas: Tensor, translation: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    batch = len(rotations)
    if rotations.shape != (batch, NUM_JOINTS, 3, 3) or betas.shape != (batch, NUM_BETAS):
        raise ValueError(
            f"rotations must be (B,{NUM_JOINTS},3,3) and betas (B,{NUM_BETAS}) with one B, "
            f"got {tuple(rotations.shape)} and {tuple(betas.shape)}"
        )
    if translation is None:
        return rotations.float(), betas.float(), None
    if translation.shape != (batch, 3):
        raise ValueError(f"translation must be ({batch},3) like the {batch} rotations, got {tuple(translation.shape)}")
    return rotations.float(), betas.float(), translation.float()


def _rest_joint_basis(arrays: BodyArrays) -> tuple[np.ndarray, np.ndarray]:
    """Mean (29,3) and shapes (29,3,10) of the rest joints: they are linear in betas, so they need no vertices."""
    regressor, leaves = arrays.joint_regressor.astype(np.float64), arrays.leaf_vertices
    template, dirs = arrays.template.astype(np.float64), arrays.shape_dirs.astype(np.float64)
    mean = np.concatenate([regressor @ template, template[leaves]])
    shapes = np.concatenate([np.einsum("jv,vck->jck", regressor, dirs), dirs[leaves]])
    return mean.astype(np.float32), shapes.astype(np.float32)


def _smplx_pose_dirs(pose_dirs: np.ndarray | None) -> np.ndarray:
    """smplx's layout (207, V*3). Without any, zeros of one vertex, which smplx's addition broadcasts over all."""
    if pose_dirs is None:
        return np.zeros(((NUM_JOINTS - 1) * 9, 3), np.float32)
    return np.ascontiguousarray(pose_dirs.reshape(-1, pose_dirs.shape[-1]).T)


def _digest(arrays: BodyArrays) -> str:
    """First 16 hex digits of a SHA-256 over all that places a vertex, a leaf or a face; little-endian, fixed order."""
    sha = hashlib.sha256()
    for array, dtype in (
        (arrays.template, "<f4"),
        (arrays.shape_dirs, "<f4"),
        (arrays.pose_dirs, "<f4"),
        (arrays.joint_regressor, "<f4"),
        (arrays.weights, "<f4"),
        (arrays.faces, "<i8"),
        (arrays.leaf_vertices, "<i8"),
    ):
        if array is not None:
            sha.update(str(array.shape).encode())
            sha.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return sha.hexdigest()[:16]
