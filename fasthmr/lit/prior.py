"""MotionPriorModule: trains and validates the motion prior on windows of motion."""

from __future__ import annotations

import math
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from fasthmr.body import decode_pose, encode_pose, load_body, require_same_body
from fasthmr.body.pose import mirror_pose
from fasthmr.checkpoint import load_prior, prior_header
from fasthmr.conventions import NUM_JOINTS
from fasthmr.lit.optim import OptimizerConfig, build_optimizer
from fasthmr.losses import NonFiniteLossError
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.metrics.functional import acceleration_error
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.motion_vae import MotionVAEConfig

#: windows from which mean and deviation of every number are taken before training starts
_STATISTICS_WINDOWS = 256


class Windows(Protocol):
    """What a batch has: see `datamodules.motions.MotionBatch`."""

    rotations: Tensor
    betas: Tensor
    valid: Tensor
    fps: Tensor
    keys: list[str]


class MotionPriorModule(L.LightningModule):
    """Reconstruction and KL loss, optimiser, and reconstruction errors through the body.

    Args:
        vae: sizes of the VAE; `representation` says whether poses are joints and twists, or 6D rotations.
        init_from: checkpoint of a motion prior of these sizes, or of a decoder with one in it, to start from, or null.
            Its statistics are taken over: they belong to its weights.
        body: "free", or the path of an SMPL-format body file.
        optimizer: AdamW and its schedule.
        kl_weight: of the mean KL divergence a number, beside the mean squared error of normalised numbers (MLD: 1e-4).
        mirror: share of training windows that are mirrored.
        reverse: share of training windows that run backwards.
        seed: dropout, latents and augmentation of batch n on rank r are seeded by (seed, n, r).
    """

    def __init__(
        self,
        vae: MotionVAEConfig,
        init_from: str | None = None,
        body: str = "free",
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4),  # noqa: B008  (frozen, so sharing it is safe)
        kl_weight: float = 1e-4,
        mirror: float = 0.5,
        reverse: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("mirror", mirror), ("reverse", reverse)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight must be 0 or more, got {kl_weight}")
        self.prior = MotionPrior(vae)
        self.body = load_body(body)
        if init_from is not None:
            start_from(self.prior, init_from, self.body.id)
        self.optimizer_config, self.kl_weight = optimizer, kl_weight
        self.mirror, self.reverse, self.seed = mirror, reverse, seed
        self.errors = PoseErrors(PROTOCOLS["body-24"])
        self.jitter, self.true_jitter = MeanMetric(), MeanMetric()  # mean acceleration of joints

    # ---- one batch ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Windows, batch_idx: int) -> Tensor:
        poses, valid = self._augmented(self._encoded(batch), batch.valid)
        latent = self.prior.encode(poses, valid)
        decoded = self.prior.vae.decode(latent.sample(), poses.shape[1], valid)
        error = (decoded - self.prior.normalise(poses)).square().mean(-1)
        parts = {"reconstruction": error[valid].mean(), "kl": latent.kl()}
        loss = parts["reconstruction"] + self.kl_weight * parts["kl"]
        if not torch.isfinite(loss):
            values = ", ".join(f"{k}={v.item():g}" for k, v in parts.items())
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.global_step}: {values}; windows: {', '.join(batch.keys)}. "
                "Lower optimizer.lr."
            )
        self.log_dict({f"train/{k}": v.detach() for k, v in parts.items()}, batch_size=len(poses))
        return loss

    def validation_step(self, batch: Windows, batch_idx: int) -> None:
        betas = _per_frame(batch)
        poses = self._encoded(batch)
        with torch.autocast(self.device.type, enabled=False):
            latent = self.prior.encode(poses, batch.valid)
            decoded = self.prior.decode(latent.mean.float(), poses.shape[1], batch.valid)
            rotations = decode_pose(decoded, betas, self.body, self.prior.config.representation)
        ours, true = (self._joints(r, betas) for r in (rotations, batch.rotations))
        self.errors.update(ours, true, None, None, batch.valid, batch.fps)
        for own, other, valid, fps in zip(ours, true, batch.valid, batch.fps.tolist(), strict=True):
            if int(valid.sum()) >= 3:
                for metric, joints in ((self.jitter, own[valid]), (self.true_jitter, other[valid])):
                    metric.update(acceleration_error(joints, torch.zeros_like(joints), fps))

    def on_validation_epoch_end(self) -> None:
        values = self.errors.compute()
        self.errors.reset()
        for name, metric in (("jitter_m_s2", self.jitter), ("jitter_true_m_s2", self.true_jitter)):
            values[name] = metric.compute()
            metric.reset()
        kept = ("mpjpe_mm", "pa_mpjpe_mm", "accel_m_s2", "jitter_m_s2", "jitter_true_m_s2")
        self.log_dict({f"val/{k}": values[k].to(self.device, torch.float32) for k in kept}, rank_zero_only=False)

    def _encoded(self, batch: Windows) -> Tensor:
        """The numbers of the batch's poses, (B, T, pose_dim)."""
        return encode_pose(batch.rotations, _per_frame(batch), self.body, self.prior.config.representation)

    def _joints(self, rotations: Tensor, betas: Tensor) -> Tensor:
        shape = rotations.shape[:2]
        joints = self.body.joints29(rotations.flatten(0, 1), betas.flatten(0, 1))
        return joints[:, :NUM_JOINTS].unflatten(0, shape)

    def _augmented(self, poses: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Mirror and reverse random windows; a reversed one keeps its padding at the end."""
        mirrored = mirror_pose(poses, self.prior.config.representation)
        choice = torch.rand(2, len(poses), device=poses.device)
        poses = torch.where((choice[0] < self.mirror)[:, None, None], mirrored, poses)
        index = torch.arange(poses.shape[1], device=poses.device).expand(poses.shape[:2])
        backwards = torch.where(valid, valid.sum(1, keepdim=True) - 1 - index, index)
        index = torch.where((choice[1] < self.reverse)[:, None], backwards, index)
        return poses.take_along_dim(index[..., None], dim=1), valid

    # ---- optimisation ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total) or total <= 0:
            raise ValueError("the schedule needs a length: set trainer.max_steps or trainer.max_epochs")
        optimizer, scheduler = build_optimizer(self.prior, self.optimizer_config, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        if bool((self.prior.deviation != 1).any()):
            return  # those of a checkpoint
        batch: Windows = self.trainer.datamodule.first_windows(_STATISTICS_WINDOWS).to(self.device)  # type: ignore[attr-defined]
        numbers = self._encoded(batch)[batch.valid]
        self.prior.fit_statistics(torch.cat((numbers, mirror_pose(numbers, self.prior.config.representation))))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        position = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        torch.manual_seed(hash((self.seed, position, self.global_rank)) % 2**63)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fasthmr"] = prior_header(self.prior.config, self.body.id, "prior.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        header = checkpoint.get("fasthmr")
        if header is None or header.get("kind") != "motion_prior":
            raise ValueError("the checkpoint is not of a motion prior")
        require_same_body(self.body.id, header["body"], where="the checkpoint")
        # A setting that is younger than the checkpoint had its default value there.
        if MotionVAEConfig().as_dict() | header["config"] != self.prior.config.as_dict():
            raise ValueError(f"the checkpoint is of another motion prior: {header['config']}")


def start_from(prior: MotionPrior, checkpoint: str, body_id: str) -> None:
    """Give a prior the weights and statistics of a checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: as `load_prior`.
        BodyMismatchError: it was trained with another body.
        ValueError: it has other sizes; names them.
    """
    start, trained_body = load_prior(checkpoint)
    require_same_body(body_id, trained_body, where=checkpoint)
    theirs, ours = start.config.as_dict(), prior.config.as_dict()
    if changed := [f"{k}: {theirs[k]} -> {ours[k]}" for k in ours if theirs[k] != ours[k] and k != "dropout"]:
        raise ValueError(f"{checkpoint} is another motion prior ({'; '.join(changed)}): set model.init_args.vae to its")
    prior.load_state_dict(start.state_dict())


def _per_frame(batch: Windows) -> Tensor:
    """The betas of every frame, (B, T, 10)."""
    return batch.betas[:, None].expand(-1, batch.valid.shape[1], -1)
