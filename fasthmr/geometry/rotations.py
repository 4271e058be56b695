"""Rotations: axis-angle, matrices and the 6D form, batched over leading dimensions and differentiable.

Convention: right-handed; a matrix acts on column vectors (`rotated = R @ v`); axis-angle is the unit axis times the
angle in radians. A worked number: `axis_angle_to_matrix([0, 0, pi/2])` turns (1, 0, 0) into (0, 1, 0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: below this squared argument, series replace quotients of the form 0/0; their error is then under 1e-16.
_SERIES_BELOW = 1e-4


def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """Rotation matrix of an axis-angle vector (Rodrigues' formula); smooth at angle 0.

    Args:
        axis_angle: (..., 3) radians.

    Returns:
        (..., 3, 3) rotation matrices.
    """
    _require_last("axis_angle", axis_angle, 3)
    angle_sq = (axis_angle * axis_angle).sum(-1)[..., None, None]
    small = angle_sq < _SERIES_BELOW
    # `where` twice: the branch not taken must not see an angle of 0 either, or its NaN gradient would leak.
    angle = torch.where(small, torch.ones_like(angle_sq), angle_sq).sqrt()
    sin_over_angle = torch.where(
        small, 1 - angle_sq / 6 * (1 - angle_sq / 20 * (1 - angle_sq / 42)), angle.sin() / angle
    )
    versine = 2 * (angle / 2).sin().square()  # 1 - cos(angle) without its cancellation
    versine_over_sq = torch.where(
        small, 0.5 * (1 - angle_sq / 12 * (1 - angle_sq / 30 * (1 - angle_sq / 56))), versine / (angle * angle)
    )
    cross = cross_matrix(axis_angle)
    identity = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    return identity + sin_over_angle * cross + versine_over_sq * (cross @ cross)


def matrix_to_axis_angle(matrix: Tensor) -> Tensor:
    """Axis-angle of a rotation matrix, with an angle in [0, pi].

    Values and gradients are finite everywhere. At an angle of pi the axis is defined up to its sign: either is
    returned, and both give the same matrix.

    Args:
        matrix: (..., 3, 3) rotation matrices.

    Returns:
        (..., 3) radians.
    """
    _require_last("matrix", matrix, 3, 3)
    quaternion = _matrix_to_quaternion(matrix)
    # Of the two quaternions of a rotation take the one with w >= 0: its angle is at most pi.
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    w, v = quaternion[..., :1], quaternion[..., 1:]
    v_sq = (v * v).sum(-1, keepdim=True)
    small = v_sq < _SERIES_BELOW
    v_norm = torch.where(small, torch.ones_like(v_sq), v_sq).sqrt()
    w_near_one = torch.where(small, w, torch.ones_like(w))
    tan_sq = v_sq / (w_near_one * w_near_one)
    angle_over_norm = torch.where(
        small,
        2 / w_near_one * (1 - tan_sq * (1 / 3 - tan_sq * (1 / 5 - tan_sq / 7))),
        2 * torch.atan2(v_norm, w) / v_norm,
    )
    return angle_over_norm * v


def rotation_6d_to_matrix(rotation_6d: Tensor) -> Tensor:
    """Rotation matrix of the 6D form by Gram-Schmidt (Zhou et al. 2019), in the number order of HMR2.0 and CameraHMR.

    The first three numbers are the matrix's first COLUMN and the next three its second column, before
    orthonormalisation (`4D-Humans/hmr2/utils/geometry.py`). Other code bases interleave the two columns or use rows.

    Args:
        rotation_6d: (..., 6); the two vectors must be neither zero nor parallel. There the result is finite but not a
            rotation.

    Returns:
        (..., 3, 3) rotation matrices.
    """
    _require_last("rotation_6d", rotation_6d, 6)
    first, second = rotation_6d[..., :3], rotation_6d[..., 3:]
    column0 = F.normalize(first, dim=-1)
    column1 = F.normalize(second - (column0 * second).sum(-1, keepdim=True) * column0, dim=-1)
    column2 = torch.linalg.cross(column0, column1, dim=-1)
    return torch.stack((column0, column1, column2), dim=-1)


def matrix_to_rotation_6d(matrix: Tensor) -> Tensor:
    """First and second column of (..., 3, 3) rotation matrices, one after the other: (..., 6)."""
    _require_last("matrix", matrix, 3, 3)
    return torch.cat((matrix[..., :, 0], matrix[..., :, 1]), dim=-1)


def cross_matrix(vector: Tensor) -> Tensor:
    """Matrix K of (..., 3) vectors with `K @ u == cross(vector, u)`: (..., 3, 3)."""
    _require_last("vector", vector, 3)
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).unflatten(-1, (3, 3))


def _matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternions (w, x, y, z) of either sign of (..., 3, 3) rotation matrices: (..., 4).

    The 4x4 matrix 4 q q^T is linear in R, and each of its rows is a multiple of q. The row with the largest diagonal
    element is at least 2 long, so normalising it is exact and its gradient bounded, whatever the rotation.
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in matrix.unbind(-2))
    rows = (
        (1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01),
        (m21 - m12, 1 + m00 - m11 - m22, m01 + m10, m02 + m20),
        (m02 - m20, m01 + m10, 1 - m00 + m11 - m22, m12 + m21),
        (m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22),
    )
    outer = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*outer.shape[:-2], 1, 4)
    return F.normalize(outer.gather(-2, best).squeeze(-2), dim=-1)


def _require_last(name: str, value: Tensor, *last: int) -> None:
    if tuple(value.shape[-len(last) :]) != last:
        expected = ", ".join(map(str, ("...", *last)))
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(value.shape)}")
