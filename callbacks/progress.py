"""RunProgress: Lightning's progress bar, which is of the epoch, with the time that the whole run has left."""

from __future__ import annotations

import datetime
import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class RunProgress(RichProgressBar):
    """Rate and ETA of the epoch, and beside them `run_left`: hours, minutes and seconds, validations included.

    It follows from the time that the steps of this process have taken so far, so a resumed run does not count what came
    before.
    """

    _began, _first = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began, self._first = time.perf_counter(), trainer.global_step

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        done, total = trainer.global_step - self._first, trainer.estimated_stepping_batches
        if done > 0 and math.isfinite(total):
            seconds = (time.perf_counter() - self._began) / done * (total - trainer.global_step)
            items["run_left"] = str(datetime.timedelta(seconds=max(0, round(seconds))))
        return items
