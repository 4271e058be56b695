"""SaveOnInterrupt: Ctrl-C or a signal ends a run after the step it is in, with a checkpoint to go on from."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import distributed

from fasthmr import stopping

log = logging.getLogger(__name__)


class SaveOnInterrupt(L.Callback):
    """On Ctrl-C, SIGUSR1 or SIGTERM in any process, finish the step in all, save a checkpoint and stop.

    A checkpoint from within a step would not resume exactly, nor one from between the batches whose gradients a step
    accumulates. A process that saved where the signal reached it would wait for others that are in another step. So
    at the end of each step the processes tell each other, and stop at the same one. A validation or a merge is
    finished first, and so is a checkpoint that is being written. The second Ctrl-C stops at once, as does one in a
    validation.

    `fasthmr.stopping` hears SIGUSR1 and SIGTERM. They end in `Stopped`, after the job has been requeued if it asks
    for that; Ctrl-C ends in KeyboardInterrupt.

    Args:
        checkpoint: where to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._before: Any = None
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stopping.hold(True)
        if trainer.world_size > 1:
            # A group of its own on the CPU: asking must not wait for what a GPU has still to do.
            self._group = distributed.new_group(backend="gloo")
        if threading.current_thread() is not threading.main_thread():
            return
        process = os.getpid()

        def interrupt(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:
                return  # a loader process, which inherits this handler: the step still needs it
            if stopping.asked() or not trainer.training:
                signal.default_int_handler(number, frame)
            stopping.ask(signal.SIGINT)
            log.info("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

        self._before = signal.signal(signal.SIGINT, interrupt)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch:
            return
        by = self._agreed()
        if by is None:
            return
        trainer.save_checkpoint(self.checkpoint)
        # What Lightning does next: if the run never goes on, its curves have this step all the same.
        trainer._logger_connector.on_batch_end()
        trainer._logger_connector.update_train_step_metrics()
        if by == signal.SIGINT:
            raise KeyboardInterrupt
        if trainer.is_global_zero:
            log.warning("%s: step %d saved to %s", by.name, trainer.global_step, self.checkpoint)
            if stopping.requeue_wanted():
                stopping.requeue()
        trainer.strategy.barrier("requeued")  # nobody leaves before: SLURM would end the others
        raise stopping.Stopped(by)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, stopping.Stopped):  # else it is leaving, and has the job requeued already
            self._release()

    def _release(self) -> None:
        if stopping.asked() == signal.SIGINT:
            stopping.ask(None)
        stopping.hold(False)
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _agreed(self) -> signal.Signals | None:
        """The signal that any process has been sent; the same answer in all of them."""
        by = torch.tensor(int(stopping.asked() or 0))
        if self._group is not None:
            distributed.all_reduce(by, distributed.ReduceOp.MAX, self._group)
        return signal.Signals(int(by)) if by else None
