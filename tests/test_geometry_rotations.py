"""Rotations: round trips, gradients, and the angles 0 and pi where formulas break."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from fasthmr.geometry.rotations import (
    axis_angle_to_matrix,
    cross_matrix,
    matrix_to_axis_angle,
    matrix_to_rotation_6d,
    rotation_6d_to_matrix,
)

ANGLES = (0.0, 1e-12, 1e-6, 0.009, 0.0101, 0.5, 2.0, 3.0, math.pi - 1e-3, math.pi - 1e-7)
X_FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))


def unit_axes(count: int = 50, seed: int = 0) -> torch.Tensor:
    axes = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(axes, dim=-1)


def test_a_quarter_turn_about_z_takes_x_to_y():
    matrix = axis_angle_to_matrix(torch.tensor([0.0, 0.0, math.pi / 2]))
    torch.testing.assert_close(matrix @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("angle", [*ANGLES, math.pi, 4.0])
def test_matrix_equals_the_matrix_exponential(angle):
    axis_angle = unit_axes() * angle
    torch.testing.assert_close(
        axis_angle_to_matrix(axis_angle), torch.matrix_exp(cross_matrix(axis_angle)), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("angle", ANGLES)
def test_axis_angle_round_trip(angle):
    axis_angle = unit_axes() * angle
    back = matrix_to_axis_angle(axis_angle_to_matrix(axis_angle))
    torch.testing.assert_close(back, axis_angle, rtol=1e-9, atol=1e-14 if angle < 3 else 1e-8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_at_pi_either_axis_gives_the_same_matrix(dtype, tolerance):
    axes = torch.cat([unit_axes(), torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)]).to(dtype)
    matrix = 2 * axes[:, :, None] * axes[:, None, :] - torch.eye(3, dtype=dtype)  # the turn by pi about each axis
    axis_angle = matrix_to_axis_angle(matrix)
    torch.testing.assert_close(axis_angle.norm(dim=-1), torch.full((56,), math.pi, dtype=dtype))
    torch.testing.assert_close(axis_angle_to_matrix(axis_angle), matrix, rtol=0, atol=10 * tolerance)


def test_an_angle_above_pi_comes_back_as_the_shorter_turn():
    axes = unit_axes()
    torch.testing.assert_close(matrix_to_axis_angle(axis_angle_to_matrix(axes * 4.0)), axes * (4.0 - 2 * math.pi))


@pytest.mark.parametrize("angle", [0.0, 1e-8, 0.0099, 1.0, 3.1])
def test_gradients_of_axis_angle(angle):
    axis_angle = (unit_axes(3) * angle).requires_grad_()
    assert gradcheck(axis_angle_to_matrix, axis_angle)
    assert gradcheck(lambda a: matrix_to_axis_angle(axis_angle_to_matrix(a)), axis_angle)


def test_gradients_stay_finite_where_the_axis_is_undefined():
    matrix = torch.stack([torch.eye(3, dtype=torch.float64), X_FLIP]).requires_grad_()
    matrix_to_axis_angle(matrix).sum().backward()
    assert matrix.grad.isfinite().all()


def test_6d_round_trip_and_column_order():
    matrix = axis_angle_to_matrix(unit_axes() * 2.5)
    six = matrix_to_rotation_6d(matrix)
    torch.testing.assert_close(rotation_6d_to_matrix(six), matrix)
    torch.testing.assert_close(six[:, :3], matrix[:, :, 0])
    torch.testing.assert_close(six[:, 3:], matrix[:, :, 1])


def test_6d_of_anything_is_a_rotation():
    six = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = rotation_6d_to_matrix(six)
    identity = torch.eye(3, dtype=torch.float64).expand(2, 7, 3, 3)
    torch.testing.assert_close(matrix @ matrix.mT, identity)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(2, 7, dtype=torch.float64))
    assert gradcheck(rotation_6d_to_matrix, six.clone().requires_grad_())


def test_degenerate_6d_is_finite():
    six = torch.tensor([[0.0] * 6, [1.0, 0, 0, 2, 0, 0]], requires_grad=True)
    matrix = rotation_6d_to_matrix(six)
    matrix.sum().backward()
    assert matrix.isfinite().all() and six.grad.isfinite().all()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"axis_angle must have shape \(\.\.\., 3\), got \(2, 4\)"):
        axis_angle_to_matrix(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"matrix must have shape \(\.\.\., 3, 3\), got \(9,\)"):
        matrix_to_axis_angle(torch.zeros(9))
