"""LastValidation: every checkpoint knows the metrics of the validation before it, and none that was due is left out."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastValidation(L.Callback):
    """Keeps the metrics (`val/...`) of the last validation, and the step at which it was, in checkpoints.

    `ModelCheckpoint` saves after all other callbacks: in a checkpoint of a validation they are that validation's.

    Lightning writes step-wise checkpoints before the validation that is due at the same step, and leaves that
    validation out when it resumes from one; were it the best, its weights would be lost. Here a checkpoint says that
    the validation is still to come, and a run that goes on from it starts with it.
    """

    #: under which a checkpoint has them, among its `callbacks`
    STATE_KEY = "LastValidation"

    def __init__(self) -> None:
        self.step: int | None = None
        self.metrics: dict[str, float] = {}
        self.pending = False  # a validation follows the batch that just ended, and was not seen yet

    @property
    def state_key(self) -> str:
        return self.STATE_KEY

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.pending:
            _validate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pending = _validation_follows(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.pending = False
            self.step = trainer.global_step
            self.metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("val/")}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "metrics": dict(self.metrics), "pending": self.pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.metrics = state_dict["step"], dict(state_dict["metrics"])
        self.pending = state_dict.get("pending", False)  # checkpoints of earlier versions do not say


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether the batch that just ended is followed by a validation."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _validate(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Validate as the training loop does."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False  # from its first batch
    trainer.validating = True
    validation.run()
    trainer.training = True
    # Where each epoch ends with a validation, best checkpoints are saved after it, in a hook that does not come again.
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.on_train_epoch_end(trainer, pl_module)
