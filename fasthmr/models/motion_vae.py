"""MotionVAE: a window of motion as a few latent tokens, and back (MLD, Chen et al. 2023; FastHMR, Tab. 3 and 15)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasthmr.body.pose import Representation, pose_dim
from fasthmr.models.skip_transformer import SkipTransformer, sinusoids


@dataclass(frozen=True)
class MotionVAEConfig:
    """Sizes; the defaults are the paper's (FastHMR, Tab. 15).

    Args:
        pose_dim: numbers of a frame.
        window: frames of the longest motion.
        latents: latent tokens.
        dim: width of the tokens, and of a latent.
        depth: layers of encoder and decoder each, odd.
        heads: attention heads.
        mlp_dim: hidden width of the feed-forward networks.
        dropout: in training.
        log_variance_offset: added to the latents' log-variance. The encoder's last norm gives means and log-variances
            one spread, so without it (MLD, FastHMR) training starts with as much noise as signal, and takes thousands
            of steps to be rid of it.
        representation: what the numbers of a frame are; the network itself does not mind (`MotionPrior` does).

    Raises:
        ValueError: a size is not a positive whole number, or there is no such representation; names it.
    """

    pose_dim: int = 133
    window: int = 243
    latents: int = 27
    dim: int = 512
    depth: int = 9
    heads: int = 4
    mlp_dim: int = 1024
    dropout: float = 0.1
    log_variance_offset: float = 0.0
    representation: Representation = "joints_twists"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "dropout":
                if not 0 <= value < 1:
                    raise ValueError(f"dropout must be in [0, 1), got {value}")
            elif field.name == "log_variance_offset":
                if not math.isfinite(value):
                    raise ValueError(f"log_variance_offset must be a finite number, got {value}")
            elif field.name == "representation":
                pose_dim(value)
            elif type(value) is not int or value < 1:
                raise ValueError(f"{field.name} must be a positive whole number, got {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


class LatentMotion(NamedTuple):
    """Mean and logarithm of the variance of a motion's latents, (B, latents, D) each."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A random draw, (B, latents, D)."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal distribution, averaged over all numbers; a scalar."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).mean()


class MotionVAE(nn.Module):
    """Encoder: [2 x latents distribution tokens | frames] -> mean and log-variance; decoder: empty frames that attend
    to the latents -> frames. Positions are learned, from sinusoids on, and added once.

    Motions shorter than the window are padded; padding is not attended to and comes out as zero.
    """

    def __init__(self, config: MotionVAEConfig) -> None:
        super().__init__()
        self.config = config
        size = (config.dim, config.depth, config.heads, config.mlp_dim, config.dropout)
        self.embed = nn.Linear(config.pose_dim, config.dim)
        self.distribution_tokens = nn.Parameter(torch.randn(2 * config.latents, config.dim))
        frames = sinusoids(config.window, config.dim)
        self.encoder_positions = nn.Parameter(torch.cat((torch.zeros(2 * config.latents, config.dim), frames)))
        self.encoder = SkipTransformer(*size)
        self.decoder_positions = nn.Parameter(frames.clone())
        self.decoder = SkipTransformer(*size, memory=True)
        self.readout = nn.Linear(config.dim, config.pose_dim)

    def encode(self, motion: Tensor, valid: Tensor | None = None) -> LatentMotion:
        """Latents of normalised motion.

        Args:
            motion: (B, T, pose_dim), T up to the window.
            valid: (B, T) bool, False for padding; None: all.

        Raises:
            ValueError: a shape does not fit.
        """
        frames = self._checked(motion, valid)
        tokens = self.distribution_tokens.expand(len(motion), -1, -1)
        ignored = None
        if valid is not None:
            ignored = torch.cat((valid.new_zeros(len(valid), tokens.shape[1]), ~valid), dim=1)
        sequence = torch.cat((tokens, self.embed(motion)), dim=1)
        sequence = sequence + self.encoder_positions[: tokens.shape[1] + frames]
        mean, log_variance = self.encoder(sequence, ignored)[:, : tokens.shape[1]].chunk(2, dim=1)
        return LatentMotion(mean, log_variance + self.config.log_variance_offset)

    def decode(self, latents: Tensor, frames: int | None = None, valid: Tensor | None = None) -> Tensor:
        """Normalised motion of latents.

        Args:
            latents: (B, latents, D).
            frames: T; None: the window.
            valid: (B, T) bool, False for padding, which becomes zero.

        Returns:
            (B, T, pose_dim).
        """
        frames = self.config.window if frames is None else frames
        if not 1 <= frames <= self.config.window:
            raise ValueError(f"frames must be 1 to {self.config.window}, the window, got {frames}")
        queries = self.decoder_positions[:frames].expand(len(latents), -1, -1)
        motion = self.readout(self.decoder(queries, None if valid is None else ~valid, latents))
        return motion if valid is None else motion.masked_fill(~valid[..., None], 0.0)

    def _checked(self, motion: Tensor, valid: Tensor | None) -> int:
        if motion.ndim != 3 or motion.shape[-1] != self.config.pose_dim or motion.shape[1] > self.config.window:
            raise ValueError(
                f"motion must be (B, up to {self.config.window}, {self.config.pose_dim}), got {tuple(motion.shape)}"
            )
        if valid is not None and (valid.dtype != torch.bool or valid.shape != motion.shape[:2]):
            raise ValueError(f"valid must be {tuple(motion.shape[:2])} bool, got {tuple(valid.shape)} {valid.dtype}")
        return motion.shape[1]
