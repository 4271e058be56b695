"""SMPL rotations as the numbers that motion prior and diffusion decoder work on, and back: two representations."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fasthmr.body.ik import POSE_DIM, HybridPose, from_hybrid, to_hybrid
from fasthmr.body.smpl import BodyModel
from fasthmr.conventions import NUM_JOINTS, SWAP24
from fasthmr.geometry.rotations import matrix_to_rotation_6d, rotation_6d_to_matrix

#: 29 joints and 23 twists (`fasthmr.body.ik`, FastHMR's own), or every joint's rotation as 6 numbers (its Tab. 7)
Representation = Literal["joints_twists", "rotations_6d"]

#: a rotation R in a mirror (x -> -x) is M R M with M = diag(-1, 1, 1); these are the signs of its first two columns
_MIRRORED_6D = (1.0, -1.0, -1.0, -1.0, 1.0, 1.0)


def pose_dim(representation: Representation) -> int:
    """Numbers of a pose: 133 or 144.

    Raises:
        ValueError: there is no such representation.
    """
    if representation not in get_args(Representation):
        raise ValueError(f"representation must be {' or '.join(get_args(Representation))}, got {representation!r}")
    return POSE_DIM if representation == "joints_twists" else 6 * NUM_JOINTS


def encode_pose(
    rotations: Tensor, betas: Tensor, body: BodyModel, representation: Representation = "joints_twists"
) -> Tensor:
    """The numbers of SMPL rotations: (..., 24, 3, 3) and betas (..., 10) -> (..., 133), or (..., 144) of 6D rotations.

    Frame: that of the root's rotation; joints in metres from the pelvis.
    """
    if representation == "rotations_6d":
        return matrix_to_rotation_6d(rotations).flatten(-2)
    return to_hybrid(rotations, _rest(betas, body)).pack()


def decode_pose(
    numbers: Tensor,
    betas: Tensor,
    body: BodyModel,
    representation: Representation = "joints_twists",
    adaptive: bool = False,
) -> Tensor:
    """SMPL rotations (..., 24, 3, 3) of the numbers (..., 133) or (..., 144) and betas (..., 10).

    Args:
        numbers: of any size; of 6D rotations, neither column may be zero.
        betas: of the body whose rotations are wanted; 6D rotations need none.
        body: likewise.
        representation: of the numbers.
        adaptive: how joints are turned into rotations: see `fasthmr.body.ik.from_hybrid`.

    Raises:
        ValueError: another length than the representation's.
    """
    if representation == "rotations_6d":
        with torch.autocast(numbers.device.type, enabled=False):
            return rotation_6d_to_matrix(_split_6d(numbers.to(torch.promote_types(numbers.dtype, torch.float32))))
    return from_hybrid(HybridPose.unpack(numbers), _rest(betas, body), adaptive)


def mirror_pose(numbers: Tensor, representation: Representation = "joints_twists") -> Tensor:
    """The pose in a mirror (x -> -x), left and right exchanged: (..., 133) or (..., 144) -> the same."""
    if representation == "rotations_6d":
        return (_split_6d(numbers)[..., list(SWAP24), :] * numbers.new_tensor(_MIRRORED_6D)).flatten(-2)
    return HybridPose.unpack(numbers).mirrored().pack()


def _split_6d(numbers: Tensor) -> Tensor:
    if numbers.shape[-1] != (dim := pose_dim("rotations_6d")):
        raise ValueError(f"24 rotations of 6 numbers are {dim} numbers, got shape {tuple(numbers.shape)}")
    return numbers.unflatten(-1, (NUM_JOINTS, 6))


def _rest(betas: Tensor, body: BodyModel) -> Tensor:
    return body.rest_joints(betas.flatten(0, -2)).unflatten(0, betas.shape[:-1]).to(betas.dtype)
