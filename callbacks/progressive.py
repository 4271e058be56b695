"""Progressive merging: layers become one while the model is fine-tuned, inside an error budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from fasthmr.calibration import CalibrationSet, PlanErrors
from fasthmr.lit.collapse import Moments, collapse_while_training, require_mergeable
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.merging import LayerMergePlan
from fasthmr.merging.policies import Choice, least_error_window, most_similar_window
from fasthmr.merging.similarity import linear_cka
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
    plan, and a run resumed from any checkpoint merges as the uninterrupted one does.

    Exactly one of `at_steps`, `at_epochs`, `every_n_steps` and `settled_mm` says when it is due.

    Args:
        calibration: folder of shards to measure errors on.
        budget_mm: how far the error may rise above the reference, mm; null with `policy: schedule` for no limit.
        policy: "eclm": the window of neighbours that leaves the least error; "cka": the neighbours whose outputs are
            most similar; "schedule": the events of `plan`, one after the other.
        plan: for `schedule`: events `[{keep: 10, drop: [11]}, ...]` by original layer numbers.
        at_steps: optimiser steps.
        at_epochs: epochs, at whose start it is due.
        every_n_steps: optimiser steps between events.
        settled_mm: due when a validation's MPJPE is not lower than the best one since the last event by more than this.
        min_steps_between: at least so many steps between events, for `settled_mm`.
        layers_per_event: at most so many layers are removed at once.
        target_layers: stop when so many are left; null: at 1, or as many as token merging needs.
        frames_per_clip: calibration frames of each clip.
        max_clips: calibration clips; null for all.
        moments: Adam moments of a merged layer: of the "later" layer, or "reset".
        precision: of the calibration, "bf16" or "32".
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
        precision: Literal["bf16", "32"] = "bf16",
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
        if budget_mm is not None and not budget_mm >= 0:
            raise ValueError(f"budget_mm must be 0 or more, got {budget_mm}")
        if (plan is not None) != (policy == "schedule"):
            raise ValueError("plan belongs to policy: schedule, which needs it")
        if moments not in ("later", "reset"):
            raise ValueError(f"moments must be 'later' or 'reset', got {moments!r}")
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("layers_per_event", layers_per_event, 1),
            ("target_layers", target_layers, 1),
            ("min_steps_between", min_steps_between, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.calibration, self.budget_mm, self.policy, self.events = Path(calibration), budget_mm, policy, plan
        self.at_steps, self.at_epochs = at_steps, at_epochs
        self.every_n_steps, self.settled_mm, self.min_steps_between = every_n_steps, settled_mm, min_steps_between
        self.layers_per_event, self.target_layers = layers_per_event, target_layers
        self.frames_per_clip, self.max_clips = frames_per_clip, max_clips
        self.moments: Moments = moments
        self.precision, self.cache_gb = precision, cache_gb
        self._target = 1
        self._frames: CalibrationSet | None = None
        # Restored from checkpoints: what was decided depends on it.
        self.reference_mm: float | None = None
        self.last_tried = -1  # optimiser step at which it was last due
        self.best_since_mm: float | None = None  # lowest validation error since then
        self.settled = False
        self.history: list[dict[str, Any]] = []

    # ---- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What decisions depend on; the plan itself is the module's."""
        return {
            "reference_mm": self.reference_mm,
            "last_tried": self.last_tried,
            "best_since_mm": self.best_since_mm,
            "settled": self.settled,
            "history": list(self.history),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, MergedEncoderModule):
            raise ValueError(f"progressive merging is for MergedEncoderModule, got {type(pl_module).__name__}")
        require_mergeable(trainer.strategy)
        depth = pl_module.net.config.vit_depth
        if self.events is not None:
            self._scheduled(pl_module.net.merge_plan)
        backbone = pl_module.net.backbone
        if self.target_layers is None:
            self._target = max(1, len(backbone.tokens_merged(depth)))
        elif self.target_layers > depth:
            raise ValueError(f"target_layers must be at most the model's {depth}, got {self.target_layers}")
        else:
            backbone.tokens_merged(self.target_layers)  # token merging needs some layers
            self._target = self.target_layers
        self._frames = CalibrationSet.read(
            self.calibration,
            pl_module.body.id,
            self.frames_per_clip,
            self.max_clips,
            trainer.global_rank,
            trainer.world_size,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MergedEncoderModule)
        if self.reference_mm is None:
            self.reference_mm = self._errors(pl_module)(LayerMergePlan(len(pl_module.net.backbone.blocks)))
            log.info("reference error of progressive merging: %.2f mm", self.reference_mm)
        self._show(trainer, pl_module, {})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.settled_mm is None or trainer.sanity_checking:
            return
        now = float(trainer.callback_metrics["val/mpjpe_mm"])
        if self.best_since_mm is not None and now > self.best_since_mm - self.settled_mm:
            self.settled = True
        self.best_since_mm = min(now, self.best_since_mm if self.best_since_mm is not None else now)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MergedEncoderModule)
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._due(trainer, batch_idx):
            self.last_tried = trainer.global_step
            self.settled, self.best_since_mm = False, None
            self._merge(trainer, pl_module)

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
        if layers <= self._target:
            return
        errors = self._errors(module)
        before = errors(LayerMergePlan(layers))
        choice = self._choose(module, errors)
        # Every rank measured the same errors; that they decide the same must not rest on it.
        found: Choice | None = trainer.strategy.broadcast(choice, src=0)
        if found is None:
            log.info("step %d: nothing can be merged within the budget", trainer.global_step)
            self._show(trainer, module, {"error_before_mm": before})
            return
        plan = module.net.merge_plan.then(found.plan)
        collapse_while_training(trainer, module, plan, self.moments)
        after = found.error_mm
        self.history.append(
            {"step": trainer.global_step, "layers": len(plan.layers), "before_mm": before, "after_mm": after}
        )
        log.info(
            "step %d: %d -> %d layers, error %.2f -> %.2f mm (reference %.2f): %s",
            trainer.global_step, layers, len(plan.layers), before, after, self.reference_mm, plan,
        )  # fmt: skip
        self._keep_best_of_this_depth(trainer, layers)
        self._show(trainer, module, {"error_before_mm": before, "error_after_mm": after})

    def _choose(self, module: MergedEncoderModule, errors: PlanErrors) -> Choice | None:
        layers = len(module.net.backbone.blocks)
        removed = min(self.layers_per_event, layers - self._target)
        assert self.reference_mm is not None
        limit = float("inf") if self.budget_mm is None else self.reference_mm + self.budget_mm
        if self.policy == "eclm":
            return least_error_window(layers, errors, limit, removed)
        if self.policy == "cka":
            plan = most_similar_window(linear_cka(errors.token_features()), removed)
        else:
            plan = self._scheduled(module.net.merge_plan)
        if plan is None:
            return None
        choice = Choice(plan, errors(plan))
        return choice if choice.error_mm < limit else None

    def _scheduled(self, done: LayerMergePlan) -> LayerMergePlan | None:
        """The next event of the given plan, for the layers that are left; None when all were done."""
        whole = LayerMergePlan.from_dict({"depth": done.depth, "events": self.events})
        coming: Sequence = whole.after(done)
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

    # ---- what is seen of it ---------------------------------------------------------------------------------------

    def _keep_best_of_this_depth(self, trainer: L.Trainer, layers: int) -> None:
        """Start the choice of the best checkpoint anew: one of a deeper model would never be beaten."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_model_path:
                best = Path(callback.best_model_path)
                if trainer.is_global_zero and best.exists():
                    best.replace(best.with_name(f"{best.stem}_{layers}_layers{best.suffix}"))
                callback.best_model_path, callback.best_model_score = "", None
                callback.best_k_models, callback.kth_best_model_path, callback.kth_value = {}, "", None  # type: ignore[assignment]

    def _show(self, trainer: L.Trainer, module: MergedEncoderModule, values: dict[str, float]) -> None:
        plan = module.net.merge_plan
        scalars = {"layers": float(len(plan.layers)), **values}
        if "error_after_mm" in values and self.reference_mm is not None:
            scalars["budget_used_mm"] = values["error_after_mm"] - self.reference_mm
        for logger in trainer.loggers:
            logger.log_metrics({f"merge/{name}": value for name, value in scalars.items()}, trainer.global_step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                told = "\n".join(f"    {line}" for line in plan.picture().splitlines())
                reference = f"reference {self.reference_mm:.2f} mm, budget {self.budget_mm} mm"
                logger.experiment.add_text("merge/plan", f"{told}\n\n{plan}\n\n{reference}", trainer.global_step)
                figure = Figure(figsize=(8, 2.2), layout="constrained")
                draw_plan(figure.subplots(), plan)
                logger.experiment.add_image("merge/plan", figure_pixels(figure), trainer.global_step, dataformats="HWC")
