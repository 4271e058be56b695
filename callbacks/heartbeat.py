"""Heartbeat: a line in the log now and then, and an alarm that names process, step and clips when nothing moves."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from typing import Any

import lightning as L

log = logging.getLogger(__name__)


class Heartbeat(L.Callback):
    """Says in the log how far the run is; in any process that stands still, says where.

    One process that waits for storage, or for another that has died, holds up all. Its log then has the step, what it
    is doing, the keys of the batch and the line of code. Nothing is ended: a long validation or merge is no fault.

    Args:
        every_s: seconds between two lines of the first process; 0 for none.
        stalled_s: seconds without a new batch after which a process says so, and again each time as many have passed.
    """

    def __init__(self, every_s: float = 300.0, stalled_s: float = 900.0) -> None:
        if every_s < 0 or stalled_s <= 0:
            raise ValueError(f"every_s must be 0 or more and stalled_s more than 0, got {every_s} and {stalled_s}")
        self.every_s, self.stalled_s = every_s, stalled_s
        self._moved = time.monotonic()
        self._doing = "starting"
        self._total: float = 0
        self._ended: threading.Event | None = None

    # ---- what the run is at ---------------------------------------------------------------------------------------

    def _is_at(self, trainer: L.Trainer, doing: str, batch: Any = None) -> None:
        keys = ", ".join(map(str, getattr(batch, "keys", None) or []))
        self._doing = f"step {trainer.global_step}, {doing}" + (f" of {keys}" if keys else "")
        self._moved = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_at(trainer, "waiting for the first batch")
        self._total = trainer.estimated_stepping_batches
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=(trainer, self._ended), name="heartbeat", daemon=True).start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._is_at(trainer, "training on the batch", batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._is_at(trainer, "waiting for the next batch")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._is_at(trainer, "validating the batch", batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_at(trainer, "after validation")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._ended is not None:
            self._ended.set()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._ended is not None:
            self._ended.set()

    # ---- the thread that says it ----------------------------------------------------------------------------------

    def _watch(self, trainer: L.Trainer, ended: threading.Event) -> None:
        main = threading.main_thread().ident
        began, first = time.monotonic(), trainer.global_step
        told, alarmed = began, 0.0
        while not ended.wait(min(1.0, self.stalled_s / 4)):
            now = time.monotonic()
            if trainer.is_global_zero and 0 < self.every_s <= now - told:
                told = now
                rate = (trainer.global_step - first) / (now - began)
                total = trainer.estimated_stepping_batches
                log.info(
                    "step %d of %s, epoch %d, %.2f steps/s", trainer.global_step, total, trainer.current_epoch, rate
                )
            if now - max(self._moved, alarmed) >= self.stalled_s:
                alarmed = now
                frame = sys._current_frames().get(main or 0)
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown"
                log.warning(
                    "process %d on %s has stood still for %.0f s: %s; at %s",
                    trainer.global_rank, socket.gethostname(), now - self._moved, self._doing, where,
                )  # fmt: skip
