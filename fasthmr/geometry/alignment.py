"""Alignment of point sets (Procrustes, Kabsch) without mirroring."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_align(source: Tensor, target: Tensor) -> Tensor:
    """Scale, rotate and shift each source so that it lies as close as possible to its target (Umeyama 1991).

    The rotation's determinant is fixed to +1: a mirrored body is not aligned with its original. Computed in float64,
    because errors of tenths of a millimetre are compared.

    Args:
        source, target: (..., N, 3), same shape, same unit.

    Returns:
        (..., N, 3) aligned source in the source's dtype. Where all source points coincide, it is the target's centroid;
        a set that holds NaN gives NaN and leaves the others alone.

    Raises:
        ValueError: shapes differ or are not (..., N, 3).
    """
    if source.shape != target.shape or source.ndim < 2 or source.shape[-1] != 3:
        raise ValueError(
            f"source and target must both be (..., N, 3), got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    with torch.autocast(source.device.type, enabled=False):
        x, y = source.double(), target.double()
        x_mean, y_mean = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
        # Rounding of the mean must not pass for the shape of a single point: below it, the spread is zero.
        rounding = x.square().sum((-1, -2)) * torch.finfo(x.dtype).eps ** 2
        x, y = x - x_mean, y - y_mean
        spread = x.square().sum((-1, -2))
        covariance = x.mT @ y
        # The decomposition refuses a whole batch for one NaN; NaN comes back in through the points below.
        u, singular, vt = torch.linalg.svd(torch.where(covariance.isfinite(), covariance, 0))
        sign = torch.ones_like(singular)
        sign[..., 2] = torch.linalg.det(u @ vt).sign()
        rotation = (u * sign.unsqueeze(-2)) @ vt  # x @ rotation ~ y: row vectors
        scale = torch.where(spread > rounding, (singular * sign).sum(-1) / spread, 0)
        aligned = scale[..., None, None] * (x @ rotation) + y_mean
    return aligned.to(source.dtype)


def rotation_between(source: Tensor, target: Tensor) -> Tensor:
    """The rotation about the origin that brings each source as close as possible to its target (Kabsch 1976).

    Args:
        source, target: (..., N, 3), same shape; points relative to the centre of rotation.

    Returns:
        (..., 3, 3) with `R @ source ~ target`, in the target's dtype, computed in float64; differentiable where it is
        unique.
    """
    with torch.autocast(target.device.type, enabled=False):
        u, _, vt = torch.linalg.svd(target.double().mT @ source.double())
        sign = torch.ones_like(u[..., 0])
        sign[..., 2] = torch.linalg.det(u @ vt).sign()
        return ((u * sign.unsqueeze(-2)) @ vt).to(target.dtype)
