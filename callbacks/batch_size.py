"""How many samples an optimiser step sees, over all processes; and the learning rate that goes with it."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import lightning as L

from fasthmr.lit.optim import OptimizerConfig

log = logging.getLogger(__name__)


def global_batch_size(trainer: L.Trainer) -> int:
    """Samples of an optimiser step: those of a batch, times processes, times accumulated batches."""
    per_process: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
    return per_process * trainer.world_size * trainer.accumulate_grad_batches


class SayBatchSize(L.Callback):
    """Says at the start what an optimiser step sees."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and hasattr(trainer.datamodule, "batch_size"):  # type: ignore[attr-defined]
            optimizer: OptimizerConfig = pl_module.optimizer_config  # type: ignore[assignment]
            log.info(
                "an optimiser step sees %d samples: batches of %d, on %d process(es), %d accumulated; learning rate %g",
                global_batch_size(trainer), trainer.datamodule.batch_size, trainer.world_size,  # type: ignore[attr-defined]
                trainer.accumulate_grad_batches, optimizer.lr,
            )  # fmt: skip


class LearningRateScaling(L.Callback):
    """Sets the learning rate for the batch that is there, from the one that `optimizer.lr` was chosen for.

    Without it `optimizer.lr` is used as it is, however many processes there are.

    Args:
        reference: samples of an optimiser step, over all processes, for which `optimizer.lr` is right.
        rule: "linear" (Goyal et al., 2017, for SGD) or "sqrt" (Malladi et al., 2022, for Adam).
    """

    def __init__(self, reference: int, rule: Literal["linear", "sqrt"] = "sqrt") -> None:
        if reference < 1:
            raise ValueError(f"reference must be at least 1 sample, got {reference}")
        if rule not in ("linear", "sqrt"):
            raise ValueError(f"rule must be 'linear' or 'sqrt', got {rule!r}")
        self.reference, self.rule = reference, rule

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before optimisers are made; the config, and so a resumed run, keeps `optimizer.lr` as it was given."""
        ratio = global_batch_size(trainer) / self.reference
        given: OptimizerConfig = pl_module.optimizer_config  # type: ignore[assignment]
        lr = given.lr * (ratio if self.rule == "linear" else ratio**0.5)
        pl_module.optimizer_config = dataclasses.replace(given, lr=lr)  # type: ignore[assignment]
