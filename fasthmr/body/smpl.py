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

    Raises:
        BodyMismatchError: naming both ids.
    """
    if got_id != expected_id:
        raise BodyMismatchError(
            f"{where} belongs to body {got_id!r}, but this run uses body {expected_id!r}: "
            "use data and checkpoints of one body (the option `body` chooses it)"
        )


@dataclass(frozen=True)
class BodyOutput:
    """A posed batch: `vertices` (B,V,3), the 24 `joints` (B,24,3) and with the five leaves `joints29` (B,29,3); metres."""

    vertices: Tensor
    joints: Tensor
    joints29: Tensor


class BodyModel(nn.Module):
    """A body in SMPL's format: linear shape, 24 joints, linear blend skinning (Loper et al. 2015).

    Convention: rest pose is a T pose, y up, facing +z, left is +x. `rotations` act on column vectors, each relative to its
    parent. `translation` moves the whole body; the pelvis is then at `rest_joints(betas)[:, 0] + translation`.

    Buffers are never saved: bodies are licensed to their users, so no checkpoint may contain one. A checkpoint holds `id`.

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
    _parents24: Tensor
    _parents29: Tensor

    def __init__(self, arrays: BodyArrays, name: str) -> None:
        super().__init__()
        self.name = name
        self.id = f"{name}@{_digest(arrays)}"
        leaves = list(arrays.leaf_vertices)
        buffers = {
            "faces": torch.from_numpy(arrays.faces),
            "lbs_weights": torch.from_numpy(arrays.weights),
            "mirror_index": None if arrays.mirror_index is None else torch.from_numpy(arrays.mirror_index),
            "_template": torch.from_numpy(arrays.template),
            "_shape_dirs": torch.from_numpy(arrays.shape_dirs),
            # smplx wants (207, V*3)
            "_pose_dirs": torch.from_numpy(np.ascontiguousarray(arrays.pose_dirs.reshape(-1, arrays.pose_dirs.shape[-1]).T)),
            "_regressor": torch.from_numpy(arrays.joint_regressor),
            "_parents24": torch.tensor(PARENTS24),
            "_parents29": torch.tensor(PARENTS29),
        }
        # The 29 rest joints are linear in betas, so posing joints alone needs no vertices.
        regressor = arrays.joint_regressor.astype(np.float64)
        template, dirs = arrays.template.astype(np.float64), arrays.shape_dirs.astype(np.float64)
        rest = np.concatenate([regressor @ template, template[leaves]])
        rest_dirs = np.concatenate([np.einsum("jv,vck->jck", regressor, dirs), dirs[leaves]])
        buffers["_rest_template"] = torch.from_numpy(rest.astype(np.float32))
        buffers["_rest_dirs"] = torch.from_numpy(rest_dirs.astype(np.float32))
        for key, value in buffers.items():
            self.register_buffer(key, value, persistent=False)

    @property
    def num_vertices(self) -> int:
        return len(self._template)

    def rest_vertices(self, betas: Tensor) -> Tensor:
        """Shaped vertices in the rest pose, (B,10) -> (B,V,3) metres."""
        return self._template + torch.einsum("vck,bk->bvc", self._shape_dirs, betas)

    def rest_joints(self, betas: Tensor) -> Tensor:
        """Shaped joints and leaves in the rest pose, (B,10) -> (B,29,3) metres."""
        return self._rest_template + torch.einsum("jck,bk->bjc", self._rest_dirs, betas)

    def joints29(self, rotations: Tensor, betas: Tensor, translation: Tensor | None = None) -> Tensor:
        """Posed joints without the vertices; the same numbers as `forward(...).joints29`, much cheaper."""
        with torch.autocast(betas.device.type, enabled=False):
            rotations, betas = self._checked(rotations, betas)
            # Leaves are rigid points of their parents: joints of their own that never rotate.
            still = torch.eye(3, device=betas.device).expand(len(betas), len(PARENTS29) - NUM_JOINTS, 3, 3)
            everything = torch.cat([rotations, still], dim=1)
            joints, _ = batch_rigid_transform(everything, self.rest_joints(betas), self._parents29)
            return joints if translation is None else joints + translation.float()[:, None]

    def forward(self, rotations: Tensor, betas: Tensor, translation: Tensor | None = None) -> BodyOutput:
        """Pose the body.

        Args:
            rotations: (B,24,3,3), joint 0 is the root orientation.
            betas: (B,10).
            translation: (B,3) metres, or None for zero.

        Raises:
            ValueError: a shape is wrong.
        """
        with torch.autocast(betas.device.type, enabled=False):
            rotations, betas = self._checked(rotations, betas)
            vertices, _ = lbs(
                betas, rotations, self._template[None], self._shape_dirs, self._pose_dirs, self._regressor,
                self._parents24, self.lbs_weights, pose2rot=False,
            )  # fmt: skip
            if translation is not None:
                vertices = vertices + translation.float()[:, None]
            joints29 = self.joints29(rotations, betas, translation)
        return BodyOutput(vertices, joints29[:, :NUM_JOINTS], joints29)

    @staticmethod
    def _checked(rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
        if rotations.shape[1:] != (NUM_JOINTS, 3, 3) or betas.shape != (len(rotations), NUM_BETAS):
            raise ValueError(
                f"rotations must be (B,{NUM_JOINTS},3,3) and betas (B,{NUM_BETAS}), "
                f"got {tuple(rotations.shape)} and {tuple(betas.shape)}"
            )
        return rotations.float(), betas.float()


def load_body(path: str | Path = "free") -> BodyModel:
    """Load a body: "free" for the one in this package, or an SMPL_*.pkl, SMPL_*.npz or our own .npz file.

    Raises:
        FileNotFoundError: there is no such file; says where to get it and where to put it.
        BodyFileError: the file is not a body in SMPL's format, or holds something that may not be loaded.
    """
    if str(path) == "free":
        return BodyModel(read_body_file(FREE_BODY), "free")
    return BodyModel(read_body_file(Path(path)), Path(path).stem)


def _digest(arrays: BodyArrays) -> str:
    """First 16 hex digits of a SHA-256 over everything that moves a vertex, little-endian, in one order."""
    sha = hashlib.sha256()
    for array, kind in (
        (arrays.template, "<f4"), (arrays.shape_dirs, "<f4"), (arrays.pose_dirs, "<f4"), (arrays.joint_regressor, "<f4"),
        (arrays.weights, "<f4"), (arrays.faces, "<i8"), (np.array(arrays.leaf_vertices), "<i8"),
    ):  # fmt: skip
        sha.update(str(array.shape).encode())
        sha.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return sha.hexdigest()[:16]
