"""StepNumbers: a run that was resumed counts its epochs, batches and steps as one that was not."""

from __future__ import annotations

from typing import Any

import lightning as L


class StepNumbers(L.Callback):
    """Keeps Lightning's counts right when a batch begins.

    Lightning does not count the epoch that follows when it goes on from a checkpoint of the last batch of one. The run
    itself is not hurt, but a checkpoint from the middle of that epoch then looks like one from between two epochs. What
    goes on from it starts the epoch anew: steps are logged one number too low, and the next validation is late or lost.

    Values of step n, which leads from n to n + 1, are logged under n. Put this before other callbacks, which log when a
    step begins.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop
        loop.epoch_loop._batches_that_stepped = trainer.global_step
        for batches in (loop.epoch_loop.batch_progress.total, loop.epoch_loop.batch_progress.current):
            batches.completed = batches.ready - 1  # all but this one
        for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
            # this one has begun
            epochs.ready = epochs.started = epochs.processed + 1  # type: ignore[attr-defined]
