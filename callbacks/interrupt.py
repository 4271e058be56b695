"""SaveOnInterrupt: Ctrl-C ends a run after the step it is in, with a checkpoint to go on from."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

log = logging.getLogger(__name__)


class SaveOnInterrupt(L.Callback):
    """On the first Ctrl-C of a training step, finish the step, save a checkpoint and raise KeyboardInterrupt.

    A checkpoint from within a step would not resume exactly, nor one from between the batches whose gradients a step
    accumulates. During validation, and at the second Ctrl-C, the run stops
    at once. It does so in runs of several processes, too: those would have to agree on a step first.

    Args:
        checkpoint: where to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._asked = False
        self._before: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        process = os.getpid()

        def ask(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:
                return  # a loader process, which inherits this handler: the step still needs it
            if self._asked or not trainer.training:
                signal.default_int_handler(number, frame)
            self._asked = True
            log.info("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

        self._before = signal.signal(signal.SIGINT, ask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self._asked and stepped:
            trainer.save_checkpoint(self.checkpoint)
            raise KeyboardInterrupt

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
