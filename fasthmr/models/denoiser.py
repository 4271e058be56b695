"""LatentDenoiser: cleans noisy motion latents, given the features of the frames (FastHMR, Sec. 3.3 and Tab. 13)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthmr.models.skip_transformer import SkipTransformer, sinusoids


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes; the defaults are the paper's.

    Args:
        feature_dim: width of a frame's feature.
        window: frames of the longest sequence.
        latents: latent tokens.
        dim: width of the tokens, and of a latent.
        depth: layers, odd.
        heads: attention heads.
        mlp_dim: hidden width of the feed-forward networks.
        dropout: in training.
        relu: whether features go through a ReLU first, as in MLD. It cuts off the negative half of features that are
            normalised.
    """

    feature_dim: int = 1024
    window: int = 243
    latents: int = 27
    dim: int = 512
    depth: int = 5
    heads: int = 4
    mlp_dim: int = 1024
    dropout: float = 0.001
    relu: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


class LatentDenoiser(nn.Module):
    """Tokens [noisy latents | time | features of the frames] through a skip transformer; the latents' are read out.

    Positions are learned and added once. What is read out is what training makes it: v for v-prediction.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.time_in = nn.Linear(2 * (config.feature_dim // 2), config.dim)  # a time embedding is of even width
        self.time_out = nn.Linear(config.dim, config.dim)
        self.condition = nn.Linear(config.feature_dim, config.dim)
        tokens = torch.rand(config.latents + 1, config.dim)
        self.positions = nn.Parameter(torch.cat((tokens, sinusoids(config.window, config.dim))))
        self.transformer = SkipTransformer(config.dim, config.depth, config.heads, config.mlp_dim, config.dropout)

    def forward(self, latents: Tensor, time: Tensor, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """One denoising step's prediction.

        Args:
            latents: (B, latents, D) noisy.
            time: (B,) diffusion step of each, 0 to 999.
            features: (B, T, feature_dim) of the frames, T up to the window.
            valid: (B, T) bool, False for padding; None: all.

        Returns:
            (B, latents, D).

        Raises:
            ValueError: a shape does not fit.
        """
        count, frames = self.config.latents, features.shape[1]
        if latents.shape[1:] != (count, self.config.dim):
            raise ValueError(f"latents must be (B, {count}, {self.config.dim}), got {tuple(latents.shape)}")
        if (
            features.shape[0] != len(latents)
            or frames > self.config.window
            or features.shape[2] != self.config.feature_dim
        ):
            raise ValueError(
                f"features must be ({len(latents)}, up to {self.config.window}, {self.config.feature_dim}), "
                f"got {tuple(features.shape)}"
            )
        step = self.time_out(F.silu(self.time_in(time_embedding(time, self.config.feature_dim).to(latents.dtype))))
        tokens = torch.cat(
            (latents, step[:, None], self.condition(F.relu(features) if self.config.relu else features)), dim=1
        )
        ignored = None
        if valid is not None:
            ignored = torch.cat((valid.new_zeros(len(valid), count + 1), ~valid), dim=1)
        return self.transformer(tokens + self.positions[: count + 1 + frames], ignored)[:, :count]


def time_embedding(time: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of (B,) times at geometrically falling frequencies from 1 on: (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    phase = time.float()[:, None] * frequencies
    return torch.cat((phase.cos(), phase.sin()), dim=1)
