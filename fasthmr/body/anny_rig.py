"""Anny's rig (104 bones) seen as SMPL's 24 joints: which bones make a joint, and how Anny's rest becomes a T pose.

Needs the optional package `anny` (see generate.py). Everything here is in our frame: y up, facing +z, left +x, metres.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fasthmr.conventions import JOINT_INDEX, NUM_JOINTS, SWAP24

if TYPE_CHECKING:
    from anny import Anny

#: The bones whose skinning weights a joint takes over, by the start of their names. A right-hand bone (".R") goes to
#: the joint of the other side. The thumb rides with the palm, as SMPL's hand joint bends only the fingers.
BONES_OF_JOINT = {
    "pelvis": ("root", "pelvis", "spine05"),
    "spine1": ("spine04", "spine03"),
    "spine2": ("spine02",),
    "spine3": ("spine01",),
    "neck": ("neck01", "neck02"),
    "head": ("neck03", "head", "eye"),
    "left_collar": ("clavicle", "shoulder01"),
    "left_shoulder": ("upperarm",),
    "left_elbow": ("lowerarm",),
    "left_wrist": ("wrist", "metacarpal", "finger1"),
    "left_hand": ("finger2", "finger3", "finger4", "finger5"),
    "left_hip": ("upperleg",),
    "left_knee": ("lowerleg",),
    "left_ankle": ("foot",),
    "left_foot": ("toe",),
}

#: A joint lies at the head of this bone; of several, at the mean of their heads.
HEADS_OF_JOINT = {
    "pelvis": ("root",),
    "spine1": ("spine04",),
    "spine2": ("spine02",),
    "spine3": ("spine01",),
    "neck": ("neck01",),
    "head": ("neck03",),
    "left_collar": ("clavicle.L",),
    "left_shoulder": ("upperarm01.L",),
    "left_elbow": ("lowerarm01.L",),
    "left_wrist": ("wrist.L",),
    "left_hand": tuple(f"finger{i}-1.L" for i in (2, 3, 4, 5)),
    "left_hip": ("upperleg01.L",),
    "left_knee": ("lowerleg01.L",),
    "left_ankle": ("foot.L",),
    "left_foot": tuple(f"toe{i}-1.L" for i in (1, 2, 3, 4)),
}

# The T pose. Arms: straight out; lifting them from Anny's A pose also lifts clavicle and shoulder blade a little, as in
# a person. Thighs: slightly apart, shins: vertical with the ankle a little behind the knee; the feet keep their turn.
_CLAVICLE_LIFT, _SHOULDER_LIFT = np.radians(5.0), np.radians(9.0)
_THIGH_DIRECTION = np.array([0.07, -1.0, 0.01])  # of the left leg
_SHIN_DIRECTION = np.array([0.0, -1.0, -0.06])

_Y_UP_FROM_Z_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
_FORWARD = np.array([0.0, 0.0, 1.0])


class AnnyRig:
    """Anny's mesh, bones and weights as numpy arrays; V vertices, K bones.

    Attributes:
        bones: K names, parents before children. faces: (F,3). bone_weights: (V,K). joint_weights: (V,24).
    """

    def __init__(self, model: Anny) -> None:
        self._model = model
        self.bones = list(model.bone_labels)
        self._index = {bone: i for i, bone in enumerate(self.bones)}
        self._parents = [int(p) for p in model.bone_parents]
        self.faces = model.faces.numpy().astype(np.int64)
        self.bone_weights = np.zeros((len(model.template_vertices), len(self.bones)))
        rows = np.arange(len(self.bone_weights))[:, None]
        np.add.at(self.bone_weights, (rows, model.vertex_bone_indices.numpy()), model.vertex_bone_weights.numpy())
        self.joint_weights = np.zeros((len(self.bone_weights), NUM_JOINTS))
        for column, bone in enumerate(self.bones):
            self.joint_weights[:, _joint_of_bone(bone)] += self.bone_weights[:, column]

    def weight_of(self, bone: str) -> np.ndarray:
        """(V,) how much each vertex follows this bone."""
        return self.bone_weights[:, self._index[bone]]

    def rest(self, phenotypes: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Anny's rest pose of B shapes: vertices (B,V,3) and bone heads (B,K,3)."""
        with torch.no_grad():
            out = self._model(phenotype_kwargs={name: torch.as_tensor(value) for name, value in phenotypes.items()})
        return out["rest_vertices"].numpy() @ _Y_UP_FROM_Z_UP.T, out["rest_bone_heads"].numpy() @ _Y_UP_FROM_Z_UP.T

    def to_t_pose(self, vertices: np.ndarray, heads: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bring shapes from Anny's rest into the T pose.

        By inverse skinning: the result is the mesh that, skinned back to Anny's rest, is Anny's rest exactly. So
        nothing is lost where weights mix (skinning forwards would collapse the shoulders).

        Args:
            vertices: (B,V,3) Anny's rest. heads: (B,K,3). kept: (N,) the vertices wanted.

        Returns:
            (B,N,3) vertices and (B,24,3) joints in the T pose.
        """
        turned = self._t_pose_rotations(heads)
        posed = heads.copy()
        for bone, parent in enumerate(self._parents):
            if parent >= 0:
                offset = heads[:, bone] - heads[:, parent]
                posed[:, bone] = posed[:, parent] + np.einsum("bij,bj->bi", turned[:, parent], offset)
        back = np.swapaxes(turned, -1, -2)
        shift = heads - np.einsum("bkij,bkj->bki", back, posed)
        weights = self.bone_weights[kept]
        matrix = np.einsum("vk,bkij->bvij", weights, back, optimize=True)
        offset = np.einsum("vk,bki->bvi", weights, shift, optimize=True)
        t_vertices = np.linalg.solve(matrix, (vertices[:, kept] - offset)[..., None])[..., 0]
        return t_vertices, self._joints(posed)

    def _joints(self, heads: np.ndarray) -> np.ndarray:
        joints = np.zeros((len(heads), NUM_JOINTS, 3))
        for name, bones in HEADS_OF_JOINT.items():
            joints[:, JOINT_INDEX[name]] = self._mean_head(heads, bones)
            if name.startswith("left_"):
                right = tuple(bone.removesuffix("L") + "R" for bone in bones)
                joints[:, SWAP24[JOINT_INDEX[name]]] = self._mean_head(heads, right)
        return joints

    def _mean_head(self, heads: np.ndarray, bones: tuple[str, ...]) -> np.ndarray:
        return heads[:, [self._index[bone] for bone in bones]].mean(1)

    def _t_pose_rotations(self, heads: np.ndarray) -> np.ndarray:
        """(B,K,3,3) turns of the bones, in the world, from Anny's rest to the T pose."""
        turned = np.broadcast_to(np.eye(3), (*heads.shape[:2], 3, 3)).copy()
        for side, sign in (("L", 1.0), ("R", -1.0)):

            def head(bone: str, side: str = side) -> np.ndarray:
                return heads[:, self._index[f"{bone}.{side}"]]

            def turn(bones: tuple[str, ...], rotation: np.ndarray, side: str = side) -> None:
                for i, bone in enumerate(self.bones):
                    if bone.endswith(f".{side}") and bone.startswith(bones):
                        turned[:, i] = rotation

            outwards = np.array([sign, 0.0, 0.0])
            upper_arm = head("lowerarm01") - head("upperarm01")
            forearm = head("wrist") - head("lowerarm01")
            hand = np.mean([head(f"finger{i}-1") for i in (2, 3, 4, 5)], axis=0) - head("wrist")
            little_to_index = head("finger2-1") - head("finger5-1")
            elbow_hinge = np.cross(upper_arm, forearm)
            # In the T pose the elbow bends forwards, and the palm faces down: the index finger is in front.
            hinge_target = _frame(outwards, np.cross(outwards, _FORWARD))
            palm_target = _frame(outwards, _FORWARD)

            turn(("clavicle",), _rotation_z(sign * _CLAVICLE_LIFT))
            turn(("shoulder01",), _rotation_z(sign * _SHOULDER_LIFT))
            turn(("upperarm",), hinge_target @ _transpose(_frame(upper_arm, elbow_hinge)))
            # The forearm's two bones share its twist: the first follows the elbow, the second the palm.
            turn(("lowerarm01",), hinge_target @ _transpose(_frame(forearm, elbow_hinge)))
            turn(("lowerarm02",), palm_target @ _transpose(_frame(forearm, little_to_index)))
            turn(("wrist", "metacarpal", "finger"), palm_target @ _transpose(_frame(hand, little_to_index)))
            thigh, shin = head("lowerleg01") - head("upperleg01"), head("foot") - head("lowerleg01")
            turn(("upperleg",), _shortest_rotation(thigh, _THIGH_DIRECTION * [sign, 1.0, 1.0]))
            turn(("lowerleg",), _shortest_rotation(shin, _SHIN_DIRECTION))
        return turned


def _joint_of_bone(bone: str) -> int:
    matches = [JOINT_INDEX[joint] for joint, prefixes in BONES_OF_JOINT.items() if bone.startswith(prefixes)]
    if len(matches) != 1:
        raise ValueError(f"Anny's bone {bone!r} belongs to {len(matches)} joints; expected the bones of rig 'anny'")
    return SWAP24[matches[0]] if bone.endswith(".R") else matches[0]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _transpose(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)


def _frame(along: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """(...,3,3) axes in columns: the first along `along`, the second as near to `beside` as possible."""
    first = _unit(along)
    third = _unit(np.cross(first, beside))
    return np.stack([first, np.cross(third, first), third], axis=-1)


def _shortest_rotation(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(...,3,3) the rotation by the smallest angle that turns `start` into `end` (not opposite to each other)."""
    start, end = _unit(start), _unit(end)
    x, y, z = np.moveaxis(np.cross(start, end), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    cosine = (start * end).sum(-1)[..., None, None]
    return np.eye(3) + cross + cross @ cross / (1 + cosine)


def _rotation_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
