"""Pose as 133 numbers: 29 joints and 23 twists, and back by analytic inverse kinematics (HybrIK, Li et al. 2021).

It is what FastHMR's motion prior and diffusion decoder work on (FastHMR, Tab. 7): joints carry the swing of every bone,
so that only its twist must be given besides. Frame and unit: that of the rotations' root (the camera's, in this
repository), metres, relative to the pelvis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasthmr.conventions import BONE_CHILD, NUM_JOINTS, PARENTS29, PELVIS, SWAP24, SWAP29
from fasthmr.geometry.alignment import rotation_between
from fasthmr.geometry.swing_twist import shortest_swing, split_swing_twist, twist_rotation

NUM_TWISTS = NUM_JOINTS - 1
POSE_DIM = 3 * len(PARENTS29) + 2 * NUM_TWISTS  # 133


class HybridPose(NamedTuple):
    """Joints relative to the pelvis (..., 29, 3), metres, and (cos, sin) of joints 1 to 23's twists (..., 23, 2)."""

    joints: Tensor
    twists: Tensor

    def pack(self) -> Tensor:
        """(..., 133): the joints' numbers, then the twists'."""
        return torch.cat((self.joints.flatten(-2), self.twists.flatten(-2)), dim=-1)

    @classmethod
    def unpack(cls, numbers: Tensor) -> HybridPose:
        """From (..., 133). Raises ValueError for another length."""
        if numbers.shape[-1] != POSE_DIM:
            raise ValueError(f"a hybrid pose has {POSE_DIM} numbers, got shape {tuple(numbers.shape)}")
        joints, twists = numbers.split((POSE_DIM - 2 * NUM_TWISTS, 2 * NUM_TWISTS), dim=-1)
        return cls(joints.unflatten(-1, (-1, 3)), twists.unflatten(-1, (-1, 2)))

    def mirrored(self) -> HybridPose:
        """The pose in a mirror (x -> -x): left and right change places, twists their sense."""
        flip = self.joints.new_tensor((-1.0, 1.0, 1.0))
        swap = [joint - 1 for joint in SWAP24[1:]]
        sense = self.twists.new_tensor((1.0, -1.0))
        return HybridPose(self.joints[..., list(SWAP29), :] * flip, self.twists[..., swap, :] * sense)


def _levels() -> list[tuple[list[int], list[int]]]:
    """Joints 1 to 23 and their parents, by distance from the pelvis: a level is computed at once."""
    depth = [0] * NUM_JOINTS
    for joint in range(1, NUM_JOINTS):
        depth[joint] = depth[PARENTS29[joint]] + 1
    by_depth = [[j for j in range(1, NUM_JOINTS) if depth[j] == d] for d in range(1, max(depth) + 1)]
    return [(joints, [PARENTS29[j] for j in joints]) for joints in by_depth]


_LEVELS = _levels()
_PELVIS_CHILDREN = [joint for joint, parent in enumerate(PARENTS29) if parent == PELVIS]


def to_hybrid(rotations: Tensor, rest_joints: Tensor) -> HybridPose:
    """29 joints and 23 twists of SMPL rotations.

    Args:
        rotations: (..., 24, 3, 3), each relative to its parent's.
        rest_joints: (..., 29, 3) of the SHAPED body in its rest pose, metres (`BodyModel.rest_joints`).

    Returns:
        The pose; differentiable.
    """
    with torch.autocast(rotations.device.type, enabled=False):  # half precision would move joints by centimetres
        return _to_hybrid(*_at_least_float32(rotations, rest_joints))


def _to_hybrid(rotations: Tensor, rest_joints: Tensor) -> HybridPose:
    bones = _bones(rest_joints)
    _, twists = split_swing_twist(rotations[..., 1:, :, :], bones[..., 1:, :])
    world = [rotations[..., 0, :, :]] + [rotations[..., 0, :, :]] * (NUM_JOINTS - 1)
    for joints, parents in _LEVELS:
        for joint, parent in zip(joints, parents, strict=True):
            world[joint] = world[parent] @ rotations[..., joint, :, :]
    position = [torch.zeros_like(rest_joints[..., 0, :])]
    for joint in range(1, len(PARENTS29)):
        parent = PARENTS29[joint]
        offset = rest_joints[..., joint, :] - rest_joints[..., parent, :]
        position.append(position[parent] + (world[parent] @ offset[..., None])[..., 0])
    return HybridPose(torch.stack(position, dim=-2), twists)


def from_hybrid(pose: HybridPose, rest_joints: Tensor, adaptive: bool = False) -> Tensor:
    """SMPL rotations of 29 joints and 23 twists, by analytic inverse kinematics.

    The pelvis is the best rotation (Kabsch) of its three children: HybrIK's own formula is off by 0.6 m for a body that
    faces away. Every other joint swings its bone to where its child is, and twists about it. Bones whose lengths do not
    fit `rest_joints` keep their directions; or, if `adaptive`, aim from where the joints above have really put them.
    That meets noisy joints better (10 mm of noise: 10.9 instead of 11.7 mm in a walk, 21 instead of 29 mm in extreme
    poses), but turns more of an error of the shape into one of rotations. HybrIK's own, which falls back to the naive
    one where a bone's length is off, meets them no better than that.

    Args:
        pose: joints relative to the pelvis and twists; twists need not be normalised.
        rest_joints: (..., 29, 3) of the SHAPED body in its rest pose, metres.
        adaptive: HybrIK's adaptive inverse kinematics instead of its naive one.

    Returns:
        (..., 24, 3, 3) rotations, each relative to its parent's; differentiable, finite for every pose.
    """
    with torch.autocast(rest_joints.device.type, enabled=False):
        joints, twists, rest_joints = _at_least_float32(*pose, rest_joints)
        return _from_hybrid(HybridPose(joints, twists), rest_joints, adaptive)


def _from_hybrid(pose: HybridPose, rest_joints: Tensor, adaptive: bool) -> Tensor:
    joints = pose.joints - pose.joints[..., PELVIS : PELVIS + 1, :]
    bones = _bones(rest_joints)
    rest_children = rest_joints[..., _PELVIS_CHILDREN, :] - rest_joints[..., PELVIS : PELVIS + 1, :]
    root = rotation_between(rest_children, joints[..., _PELVIS_CHILDREN, :])
    local: list[Tensor] = [root] * NUM_JOINTS
    world: list[Tensor] = [root] * NUM_JOINTS
    placed = list(joints[..., :NUM_JOINTS, :].unbind(-2))  # where bones begin
    children = list(BONE_CHILD)
    twists = twist_rotation(bones[..., 1:, :], pose.twists)
    for level, parents in _LEVELS:
        above = torch.stack([world[parent] for parent in parents], dim=-3)
        if adaptive:
            offset = rest_joints[..., level, :] - rest_joints[..., parents, :]
            begin = torch.stack([placed[p] for p in parents], dim=-2) + (above @ offset[..., None])[..., 0]
            for place, joint in enumerate(level):
                placed[joint] = begin[..., place, :]
        else:
            begin = joints[..., level, :]
        toward = joints[..., [children[joint] for joint in level], :] - begin
        aim = torch.nn.functional.normalize((above.mT @ toward[..., None])[..., 0], dim=-1)
        rotation = shortest_swing(bones[..., level, :], aim) @ twists[..., [joint - 1 for joint in level], :, :]
        for place, joint in enumerate(level):
            local[joint] = rotation[..., place, :, :]
            world[joint] = above[..., place, :, :] @ local[joint]
    return torch.stack(local, dim=-3)


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _bones(rest_joints: Tensor) -> Tensor:
    """Unit vectors (..., 24, 3) from every joint to the child that defines its bone, in the rest pose."""
    return torch.nn.functional.normalize(
        rest_joints[..., list(BONE_CHILD), :] - rest_joints[..., :NUM_JOINTS, :], dim=-1
    )
