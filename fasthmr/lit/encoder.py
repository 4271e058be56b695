"""MergedEncoderModule: trains and validates the per-frame encoder (HMR) on batches of clips."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fasthmr.body import load_body, require_same_body
from fasthmr.checkpoint import encoder_header, load_encoder, read_header
from fasthmr.conventions import CROP_FOCAL_PX, CROP_PX, JOINTS29
from fasthmr.data.batch import ClipBatch, person_mask
from fasthmr.geometry.cameras import crop_camera_translation, project, project_into_crop
from fasthmr.lit.average import averaged
from fasthmr.lit.optim import OptimizerConfig, build_optimizer
from fasthmr.losses import HMRTarget, LossWeights, NonFiniteLossError, feature_loss, hmr_losses, token_joint_loss
from fasthmr.merging import LayerMergePlan
from fasthmr.metrics import PROTOCOLS, BestConstantError, PoseErrors
from fasthmr.models.hmr import HMR, TOKEN_GRID, HMRConfig, HMROutput


class MergedEncoderModule(L.LightningModule):
    """Losses, optimiser, metrics and checkpoint header of the encoder.

    The net works frame by frame; a batch of B clips with T frames is B*T independent frames in training. In validation
    each clip is a sequence, because the acceleration error needs consecutive frames.

    `net.merge_plan` says which of its layers became one; it is saved in every checkpoint, and is the structure that a
    checkpoint is restored to.

    Args:
        net: sizes of the encoder.
        body: "free", or the path of an SMPL-format body file. Its id is saved, and checked on loading.
        optimizer: AdamW and its schedule.
        loss: weights of the loss parts.
        ema_decay: decay of the exponential moving average of the weights, or null for none. Validation, `best`
            checkpoints and `load_encoder` use the average.
        protocol: name of the evaluation protocol of the validation metrics (`fasthmr.metrics.PROTOCOLS`).
        init_from: checkpoint of an encoder whose weights to start from, or null.
        mask_people: whose tokens merging protects: the tracked person's, or all people's.
        teacher: checkpoint of an encoder, usually the un-merged one, whose feature the loss part `feature` imitates.
        teacher_steps: imitate it for so many optimiser steps only; null: to the end.
        seed: dropout of step s on rank r is seeded by (seed, s, r), so that a resumed run equals an uninterrupted one.
    """

    def __init__(
        self,
        net: HMRConfig,
        body: str = "free",
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  (frozen, so sharing it is safe)
        loss: LossWeights = LossWeights(),  # noqa: B008
        ema_decay: float | None = 0.999,
        protocol: str = "body-24",
        init_from: str | None = None,
        mask_people: Literal["subject", "all"] = "subject",
        teacher: str | None = None,
        teacher_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {sorted(PROTOCOLS)}, got {protocol!r}")
        if mask_people not in ("subject", "all"):
            raise ValueError(f"mask_people must be 'subject' or 'all', got {mask_people!r}")
        self.net = HMR(net)
        if init_from is not None:
            start_from(self.net, init_from, load_body(body).id)
        if (teacher is not None) != (loss.feature > 0):
            raise ValueError(f"teacher and loss.feature belong together, got {teacher!r} and {loss.feature}")
        # In a list, so that it is no part of this module: neither trained nor saved.
        self._teacher = [load_encoder(teacher).requires_grad_(False)] if teacher is not None else []
        self.teacher_steps = teacher_steps
        # In training only: what is saved for use is `net`, HMR2.0's architecture and nothing else.
        self.token_joints = nn.Linear(net.vit_dim, len(JOINTS29)) if loss.token_joints > 0 else None
        self.ema = averaged(self.net, ema_decay) if ema_decay is not None else None
        self.body = load_body(body)
        self.optimizer_config = optimizer
        self.loss_weights = loss
        self.mask_people = mask_people
        self.seed = seed
        self.errors = PoseErrors(PROTOCOLS[protocol])
        self.constant_error = BestConstantError(PROTOCOLS[protocol])

    @property
    def best_net(self) -> nn.Module:
        """The weights to use: their moving average where there is one."""
        return self.ema.module if self.ema is not None else self.net

    @property
    def nets(self) -> list[HMR]:
        """The network that trains, and its moving average where there is one: what is merged together."""
        return [self.net] if self.ema is None else [self.net, cast(HMR, self.ema.module)]

    @property
    def _trained(self) -> nn.Module:
        return nn.ModuleList(m for m in (self.net, self.token_joints) if m is not None)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser is to hold."""
        return [p for p in self._trained.parameters() if p.requires_grad]

    # ---- one batch ------------------------------------------------------------------------------------------------

    def forward(self, batch: ClipBatch) -> HMROutput:
        """Predict every frame of a batch with the weights to use: outputs have B*T rows, clip by clip."""
        return self.best_net(batch.network_input(), self._masks(batch, self.net), batch.box_info())

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        parts = self.loss(batch)
        loss = parts["total"]
        # Checked before the backward pass, so that neither weights nor checkpoints ever hold the NaN.
        if not torch.isfinite(loss):
            values = ", ".join(f"{k}={v.item():g}" for k, v in parts.items())
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.global_step}: {values}; clips: {', '.join(batch.keys)}. "
                "Look at these clips with `python -m fasthmr.shard inspect --show`, or lower optimizer.lr."
            )
        self.log_dict({f"train/loss_{k}": v.detach() for k, v in parts.items()}, batch_size=len(batch.keys))
        return loss

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the metrics; returns the fields of its `HMROutput` for callbacks."""
        output: HMROutput = self(batch)
        clips, frames = batch.valid.shape
        betas = self.errors.protocol.clip_betas(output.betas.unflatten(0, (clips, frames)), batch.valid)
        predicted = self.body(output.rotations, betas.flatten(0, 1))
        target = self.body(batch.rotations.flatten(0, 1), batch.betas.repeat_interleave(frames, 0))
        shape = (clips, frames)
        self.errors.update(
            pred_joints=predicted.joints.unflatten(0, shape),
            target_joints=target.joints.unflatten(0, shape),
            pred_vertices=predicted.vertices.unflatten(0, shape),
            target_vertices=target.vertices.unflatten(0, shape),
            valid=batch.valid & batch.has_pose[:, None],
            fps=batch.fps,
        )
        self.constant_error.update(target.joints.unflatten(0, shape), batch.valid & batch.has_pose[:, None])
        return output._asdict()

    def on_validation_epoch_end(self) -> None:
        # Logged here and not in the step: a rank whose share of the validation set is empty must log the same keys.
        values = {f"val/{k}": v for k, v in self.errors.compute().items()}
        values["val/mpjpe_best_constant_mm"] = self.constant_error.compute()
        self.errors.reset()
        self.constant_error.reset()
        self.log_dict({k: v.to(self.device, torch.float32) for k, v in values.items()}, rank_zero_only=False)

    def loss(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Loss parts of the training weights on a batch, and their weighted sum "total"; scalars."""
        mask = self._masks(batch, self.net, *self._teacher)
        output: HMROutput = self.net(batch.network_input(), mask, batch.box_info())
        frames = batch.valid.shape[1]
        joints = self.body.joints29(output.rotations, output.betas)
        with torch.autocast(joints.device.type, enabled=False):
            joints2d = self._joints2d(joints, output.camera.float(), batch)
            target = HMRTarget(
                rotations=batch.rotations.flatten(0, 1),
                betas=batch.betas.repeat_interleave(frames, 0),
                joints3d=batch.joints3d.flatten(0, 1),
                joints2d=batch.joints2d.flatten(0, 1),
                has_pose=batch.has_pose.repeat_interleave(frames),
                has_betas=batch.has_betas.repeat_interleave(frames),
                valid=batch.valid.flatten(),
            )
            parts = hmr_losses(output.rotations, output.betas, joints, joints2d, target, self.loss_weights)
        if self.token_joints is not None:
            # Back on the grid: places whose tokens were merged share one.
            logits = self.token_joints(output.tokens).take_along_dim(output.slots[..., None], dim=1)
            parts["token_joints"] = token_joint_loss(logits, target.joints2d, target.valid, TOKEN_GRID)
            parts["total"] = parts["total"] + self.loss_weights.token_joints * parts["token_joints"]
        for teacher in self._teacher:
            if self.teacher_steps is None or self.global_step < self.teacher_steps:
                with torch.no_grad():
                    teacher.to(output.feature.device)
                    wanted = teacher(batch.network_input(), mask, batch.box_info()).feature
                parts["feature"] = feature_loss(output.feature, wanted)
                parts["total"] = parts["total"] + self.loss_weights.feature * parts["feature"]
        return parts

    def _masks(self, batch: ClipBatch, *nets: HMR) -> Tensor | None:
        """Person masks for these networks: None where a clip has none, and an error where one of them needs it."""
        settings = [net.config.token_merging for net in nets]
        return person_mask(batch, self.mask_people, any(s is not None and s.mask == "given" for s in settings))

    def _joints2d(self, joints: Tensor, camera: Tensor, batch: ClipBatch) -> Tensor:
        """Where predicted joints are seen: (N, 29, 2) in crop widths from the crop's centre, as labels are."""
        if self.net.config.full_image:
            center, size = batch.box_center.flatten(0, 1), batch.box_size.flatten()
            return project_into_crop(joints, camera, center, size, batch.per_frame(batch.intrinsics))
        translation = crop_camera_translation(camera, CROP_FOCAL_PX, CROP_PX)
        # focal / crop: image coordinates come out in crop widths
        return project(joints, translation, CROP_FOCAL_PX / CROP_PX, joints.new_zeros(len(joints), 2))

    # ---- optimisation ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total) or total <= 0:
            raise ValueError("the schedule needs a length: set trainer.max_steps or trainer.max_epochs")
        optimizer, scheduler = build_optimizer(self._trained, self.optimizer_config, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: ClipBatch, batch_idx: int) -> None:
        # Lightning does not save RNG states: dropout depends on the batch's number instead, which it does save.
        position = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        torch.manual_seed(hash((self.seed, position, self.global_rank)) % 2**63)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.net)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        prefix = "ema.module." if self.ema is not None else "net."
        checkpoint["fasthmr"] = encoder_header(self.net.config, self.body.id, self.net.merge_plan, prefix)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Called before the weights are loaded: refuse here with names instead of a list of tensor shapes later.
        header = checkpoint.get("fasthmr")
        if header is None:
            raise ValueError("the checkpoint was not written by fasthmr: it has no 'fasthmr' header")
        require_same_body(self.body.id, header["body"], where="the checkpoint")
        ours, theirs = (
            encoder_header(self.net.config, self.body.id, self.net.merge_plan, "")["config"],
            HMRConfig.from_dict(header["config"]).as_dict(),  # with defaults for what older versions did not know
        )
        changed = [
            f"{k}: {theirs.get(k)} -> {ours.get(k)}" for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)
        ]
        if changed:
            raise ValueError(
                f"the checkpoint is of another encoder ({'; '.join(changed)}): resume with its own config, "
                "or start a new run with model.init_args.init_from"
            )
        # Only the structure: the merged weights are among those that are loaded next.
        plan = LayerMergePlan.from_dict({"depth": self.net.config.vit_depth, "events": header["merge_plan"]})
        for net in self.nets:
            net.merge_layers(plan)


def start_from(net: HMR, checkpoint: str, body_id: str) -> None:
    """Give a network the weights and merged layers of an encoder's checkpoint; token merging and dropout may differ.

    Raises:
        FileNotFoundError, CheckpointError: as `load_encoder`.
        BodyMismatchError: it was trained with another body.
        ValueError: it has other sizes; names them.
    """
    require_same_body(body_id, read_header(checkpoint).body, where=checkpoint)
    start = load_encoder(checkpoint)
    ours, theirs = net.config.as_dict(), start.config.as_dict()
    free = ("token_merging", "drop_path", "head_dropout")
    changed = [f"{k}: {theirs[k]} -> {ours[k]}" for k in ours if k not in free and ours[k] != theirs[k]]
    if changed:
        raise ValueError(
            f"{checkpoint} is an encoder of other sizes ({'; '.join(changed)}): set model.init_args.net to its"
        )
    net.merge_layers(start.merge_plan)
    net.load_state_dict(start.state_dict())
