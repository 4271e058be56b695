"""DiffusionDecoderModule: trains and validates the diffusion decoder on features of windows of frames."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fasthmr.body import BodyOutput, decode_pose, encode_pose, load_body, require_same_body
from fasthmr.checkpoint import (
    decoder_header,
    encoder_id,
    load_decoder,
    load_encoder,
    load_prior,
    read_header,
    require_same_encoder,
)
from fasthmr.geometry.slerp import slerp
from fasthmr.lit.average import averaged
from fasthmr.lit.optim import OptimizerConfig, build_optimizer
from fasthmr.losses import NonFiniteLossError
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.metrics.functional import acceleration_error
from fasthmr.models.denoiser import DenoiserConfig
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.sampler import DiffusionConfig

log = logging.getLogger(__name__)

#: windows from which the statistics of features and latents are taken before training starts
_STATISTICS_WINDOWS = 64
#: a warped window's speed follows so many cosines, of 0, 1/2, 1, ... periods in the window
_WARP_TERMS = 4


class Features(Protocol):
    """What a batch has: see `datamodules.features.FeatureBatch`."""

    features: Tensor
    rotations: Tensor
    betas: Tensor
    predicted_rotations: Tensor
    predicted_betas: Tensor
    valid: Tensor
    fps: Tensor
    keys: list[str]


@dataclass(frozen=True)
class DenoiserSizes:
    """Sizes of the denoiser that follow neither from the prior nor from the encoder; defaults are the paper's.

    Args:
        depth: layers, odd.
        heads: attention heads; they divide the latents' width.
        mlp_dim: hidden width of the feed-forward networks.
        dropout: in training.
        relu: whether features go through a ReLU first (`DenoiserConfig.relu`).
    """

    depth: int = 5
    heads: int = 4
    mlp_dim: int = 1024
    dropout: float = 0.001
    relu: bool = True


class DiffusionDecoderModule(L.LightningModule):
    """Loss, augmentation, optimiser, metrics and checkpoint header of the decoder.

    The encoder's pose is what the decoder replaces: betas and camera stay the encoder's. Validation measures the
    decoder and, on the same windows, the encoder alone (`val/per_frame_*`).

    Args:
        prior: checkpoint of the motion prior, which stays as it is.
        encoder: checkpoint of the encoder that the data's features are of.
        denoiser: sizes of the denoiser.
        diffusion: forward process and objective.
        steps: denoising steps in validation; the paper's is 1.
        init_from: checkpoint of a decoder, of this or another encoder, whose denoiser to start from, or null.
        body: "free", or the path of an SMPL-format body file.
        optimizer: AdamW and its schedule.
        ema_decay: decay of the exponential moving average of the weights, or null for none. Validation, `best`
            checkpoints and `load_decoder` use the average.
        reverse: share of training windows that run backwards.
        warp: share of training windows whose speed changes smoothly.
        max_speed: a warped window is at most so many times faster or slower than it was.
        protocol: name of the evaluation protocol of the validation metrics (`fasthmr.metrics.PROTOCOLS`).
        seed: augmentation, noise, diffusion steps and dropout of batch n on rank r are seeded by (seed, n, r), so that
            a resumed run equals an uninterrupted one.
        adaptive_ik: how joints become rotations in validation (`fasthmr.body.ik.from_hybrid`).

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint is missing or of another kind.
        BodyMismatchError: a checkpoint belongs to another body.
        ValueError: a number out of range, or `init_from` has other sizes or another prior.
    """

    def __init__(
        self,
        prior: str,
        encoder: str,
        denoiser: DenoiserSizes = DenoiserSizes(),
        diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008  (frozen, so sharing it is safe)
        steps: int = 1,
        init_from: str | None = None,
        body: str = "free",
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4),  # noqa: B008
        ema_decay: float | None = 0.999,
        reverse: float = 0.5,
        warp: float = 0.5,
        max_speed: float = 1.5,
        protocol: str = "body-24",
        seed: int = 0,
        adaptive_ik: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("reverse", reverse), ("warp", warp)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if not max_speed >= 1:
            raise ValueError(f"max_speed must be 1 or more, got {max_speed}")
        if not 1 <= steps <= diffusion.steps:
            raise ValueError(f"steps must be 1 to {diffusion.steps}, the diffusion's, got {steps}")
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {sorted(PROTOCOLS)}, got {protocol!r}")
        self.body = load_body(body)
        self.decoder = _fresh(prior, encoder, denoiser, diffusion, self.body.id)
        if init_from is not None:
            start_from(self.decoder, init_from, self.body.id)
        self.ema = averaged(self.decoder, ema_decay) if ema_decay is not None else None
        self.optimizer_config = optimizer
        self.steps, self.seed, self.adaptive_ik = steps, seed, adaptive_ik
        self.reverse, self.warp, self.max_speed = reverse, warp, max_speed
        # Decoder and encoder alone: errors, and the mean acceleration of joints.
        self.errors, self.per_frame_errors = PoseErrors(PROTOCOLS[protocol]), PoseErrors(PROTOCOLS[protocol])
        self.jitter, self.per_frame_jitter, self.true_jitter = MeanMetric(), MeanMetric(), MeanMetric()

    @property
    def encoder_id(self) -> str:
        """Of the encoder whose features are decoded."""
        assert self.decoder.encoder is not None
        return self.decoder.encoder

    @property
    def best_decoder(self) -> DiffusionDecoder:
        """The weights to use: their moving average where there is one."""
        return self.decoder if self.ema is None else cast(DiffusionDecoder, self.ema.module)

    # ---- one batch ------------------------------------------------------------------------------------------------

    def forward(self, batch: Features) -> Tensor:
        """Poses (B, T, pose_dim) of a batch with the weights to use."""
        return self.best_decoder(self._conditions(batch), batch.valid, self.steps)

    def training_step(self, batch: Features, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        # Checked before the backward pass, so that neither weights nor checkpoints ever hold the NaN.
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.global_step}; clips: {', '.join(batch.keys)}. Look at them with "
                "`python -m fasthmr.shard inspect`, or lower optimizer.lr."
            )
        self.log("train/loss", loss.detach(), batch_size=len(batch.keys))
        return loss

    def loss(self, batch: Features) -> Tensor:
        """Loss of the training weights on an augmented batch, a scalar; windows without any label are left out.

        Raises:
            ValueError: no window of the batch has a label; names the clips.
        """
        with torch.autocast(self.device.type, enabled=False):  # half precision would move joints by centimetres
            features, rotations, valid = self._augmented(batch)
            poses = self._encoded(rotations, batch.betas)
        labelled = valid.any(1)
        if not labelled.any():
            raise ValueError(
                f"no clip of a batch has pose labels: train on clips that have, got {', '.join(batch.keys)}"
            )
        return self.decoder.loss(features[labelled], poses[labelled], valid[labelled])

    def validation_step(self, batch: Features, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the metrics; returns the decoder's `rotations` (B, T, 24, 3, 3) and the `betas` (B, T, 10)."""
        with torch.autocast(self.device.type, enabled=False):
            betas = self.errors.protocol.clip_betas(batch.predicted_betas, batch.valid)
            rotations = decode_pose(self(batch), betas, self.body, self.decoder.representation, self.adaptive_ik)
            true = self._posed(batch.rotations, _per_frame(batch.betas, batch.valid))
            self._add_jitter(self.true_jitter, true.joints, batch)
            for errors, jitter, predicted in (
                (self.errors, self.jitter, rotations),
                (self.per_frame_errors, self.per_frame_jitter, batch.predicted_rotations),
            ):
                mesh = self._posed(predicted, betas)
                errors.update(mesh.joints, true.joints, mesh.vertices, true.vertices, batch.valid, batch.fps)
                self._add_jitter(jitter, mesh.joints, batch)
        return {"rotations": rotations, "betas": betas}

    def on_validation_epoch_end(self) -> None:
        # Logged here and not in the step: a rank whose share of the validation set is empty must log the same keys.
        values = self.errors.compute()
        values |= {f"per_frame_{k}": v for k, v in self.per_frame_errors.compute().items()}
        values |= {
            "jitter_m_s2": self.jitter.compute(),
            "per_frame_jitter_m_s2": self.per_frame_jitter.compute(),
            "jitter_true_m_s2": self.true_jitter.compute(),
        }
        for metric in (self.errors, self.per_frame_errors, self.jitter, self.per_frame_jitter, self.true_jitter):
            metric.reset()
        logged = {f"val/{k}": v.to(self.device, torch.float32) for k, v in values.items()}
        self.log_dict(logged, rank_zero_only=False)

    def _encoded(self, rotations: Tensor, betas: Tensor) -> Tensor:
        """The numbers (B, T, pose_dim) of poses (B, T, 24, 3, 3) of bodies (B, 10)."""
        return encode_pose(
            rotations, betas[:, None].expand(-1, rotations.shape[1], -1), self.body, self.decoder.representation
        )

    def _posed(self, rotations: Tensor, betas: Tensor) -> BodyOutput:
        """The body in B x T poses: its fields are (B, T, ...)."""
        posed = self.body(rotations.flatten(0, 1), betas.flatten(0, 1))
        shape = rotations.shape[:2]
        return BodyOutput(*(getattr(posed, f.name).unflatten(0, shape) for f in dataclasses.fields(posed)))

    def _add_jitter(self, metric: MeanMetric, joints: Tensor, batch: Features) -> None:
        for own, valid, fps in zip(joints, batch.valid, batch.fps.tolist(), strict=True):
            if int(valid.sum()) >= 3:
                metric.update(acceleration_error(own[valid], torch.zeros_like(own[valid]), fps))

    def _conditions(self, batch: Features) -> Tensor:
        """What the decoder reads, (B, T, feature_dim)."""
        betas = self.errors.protocol.clip_betas(batch.predicted_betas, batch.valid)
        return self.decoder.conditions(batch.features, batch.predicted_rotations, betas, self.body)

    # ---- augmentation ---------------------------------------------------------------------------------------------

    def _augmented(self, batch: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Features, true rotations and validity of windows of which some run backwards or at a changing speed.

        Not mirrored: what the encoder would make of a mirrored picture is not known.
        """
        position = self._positions(batch.valid)
        before = position.floor().long()
        after = (before + 1).clamp_max(batch.valid.shape[1] - 1)
        weight = position - before
        features = self._conditions(batch)
        features = torch.lerp(_frames(features, before), _frames(features, after), weight[..., None])
        rotations = slerp(_frames(batch.rotations, before), _frames(batch.rotations, after), weight[..., None])
        valid = batch.valid.gather(1, before) & (batch.valid.gather(1, after) | (weight == 0))
        return features, rotations, valid

    def _positions(self, valid: Tensor) -> Tensor:
        """Which frame each frame of an augmented window shows, (B, T) fractional numbers; padding stays in place.

        A warped window starts at its first frame and goes on at a speed whose logarithm is a random sum of cosines,
        bounded; one that would run past the last frame is slowed down as a whole.
        """
        draw = torch.rand(2 + _WARP_TERMS, len(valid), 1, device=valid.device)
        index = torch.arange(valid.shape[1], device=valid.device, dtype=torch.float32).expand(valid.shape)
        last = torch.where(valid, index, 0).amax(1, keepdim=True)
        order = torch.arange(_WARP_TERMS, device=valid.device)[:, None, None]
        waves = ((2 * draw[2:] - 1) * torch.cos(order * torch.pi * index / last.clamp_min(1))).sum(0)
        speed = torch.exp(math.log(self.max_speed) * waves.tanh())
        travelled = speed.cumsum(1) - speed
        end = travelled.gather(1, last.long())
        warped = travelled * last / torch.maximum(end, last).clamp_min(1)
        position = torch.where(draw[0] < self.warp, warped, index).clamp(max=last)
        position = torch.where(draw[1] < self.reverse, last - position, position)
        return torch.where(index > last, index, position)

    # ---- optimisation ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse data of another encoder or window."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        require_same_encoder(self.encoder_id, data.encoder_id, where="what data.init_args.encoder makes features with")
        if data.window != self.decoder.window:
            raise ValueError(
                f"data.init_args.window must be the motion prior's {self.decoder.window} frames, got {data.window}"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total) or total <= 0:
            raise ValueError("the schedule needs a length: set trainer.max_steps or trainer.max_epochs")
        optimizer, scheduler = build_optimizer(self.decoder, self.optimizer_config, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        if bool((self.decoder.feature_deviation != 1).any()):
            return  # restored from a checkpoint
        windows: Features = self.trainer.datamodule.first_windows(_STATISTICS_WINDOWS).to(self.device)  # type: ignore[attr-defined]
        poses = self._encoded(windows.rotations, windows.betas)
        labelled = windows.valid.any(1)
        self.decoder.fit_statistics(self._conditions(windows)[labelled], poses[labelled], windows.valid[labelled])
        self.best_decoder.load_state_dict(self.decoder.state_dict())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Lightning does not save RNG states: they depend on the batch's number instead, which it does save.
        position = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        torch.manual_seed(hash((self.seed, position, self.global_rank)) % 2**63)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.decoder)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.decoder.parameters() if p.grad is not None]
        self.log("train/grad_norm", nn.utils.get_total_norm(gradients))

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        prefix = "ema.module." if self.ema is not None else "decoder."
        checkpoint["fasthmr"] = decoder_header(self.decoder.config, self.body.id, self.encoder_id, prefix)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Called before the weights are loaded: refuse here with names instead of a list of tensor shapes later.
        header = checkpoint.get("fasthmr")
        if header is None or header.get("kind") != "decoder":
            raise ValueError("the checkpoint is not of a diffusion decoder")
        require_same_body(self.body.id, header["body"], where="the checkpoint")
        require_same_encoder(self.encoder_id, header["encoder"], where="the checkpoint")
        theirs_config = DiffusionDecoderConfig.from_dict(header["config"]).as_dict()  # with younger settings' defaults
        if changed := _changes(theirs_config, self.decoder.config.as_dict()):
            raise ValueError(f"the checkpoint is of another decoder ({'; '.join(changed)}): resume with its own config")
        theirs = checkpoint["state_dict"]
        if any(
            not torch.equal(v.cpu(), theirs[f"decoder.prior.{k}"]) for k, v in self.decoder.prior.state_dict().items()
        ):
            raise ValueError("the checkpoint was trained on another motion prior: resume with its own, or start anew")


def start_from(decoder: DiffusionDecoder, checkpoint: str, body_id: str) -> None:
    """Give a decoder the denoiser of a checkpoint, which may have been trained on another encoder's features.

    The statistics are not taken over: those of features and latents are of the data.

    Raises:
        FileNotFoundError, CheckpointError: as `load_decoder`.
        BodyMismatchError: it was trained with another body.
        ValueError: it has other sizes or another objective; names what differs.
    """
    start, header = load_decoder(checkpoint)
    require_same_body(body_id, header.body, where=checkpoint)
    if changed := _changes(
        start.config.as_dict(),
        decoder.config.as_dict(),
        free=("prior.dropout", "denoiser.dropout", "diffusion.last_step_share", "diffusion.detail"),
    ):
        raise ValueError(f"{checkpoint} is another decoder ({'; '.join(changed)}): set model.init_args to its")
    if not _is_prior_of(decoder, start.prior.state_dict()):
        log.warning(
            "%s was trained on another motion prior: a good start only if this one was tuned from it", checkpoint
        )
    decoder.denoiser.load_state_dict(start.denoiser.state_dict())


def _fresh(
    prior: str, encoder: str, denoiser: DenoiserSizes, diffusion: DiffusionConfig, body_id: str
) -> DiffusionDecoder:
    """A decoder that has learnt nothing yet, of a trained prior, for an encoder."""
    trained, prior_body = load_prior(prior)
    require_same_body(body_id, prior_body, where=prior)
    require_same_body(body_id, read_header(encoder).body, where=encoder)
    hmr = load_encoder(encoder)
    sizes = DenoiserConfig(
        feature_dim=hmr.config.head_dim + (trained.config.pose_dim if diffusion.residual else 0),
        window=trained.config.window,
        latents=trained.config.latents,
        dim=trained.config.dim,
        **dataclasses.asdict(denoiser),
    )
    decoder = DiffusionDecoder(DiffusionDecoderConfig(trained.config, sizes, diffusion), encoder_id(hmr))
    decoder.prior.load_state_dict(trained.state_dict())
    return decoder


def _is_prior_of(decoder: DiffusionDecoder, weights: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Whether the weights that start with `prefix` are those of the decoder's motion prior."""
    return all(torch.equal(v.cpu(), weights[prefix + k].cpu()) for k, v in decoder.prior.state_dict().items())


def _changes(theirs: Mapping[str, Any], ours: Mapping[str, Any], free: tuple[str, ...] = ()) -> list[str]:
    """Which numbers of two decoders' configs differ: "prior.dim: 32 -> 64"."""
    pairs = {f"{part}.{k}": (theirs.get(part, {}).get(k), v) for part in ours for k, v in ours[part].items()}
    return [f"{key}: {a} -> {b}" for key, (a, b) in pairs.items() if a != b and key not in free]


def _frames(values: Tensor, index: Tensor) -> Tensor:
    """Frames `index` (B, T) of values (B, T, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _per_frame(betas: Tensor, valid: Tensor) -> Tensor:
    """(B, 10) one shape a window -> (B, T, 10)."""
    return betas[:, None].expand(-1, valid.shape[1], -1)
