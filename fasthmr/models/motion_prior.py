"""MotionPrior: windows of poses as latents and back, in the numbers that poses are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasthmr.body.pose import pose_dim
from fasthmr.models.motion_vae import LatentMotion, MotionVAE, MotionVAEConfig

#: deviations below this are replaced by it: the pelvis is always zero, and in some motion sets hands never turn
_LEAST_DEVIATION = 0.01


class MotionPrior(nn.Module):
    """A motion VAE and the statistics that its input is normalised with, which are saved with it.

    Args:
        config: sizes of the VAE, and what its numbers are (`fasthmr.body.pose`).

    Raises:
        ValueError: the representation's poses have another number of numbers than the VAE's.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: MotionVAEConfig) -> None:
        super().__init__()
        if config.pose_dim != (dim := pose_dim(config.representation)):
            raise ValueError(f"pose_dim must be {dim} for {config.representation}, got {config.pose_dim}")
        self.config = config
        self.vae = MotionVAE(config)
        self.register_buffer("mean", torch.zeros(config.pose_dim))
        self.register_buffer("deviation", torch.ones(config.pose_dim))

    @torch.no_grad()
    def fit_statistics(self, poses: Tensor) -> None:
        """Take mean and deviation of every number from poses (N, pose_dim), N > 1; deviations have a floor.

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        if poses.ndim != 2 or poses.shape[1] != self.config.pose_dim or len(poses) < 2:
            raise ValueError(f"poses must be (N > 1, {self.config.pose_dim}), got {tuple(poses.shape)}")
        if not poses.isfinite().all():
            raise ValueError("poses hold numbers that are not finite")
        self.mean.copy_(poses.mean(0))
        self.deviation.copy_(poses.std(0).clamp_min(_LEAST_DEVIATION))

    def normalise(self, poses: Tensor) -> Tensor:
        """(..., pose_dim) -> zero mean, unit deviation."""
        return (poses - self.mean) / self.deviation

    def encode(self, poses: Tensor, valid: Tensor | None = None) -> LatentMotion:
        """Latents of windows of poses (B, T, pose_dim); `valid` (B, T) bool is False for padding."""
        return self.vae.encode(self.normalise(poses), valid)

    def decode(self, latents: Tensor, frames: int | None = None, valid: Tensor | None = None) -> Tensor:
        """Poses (B, T, pose_dim) of latents (B, latents, D)."""
        return self.vae.decode(latents, frames, valid) * self.deviation + self.mean
