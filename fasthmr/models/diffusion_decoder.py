"""DiffusionDecoder: features of a window of frames in, smooth poses out, in one denoising step (FastHMR, Sec. 3.3)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthmr.body import BodyModel, encode_pose
from fasthmr.body.pose import Representation
from fasthmr.geometry.smoothing import smoothed
from fasthmr.models.denoiser import DenoiserConfig, LatentDenoiser
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.motion_vae import MotionVAEConfig
from fasthmr.models.sampler import DiffusionConfig, LatentDiffusion

#: features that vary less than this are divided by it instead: a number that never changes would become noise
_LEAST_DEVIATION = 1e-3
#: of the noise that sampling starts from
_NOISE_SEED = 0

#: of the denoiser's last norm before training, where it predicts corrections
_FIRST_GAIN = 0.1

_Config = TypeVar("_Config", MotionVAEConfig, DenoiserConfig, DiffusionConfig)


@dataclass(frozen=True)
class DiffusionDecoderConfig:
    """Sizes of a `DiffusionDecoder`; the defaults are the paper's (FastHMR, Tab. 13 to 15).

    Args:
        prior: the motion prior, whose latents are diffused.
        denoiser: its window, latents and dim are the prior's.
        diffusion: forward process and objective.

    Raises:
        ValueError: denoiser and prior do not fit each other; names what differs.
    """

    prior: MotionVAEConfig = field(default_factory=MotionVAEConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        for name in ("window", "latents", "dim"):
            ours, priors = getattr(self.denoiser, name), getattr(self.prior, name)
            if ours != priors:
                raise ValueError(f"denoiser.{name} must be the prior's {priors}, got {ours}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionDecoderConfig:
        """Config of plain data; absent keys take their defaults. Raises ValueError naming an unknown or bad key."""
        _require_known(values, [f.name for f in dataclasses.fields(cls)], "a decoder's config")
        return cls(
            prior=_part(MotionVAEConfig, "prior", values.get("prior", {})),
            denoiser=_part(DenoiserConfig, "denoiser", values.get("denoiser", {})),
            diffusion=_part(DiffusionConfig, "diffusion", values.get("diffusion", {})),
        )


class DiffusionDecoder(nn.Module):
    """A frozen motion prior and a denoiser of its latents, conditioned on the encoder's features.

    The prior never trains: it stays in evaluation mode, gets no gradients, and its parameters ask for none.

    Deviations from the paper, which names no normalisation. Latents are divided by their deviation over training
    windows: the KL term fixes their size only loosely, while the noise that they are mixed with, and the denoiser's
    last LayerNorm, have unit deviation. Features are normalised by saved statistics: what they were trained to be is
    read out linearly, and so has any size. The noise that sampling starts from is a fixed draw, saved with the weights,
    so that a result depends on nothing but the features.

    With `diffusion.residual` it starts from what the encoder says: the prior's latents of the encoder's own poses,
    which the prior makes smooth, and learns their correction. Those poses are part of what it reads (`conditions`).
    What the prior cannot say of them, because it is small or has seen little motion, is lost; with `diffusion.detail`
    it is added back without what trembles in it.

    Args:
        config: sizes.
        encoder: id of the encoder whose features it reads (`fasthmr.checkpoint.encoder_id`); None while there is none.
    """

    feature_mean: Tensor
    feature_deviation: Tensor
    latent_scale: Tensor
    noise: Tensor

    def __init__(self, config: DiffusionDecoderConfig, encoder: str | None = None) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.prior = MotionPrior(config.prior).requires_grad_(False)
        self.denoiser = LatentDenoiser(config.denoiser)
        if config.diffusion.residual:
            # Corrections begin small: the last norm would make them as large as all that is wrong with the poses.
            nn.init.constant_(self.denoiser.transformer.norm.weight, _FIRST_GAIN)
        self.register_buffer("feature_mean", torch.zeros(config.denoiser.feature_dim))
        self.register_buffer("feature_deviation", torch.ones(config.denoiser.feature_dim))
        self.register_buffer("latent_scale", torch.ones(()))
        with torch.device("cpu"):  # real numbers, also where the networks are built without memory to be filled later
            self.diffusion = LatentDiffusion(config.diffusion)
            generator = torch.Generator().manual_seed(_NOISE_SEED)
            noise = torch.randn(config.prior.latents, config.prior.dim, generator=generator)
        self.register_buffer("noise", noise)
        self.train(self.training)

    @property
    def window(self) -> int:
        """Frames of the longest sequence."""
        return self.config.prior.window

    @property
    def representation(self) -> Representation:
        """What the numbers of its poses are."""
        return self.config.prior.representation

    @property
    def feature_dim(self) -> int:
        """Width of what it reads of a frame: the encoder's feature, and with `residual` the numbers of its pose."""
        return self.config.denoiser.feature_dim

    @property
    def encoder_dim(self) -> int:
        """Width of the encoder's feature."""
        return self.feature_dim - (self.config.prior.pose_dim if self.config.diffusion.residual else 0)

    def conditions(self, features: Tensor, rotations: Tensor, betas: Tensor, body: BodyModel) -> Tensor:
        """What the decoder reads, (..., feature_dim), of what an encoder says.

        Args:
            features: (..., encoder_dim).
            rotations: (..., 24, 3, 3) and betas: (..., 10) the encoder's own.
            body: of both.
        """
        if not self.config.diffusion.residual:
            return features
        with torch.autocast(features.device.type, enabled=False):
            # Frames without a person hold no rotations; they are not read, but a NaN would get into their neighbours.
            poses = encode_pose(rotations, betas, body, self.representation).nan_to_num()
        return torch.cat((features, poses.to(features.dtype)), dim=-1)

    def train(self, mode: bool = True) -> DiffusionDecoder:
        """Training or evaluation mode of all but the prior, which stays in evaluation mode."""
        super().train(mode)
        self.prior.eval()
        return self

    @torch.no_grad()
    def fit_statistics(self, features: Tensor, poses: Tensor, valid: Tensor) -> None:
        """Take the features' mean and deviation, and the latents' scale, from training windows.

        Args:
            features: (B, T, feature_dim).
            poses: (B, T, pose_dim) the true ones.
            valid: (B, T) bool.

        Raises:
            ValueError: a shape does not fit, there are no two valid frames, or a number is not finite.
        """
        self._require_features(features)
        if int(valid.sum()) < 2:
            raise ValueError(f"statistics need two valid frames or more, got {int(valid.sum())}")
        if not (features[valid].isfinite().all() and poses[valid].isfinite().all()):
            raise ValueError("features or poses hold numbers that are not finite")
        self.feature_mean.copy_(features[valid].mean(0))
        self.feature_deviation.copy_(features[valid].std(0).clamp_min(_LEAST_DEVIATION))
        self.latent_scale.fill_(1.0)
        self.latent_scale.copy_(self.latents(features, poses, valid).std())

    @torch.no_grad()
    def latents(self, features: Tensor, poses: Tensor, valid: Tensor | None = None) -> Tensor:
        """What is diffused, (B, latents, D): the prior's mean latents of poses (B, T, pose_dim), over their scale; with
        `residual` less those of the encoder's poses."""
        return (self._encoded(poses, valid) - self._start(features, valid)) / self.latent_scale

    def _start(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """The latents that a correction is added to: of the encoder's own poses, or 0."""
        if not self.config.diffusion.residual:
            return self.latent_scale.new_zeros(())
        return self._encoded(features[..., self.encoder_dim :], valid)

    def _encoded(self, poses: Tensor, valid: Tensor | None) -> Tensor:
        with torch.autocast(poses.device.type, enabled=False):
            return self.prior.encode(poses.float(), valid).mean

    def loss(
        self, features: Tensor, poses: Tensor, valid: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Training loss at random diffusion steps, a scalar; only the denoiser gets gradients.

        Args:
            features: (B, T, feature_dim) of the frames.
            poses: (B, T, pose_dim) the true ones, `fasthmr.body.encode_pose`.
            valid: (B, T) bool, False for padding and frames without labels; None: all.
            generator: of noise and diffusion steps, on the features' device; None: torch's own.
        """
        latents = self.latents(features, poses, valid)
        noise = torch.empty_like(latents).normal_(generator=generator)
        steps, share = self.config.diffusion.steps, self.config.diffusion.last_step_share
        time = torch.randint(steps, (len(latents),), generator=generator, device=latents.device)
        if share:
            last = torch.rand(len(latents), generator=generator, device=latents.device) < share
            time = time.masked_fill(last, self.diffusion.timesteps(1)[0])
        noisy = self.diffusion.noisy(latents, noise, time)
        return self.diffusion.loss(self._predict(noisy, time, features, valid), latents, noise, time)

    @torch.no_grad()
    def forward(
        self, features: Tensor, valid: Tensor | None = None, steps: int = 1, noise: Tensor | None = None
    ) -> Tensor:
        """Poses of a window of frames, without gradients: training goes through `loss`.

        Args:
            features: (B, T, feature_dim), T up to the window.
            valid: (B, T) bool, False for padding and missing frames; their poses are the prior's mean pose.
            steps: denoising steps; the paper's is 1.
            noise: (B, latents, D) standard normal to start from; None: the decoder's own, the same for every window.

        Returns:
            (B, T, pose_dim), which `fasthmr.body.decode_pose` turns into rotations.

        Raises:
            ValueError: a shape does not fit, or a number of steps that cannot be.
        """
        self._require_features(features)
        shape = (len(features), *self.noise.shape)
        if noise is None:
            noise = self.noise.expand(shape)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
        latents = self.diffusion.sample(lambda z, t: self._predict(z, t, features, valid), noise, steps)
        start = self._start(features, valid)
        poses = self.prior.decode(start + latents * self.latent_scale, features.shape[1], valid)
        return poses + self.detail(features, start, valid) if self.config.diffusion.detail else poses

    def detail(self, features: Tensor, start: Tensor, valid: Tensor | None) -> Tensor:
        """What the prior loses of the encoder's poses, smoothed, (B, T, pose_dim); 0 where frames are missing.

        Args:
            features: (B, T, feature_dim), the encoder's poses among them.
            start: (B, latents, D) the prior's latents of these poses.
            valid: (B, T) bool, or None: all.
        """
        lost = features[..., self.encoder_dim :] - self.prior.decode(start, features.shape[1], valid)
        return smoothed(lost, self.config.diffusion.detail, valid)

    def _predict(self, latents: Tensor, time: Tensor, features: Tensor, valid: Tensor | None) -> Tensor:
        self._require_features(features)
        normalised = (features.float() - self.feature_mean) / self.feature_deviation
        return self.denoiser(latents, time, normalised, valid).float()

    def _require_features(self, features: Tensor) -> None:
        if features.ndim != 3 or not 1 <= features.shape[1] <= self.window or features.shape[2] != self.feature_dim:
            raise ValueError(
                f"features must be (B, 1 to {self.window} frames, {self.feature_dim}), got {tuple(features.shape)}: "
                "cut longer sequences into windows, and use the encoder that the decoder was trained with"
            )


def _part(kind: type[_Config], name: str, values: Any) -> _Config:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a mapping of keys, got {values!r}")
    _require_known(values, [f.name for f in dataclasses.fields(kind)], name)
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _require_known(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise ValueError(f"unknown key {key!r} in {where}: did you mean {nearest!r}?")
