"""Diffusion of motion latents: noise in, loss of a prediction, and sampling in one step (FastHMR, Sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["both", "v", "noise"]


@dataclass(frozen=True)
class DiffusionConfig:
    """Settings of the forward process and of training.

    Args:
        steps: of the forward process.
        beta_start, beta_end: variance of the first and the last step's noise; their square roots lie evenly between.
        objective: "both" (the paper), "v", or "noise", where the network predicts noise instead of v.
        last_step_share: share of training windows that are pure noise, where one-step sampling starts; the steps of
            the others are drawn evenly, as all are in the paper. Short trainings have more of what they are used for.
        residual: whether what is diffused is the correction to the encoder's own poses, as the prior's latents have
            them, instead of the latents themselves, as in the paper. See `DiffusionDecoder`.
        detail: with `residual`, what the prior loses of the encoder's poses is smoothed over time and added back; this
            is the deviation of that Gaussian, frames. 0, as in the paper: it stays lost.

    Raises:
        ValueError: a value that cannot be; names it.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    objective: Objective = "both"
    last_step_share: float = 0.0
    residual: bool = False
    detail: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.last_step_share <= 1:
            raise ValueError(f"last_step_share must be in [0, 1], got {self.last_step_share}")
        if not 0 <= self.detail < math.inf or (self.detail and not self.residual):
            raise ValueError(f"detail must be 0 or more frames, and 0 without residual, got {self.detail}")
        if self.objective not in ("both", "v", "noise"):
            raise ValueError(f"objective must be both, v or noise, got {self.objective!r}")
        if not 0 < self.beta_start < self.beta_end < 1:
            raise ValueError(f"need 0 < beta_start < beta_end < 1, got {self.beta_start} and {self.beta_end}")


class LatentDiffusion:
    """The forward process with zero terminal signal (Lin et al. 2024), on `diffusers`' schedulers.

    v = sqrt(abar) noise - sqrt(1 - abar) z0. At the last step nothing of z0 is left in the input, so noise would be a
    useless answer there, but v is -z0: one step from pure noise is a whole sample. For `objective: noise` sampling
    therefore starts one step earlier (998), where a trace of the signal is left (0.04 %).
    """

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        # Here, as importing it takes a second or two, which commands without a decoder need not wait for.
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        self.config = config if config is not None else DiffusionConfig()
        self.scheduler = DDIMScheduler(
            num_train_timesteps=self.config.steps,
            beta_start=self.config.beta_start,
            beta_end=self.config.beta_end,
            beta_schedule="scaled_linear",
            clip_sample=False,
            # Both are needed for one step: "trailing" begins at the last step, and the end of it is z0 itself.
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            rescale_betas_zero_snr=True,
            prediction_type="epsilon" if self.config.objective == "noise" else "v_prediction",
        )

    def noisy(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Forward process: latents (B, ...) at steps (B,), with noise of their shape."""
        return self.scheduler.add_noise(latents, noise, time)

    def velocity(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """v of latents (B, ...) and noise at steps (B,)."""
        return self.scheduler.get_velocity(latents, noise, time)

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mean squared error of a network's prediction by the objective, a scalar.

        "both" adds |v^ - v|^2 and |eps^ - eps|^2 with eps^ recovered from v^ (FastHMR, Sec. 3.3), which together are
        (1 + abar) |v^ - v|^2.
        """
        if self.config.objective == "noise":
            return (prediction - noise).square().mean()
        error = prediction - self.velocity(latents, noise, time)
        loss = error.square().mean()
        if self.config.objective == "v":
            return loss
        kept = self.scheduler.alphas_cumprod.to(time.device)[time].reshape(-1, *[1] * (error.ndim - 1))
        # eps^ = sqrt(abar) v^ + sqrt(1 - abar) z_t, whatever z_t is: its error is sqrt(abar) times that of v^.
        return loss + (kept.sqrt() * error).square().mean()

    def timesteps(self, count: int) -> list[int]:
        """Steps that sampling in `count` steps visits, the noisiest first; 1 -> [999], or [998] for `objective: noise`.

        Raises:
            ValueError: `count` is not in [1, steps].
        """
        if not 1 <= count <= self.config.steps:
            raise ValueError(f"sampling takes 1 to {self.config.steps} steps, got {count}")
        self.scheduler.set_timesteps(count)
        noisiest = self.config.steps - (2 if self.config.objective == "noise" else 1)
        return [min(int(t), noisiest) for t in self.scheduler.timesteps]

    @torch.no_grad()
    def sample(self, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, count: int = 1) -> Tensor:
        """Latents from noise, deterministic (DDIM).

        Args:
            predict: the network, (noisy latents (B, ...), time (B,)) -> prediction.
            noise: (B, ...) standard normal.
            count: denoising steps; the paper's is 1.
        """
        latents = noise
        for step in self.timesteps(count):
            time = torch.full((len(latents),), step, device=latents.device)
            latents = self.scheduler.step(predict(latents, time), step, latents).prev_sample
        return latents
