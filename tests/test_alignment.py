"""Similarity alignment: undoes scale, rotation and shift, never mirrors, and survives degenerate input."""

import pytest
import torch

from fasthmr.geometry.alignment import similarity_align
from fasthmr.geometry.rotations import axis_angle_to_matrix


@pytest.fixture
def points() -> torch.Tensor:
    return torch.randn(5, 24, 3, generator=torch.Generator().manual_seed(0))


def test_undoes_any_similarity(points):
    rotation = axis_angle_to_matrix(torch.tensor([0.3, -2.0, 1.1]))
    moved = 0.4 * points @ rotation.T + torch.tensor([1.0, -2.0, 30.0])

    torch.testing.assert_close(similarity_align(moved, points), points, atol=2e-5, rtol=0)


def test_a_mirrored_body_stays_wrong(points):
    mirrored = points * torch.tensor([-1.0, 1.0, 1.0])

    distance = (similarity_align(mirrored, points) - points).norm(dim=-1).mean()

    assert distance > 0.3


def test_is_the_best_alignment(points):
    target = points + 0.3 * torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
    aligned = similarity_align(points, target)
    best = (aligned - target).square().sum((-1, -2))

    for axis in torch.eye(3) * 0.02:
        turned = (aligned - aligned.mean(-2, keepdim=True)) @ axis_angle_to_matrix(axis).T
        other = turned + aligned.mean(-2, keepdim=True)
        assert ((other - target).square().sum((-1, -2)) > best).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coinciding_points_land_on_the_targets_centroid(points, dtype):
    points = points.to(dtype)
    collapsed = torch.full_like(points, 0.1) + torch.tensor([0.0, 1.3, 2.7], dtype=dtype)

    aligned = similarity_align(collapsed, points)

    torch.testing.assert_close(aligned, points.mean(-2, keepdim=True).expand_as(points))
    assert similarity_align(points, collapsed).isfinite().all()


def test_points_on_a_line_give_finite_values(points):
    line = torch.linspace(0, 1, 24)[:, None] * torch.tensor([1.0, 2.0, 3.0])

    assert similarity_align(line.expand_as(points), points).isfinite().all()


def test_a_nan_stays_in_its_own_frame(points):
    broken = points.clone()
    broken[2, 7, 1] = torch.nan

    aligned = similarity_align(broken, points)

    assert aligned[2].isnan().any()
    torch.testing.assert_close(aligned[[0, 1, 3, 4]], points[[0, 1, 3, 4]], atol=1e-5, rtol=0)


def test_nothing_to_align(points):
    assert similarity_align(points[:0], points[:0]).shape == (0, 24, 3)


def test_shapes_are_checked(points):
    with pytest.raises(ValueError, match=r"must both be .* got \(5, 24, 3\) and \(5, 23, 3\)"):
        similarity_align(points, points[:, 1:])
