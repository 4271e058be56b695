"""Progressive merging: layers become one while the model is fine-tuned, inside an error budget."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from callbacks.curves import Curves
from callbacks.validated import LastValidation
from fasthmr.calibration import CalibrationSet, PlanErrors
from fasthmr.checkpoint import read_header
from fasthmr.lit.collapse import Moments, collapse_while_training, require_mergeable
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.merging import LayerMergePlan
from fasthmr.merging.policies import Choice, least_error_window, most_similar_window
from fasthmr.merging.similarity import linear_cka
from fasthmr.precision import PrecisionChoice, chosen_precision, require_precision
from fasthmr.report import draw_plan, figure_pixels

log = logging.getLogger(__name__)


class ProgressiveMerging(L.Callback):
    """Merges layers of a `MergedEncoderModule` during training, and lets fine-tuning recover in between.

    Each time it is due, a policy proposes layers to merge. They are merged if the error on calibration frames stays
    below the reference error plus the budget; otherwise nothing happens until it is due again. The reference is the
    error of the model that training starts from (un-merged unless it was loaded merged, with token merging as
    configured), measured once. Errors are those of the weights that validation uses (the moving average if there is
    one).

    It works on one device and under DDP, with gradient accumulation, bf16 and moving averages; the module saves the
    plan, and a run resumed from any checkpoint merges as the uninterrupted one does. What its merges follow from is
    saved too, and resuming with something else is refused: the reference error would mean nothing.

    Exactly one of `at_steps`, `at_epochs`, `every_n_steps` and `settled_mm` says when it is due.

    Args:
        calibration: folder of shards to measure errors on.
        budget_mm: how far the error may rise above the reference, mm; null with `policy: schedule` for no limit.
        policy: "eclm": the window of neighbours that leaves the least error; "cka": the neighbours whose outputs are
            most similar; "schedule": the events of `plan`, one after the other.
        plan: for `schedule`: events `[{keep: 10, drop: [11]}, ...]` by original layer numbers.
        at_steps: optimiser steps, from 0.
        at_epochs: epochs, from 0, at whose start it is due.
        every_n_steps: optimiser steps between events.
        settled_mm: due when a validation's MPJPE is not lower than the best one since the last event by more than this.
            Needs `LastValidation`, so that a resumed run sees the same validations.
        min_steps_between: at least so many steps between events, for `settled_mm`.
        layers_per_event: at most so many layers are removed at once.
        target_layers: stop when so many are left; null: at 1, or as many as token merging needs.
        frames_per_clip: calibration frames of each clip.
        max_clips: calibration clips; null for all.
        moments: Adam moments of a merged layer: of the "later" layer, or "reset".
        precision: of the calibration: "bf16", "32", or "auto": bf16 where the device has instructions.
        cache_gb: memory for outputs of layers that do not change.

    Raises:
        ValueError: a setting that cannot be; names it.
    """

    def __init__(
        self,
        calibration: str | Path,
        budget_mm: float | None = 1.0,
        policy: Literal["eclm", "cka", "schedule"] = "eclm",
        plan: list[dict[str, Any]] | None = None,
        at_steps: list[int] | None = None,
        at_epochs: list[int] | None = None,
        every_n_steps: int | None = None,
        settled_mm: float | None = None,
        min_steps_between: int = 0,
        layers_per_event: int = 1,
        target_layers: int | None = None,
        frames_per_clip: int = 80,
        max_clips: int | None = None,
        moments: Moments = "later",
        precision: PrecisionChoice = "auto",
        cache_gb: float = 2.0,
    ) -> None:
        due = {"at_steps": at_steps, "at_epochs": at_epochs, "every_n_steps": every_n_steps, "settled_mm": settled_mm}
        given = [name for name, value in due.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of {', '.join(due)}, got {given or 'none'}")
        if policy not in ("eclm", "cka", "schedule"):
            raise ValueError(f"policy must be eclm, cka or schedule, got {policy!r}")
        if budget_mm is None and policy != "schedule":
            raise ValueError(f"policy {policy} needs budget_mm")
        for name, number in (("budget_mm", budget_mm), ("settled_mm", settled_mm), ("cache_gb", cache_gb)):
            if number is not None and not (number >= 0 and math.isfinite(number)):
                raise ValueError(f"{name} must be a number of 0 or more, got {number}")
        for name, times in (("at_steps", at_steps), ("at_epochs", at_epochs)):
            if times is not None and (not times or min(times) < 0):
                raise ValueError(f"{name} must be one or more numbers of 0 or more, got {times}")
        if (plan is not None) != (policy == "schedule"):
            raise ValueError("plan belongs to policy: schedule, which needs it")
        if moments not in ("later", "reset"):
            raise ValueError(f"moments must be 'later' or 'reset', got {moments!r}")
        require_precision(precision)
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("layers_per_event", layers_per_event, 1),
            ("target_layers", target_layers, 1),
            ("min_steps_between", min_steps_between, 0),
            ("frames_per_clip", frames_per_clip, 1),
            ("max_clips", max_clips, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.calibration, self.budget_mm, self.policy, self.events = Path(calibration), budget_mm, policy, plan
        self.at_steps, self.at_epochs = at_steps, at_epochs
        self.every_n_steps, self.settled_mm, self.min_steps_between = every_n_steps, settled_mm, min_steps_between
        self.layers_per_event, self.target_layers = layers_per_event, target_layers
        self.frames_per_clip, self.max_clips = frames_per_clip, max_clips
        self.moments: Moments = moments
        self.precision: PrecisionChoice = precision
        self.cache_gb = cache_gb
        self._target = 1
        self._frames: CalibrationSet | None = None
        self._settings: dict[str, Any] = {}
        self._saved_settings: dict[str, Any] | None = None  # of the checkpoint that this run goes on from
        # Restored from checkpoints: what was decided depends on it.
        self.reference_mm: float | None = None
        self.used_mm = 0.0  # of the budget, when it was last measured
        self.last_tried = -1  # optimiser step at which it was last due
        self.best_since_mm: float | None = None  # lowest validation error since then
        self.settled = False
        self.history: list[dict[str, Any]] = []

    # ---- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What decisions depend on, and the settings they were made with; the plan itself is the module's."""
        return {
            "settings": dict(self._settings),
            "reference_mm": self.reference_mm,
            "used_mm": self.used_mm,
            "last_tried": self.last_tried,
            "best_since_mm": self.best_since_mm,
            "settled": self.settled,
            "history": list(self.history),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; its settings are compared when the fit starts."""
        state = dict(state_dict)
        self._saved_settings = state.pop("settings")
        state.pop("validation_pending", None)  # in checkpoints of earlier versions; LastValidation knows it now
        for name, value in state.items():
            setattr(self, name, value)

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, MergedEncoderModule):
            raise ValueError(f"progressive merging is for MergedEncoderModule, got {type(pl_module).__name__}")
        require_mergeable(trainer.strategy)
        if self.settled_mm is not None and not any(isinstance(c, LastValidation) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "settled_mm needs callbacks.validated.LastValidation among the trainer's callbacks (fasthmr.fit adds "
                "it): without it, a resumed run misses validations that it is decided by"
            )
        depth = pl_module.net.config.vit_depth
        backbone = pl_module.net.backbone
        if self.target_layers is None:
            self._target = max(1, len(backbone.tokens_merged(depth)))
        elif self.target_layers > depth:
            raise ValueError(f"target_layers must be at most the model's {depth}, got {self.target_layers}")
        else:
            backbone.tokens_merged(self.target_layers)  # token merging needs some layers
            self._target = self.target_layers
        if self.events is not None:
            self._scheduled(pl_module.net.merge_plan)  # refuses a plan that does not continue the model's
            left = len(self._whole_plan(depth).layers)
            backbone.tokens_merged(left)
            if left < self._target:
                raise ValueError(
                    f"the plan leaves {left} layers, fewer than target_layers ({self._target}): give it fewer events, "
                    "or lower target_layers"
                )
        self._frames = CalibrationSet.read(
            self.calibration,
            pl_module.body.id,
            self.frames_per_clip,
            self.max_clips,
            trainer.global_rank,
            trainer.world_size,
        )
        self._settings = self._what_merges_follow_from(pl_module, self._frames)
        if self._saved_settings is not None:
            _require_same_settings(self._saved_settings, self._settings)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MergedEncoderModule)
        layers = len(pl_module.net.backbone.blocks)
        if self.reference_mm is None:
            self.reference_mm = self._error(trainer, self._errors(pl_module))(LayerMergePlan(layers))
        told = f"{layers} layers, reference error {self.reference_mm:.2f} mm, used {self._used()}"
        if any(isinstance(callback, Curves) and callback.go_on for callback in trainer.callbacks):  # type: ignore[attr-defined]
            log.info("step %d: %s", trainer.global_step, told)
            return
        self._show(trainer, told, {"layers": layers, "budget_used_mm": self.used_mm})
        self._show_plan(trainer, pl_module.net.merge_plan)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MergedEncoderModule)
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._due(trainer, batch_idx):
            self.last_tried = trainer.global_step
            self.settled, self.best_since_mm = False, None
            self._merge(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.settled_mm is None:
            return
        now = float(trainer.callback_metrics["val/mpjpe_mm"])
        if self.best_since_mm is not None and now > self.best_since_mm - self.settled_mm:
            self.settled = True
        self.best_since_mm = min(now, self.best_since_mm if self.best_since_mm is not None else now)

    # ---- when -----------------------------------------------------------------------------------------------------

    def _due(self, trainer: L.Trainer, batch_idx: int) -> bool:
        step = trainer.global_step
        if step == self.last_tried:
            return False
        if self.at_steps is not None:
            return step in self.at_steps
        if self.at_epochs is not None:
            return batch_idx == 0 and trainer.current_epoch in self.at_epochs
        if self.every_n_steps is not None:
            return step > 0 and step % self.every_n_steps == 0
        return self.settled and step - max(self.last_tried, 0) >= self.min_steps_between

    # ---- what -----------------------------------------------------------------------------------------------------

    def _merge(self, trainer: L.Trainer, module: MergedEncoderModule) -> None:
        layers = len(module.net.backbone.blocks)
        if layers <= self._target or (self.events is not None and self._scheduled(module.net.merge_plan) is None):
            return
        assert self.reference_mm is not None
        errors = self._errors(module)
        error = self._error(trainer, errors)
        before = error(LayerMergePlan(layers))
        limit = math.inf if self.budget_mm is None else self.reference_mm + self.budget_mm
        removed = min(self.layers_per_event, layers - self._target)
        if self.policy == "eclm":
            found = least_error_window(layers, error, limit, removed)
        else:
            plan = self._proposed(trainer, module, errors, removed)
            found = Choice(plan, error(plan))
        plan, after = module.net.merge_plan.then(found.plan), found.error_mm
        told = f"{layers} -> {len(plan.layers)} layers, error {before:.2f} -> {after:.2f} mm"
        scalars = {"error_before_mm": before, "error_after_mm": after}
        if not after < limit:
            self.used_mm = before - self.reference_mm
            told = f"refused: {told} is outside the budget; used {self._used()}. Tried: {plan}"
            self._show(trainer, told, {"layers": layers, "budget_used_mm": self.used_mm, **scalars})
            return
        collapse_while_training(trainer, module, plan, self.moments)
        self.used_mm = after - self.reference_mm
        self.history.append(
            {"step": trainer.global_step, "layers": len(plan.layers), "before_mm": before, "after_mm": after}
        )
        self._keep_best_of_this_depth(trainer)
        told = f"{told}, used {self._used()}: {plan}"
        self._show(trainer, told, {"layers": len(plan.layers), "budget_used_mm": self.used_mm, **scalars})
        self._show_plan(trainer, plan)

    def _proposed(
        self, trainer: L.Trainer, module: MergedEncoderModule, errors: PlanErrors, removed: int
    ) -> LayerMergePlan:
        """What `cka` or `schedule` would merge next: rank 0's proposal, for all ranks evaluate it together."""
        if self.policy == "cka":
            proposal = most_similar_window(linear_cka(errors.token_features()), removed)
        else:
            proposal = self._scheduled(module.net.merge_plan)
        plan: LayerMergePlan | None = trainer.strategy.broadcast(proposal, src=0)
        assert plan is not None  # there are more layers than the target, and events left
        return plan

    def _whole_plan(self, depth: int) -> LayerMergePlan:
        return LayerMergePlan.from_dict({"depth": depth, "events": self.events})

    def _scheduled(self, done: LayerMergePlan) -> LayerMergePlan | None:
        """The next event of the given plan, for the layers that are left; None when all were done."""
        coming: Sequence = self._whole_plan(done.depth).after(done)
        if not coming:
            return None
        left, event = done.layers, coming[0]
        return LayerMergePlan(len(left)).merged(left.index(event.keep), left.index(event.drop[-1]))

    def _errors(self, module: MergedEncoderModule) -> PlanErrors:
        assert self._frames is not None
        protocol = module.errors.protocol.name
        return PlanErrors(
            module.nets[-1], module.body, self._frames, protocol, self.cache_gb, self.precision, module.mask_people
        )

    @staticmethod
    def _error(trainer: L.Trainer, errors: PlanErrors) -> Callable[[LayerMergePlan], float]:
        """Error of a plan, over the clips of all ranks. All go by rank 0's number, so that all decide the same and
        ask for the same plan next."""
        return lambda plan: trainer.strategy.broadcast(errors(plan), src=0)

    def _what_merges_follow_from(self, module: MergedEncoderModule, frames: CalibrationSet) -> dict[str, Any]:
        """Settings and data that decide what is merged when, as plain data; see `_require_same_settings`.

        Not where the frames lie, nor `cache_gb`: they change no number.
        """
        tokens = module.net.config.token_merging
        return {
            "budget_mm": self.budget_mm,
            "policy": self.policy,
            "plan": self.events,
            "at_steps": self.at_steps,
            "at_epochs": self.at_epochs,
            "every_n_steps": self.every_n_steps,
            "settled_mm": self.settled_mm,
            "min_steps_between": self.min_steps_between,
            "layers_per_event": self.layers_per_event,
            "target_layers": self._target,
            "moments": self.moments,
            "precision": chosen_precision(self.precision, module.device),
            "frames_per_clip": self.frames_per_clip,
            "max_clips": self.max_clips,
            "calibration_id": frames.id,
            "protocol": module.errors.protocol.name,
            "mask_people": module.mask_people,
            "token_merging": None if tokens is None else dataclasses.asdict(tokens),
        }

    # ---- what is seen of it ---------------------------------------------------------------------------------------

    def _keep_best_of_this_depth(self, trainer: L.Trainer) -> None:
        """Start the choice of the best checkpoint anew: one of a deeper model would never be beaten.

        How deep the best one is it says itself: after a crash and a resume from before a merge, it may be the shallower
        model's that was lost, and must not take the place of a deeper one.
        """
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_model_path:
                best = Path(callback.best_model_path)
                if trainer.is_global_zero and best.exists():
                    depth = len(read_header(best).merge_plan.layers)
                    best.replace(best.with_name(f"{best.stem}_{depth}_layers{best.suffix}"))
                callback.best_model_path, callback.best_model_score = "", None
                callback.best_k_models, callback.kth_best_model_path, callback.kth_value = {}, "", None  # type: ignore[assignment]

    def _used(self) -> str:
        """How much of the budget: "1.30 of 5.00 mm"."""
        whole = "no limit" if self.budget_mm is None else f"{self.budget_mm:.2f} mm"
        return f"{self.used_mm:.2f} of {whole}"

    def _show(self, trainer: L.Trainer, told: str, scalars: dict[str, float]) -> None:
        """Tell what happened: in the log, as numbers and as a text."""
        step = trainer.global_step
        log.info("step %d: %s", step, told)
        for logger in trainer.loggers:
            logger.log_metrics({f"merge/{name}": float(value) for name, value in scalars.items()}, step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("merge/event", f"step {step}: {told}", step)

    def _show_plan(self, trainer: L.Trainer, plan: LayerMergePlan) -> None:
        """Draw which layers are one by now."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                told = "\n".join(f"    {line}" for line in plan.picture().splitlines())
                logger.experiment.add_text("merge/plan", f"{told}\n\n{plan}", trainer.global_step)
                figure = Figure(figsize=(8, 2.2), layout="constrained")
                draw_plan(figure.subplots(), plan)
                logger.experiment.add_image("merge/plan", figure_pixels(figure), trainer.global_step, dataformats="HWC")


def _require_same_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with merges that follow from something else than those of the checkpoint.

    Raises:
        ValueError: naming what changed.
    """
    # How the same frames were asked for does not matter.
    free = ("frames_per_clip", "max_clips") if saved["calibration_id"] == now["calibration_id"] else ()
    changed = [f"{k}: {saved.get(k)} -> {v}" for k, v in now.items() if k not in free and saved.get(k) != v]
    if changed:
        raise ValueError(
            f"progressive merging began with other settings ({'; '.join(changed)}): resume with those of the "
            "checkpoint, or start a new run from its weights with model.init_args.init_from"
        )
