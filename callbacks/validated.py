"""LastValidation: every checkpoint knows the metrics of the validation before it, the best one its own."""

from __future__ import annotations

from typing import Any

import lightning as L


class LastValidation(L.Callback):
    """Keeps the metrics (`val/...`) of the last validation, and the step at which it was, in checkpoints.

    `ModelCheckpoint` saves after all other callbacks: in a checkpoint of a validation they are that validation's.
    """

    #: under which a checkpoint has them, among its `callbacks`
    STATE_KEY = "LastValidation"

    def __init__(self) -> None:
        self.step: int | None = None
        self.metrics: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        return self.STATE_KEY

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.step = trainer.global_step
            self.metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("val/")}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.metrics = state_dict["step"], dict(state_dict["metrics"])
