"""Throughput: how fast training runs, and how much of the time it waits for data."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch


class Throughput(L.Callback):
    """Logs `throughput/clips_per_s`, `throughput/frames_per_s` (over all ranks) and `throughput/data_wait_share`.

    With several processes, `data_wait_share` is the first one's. Beside it are the least and the most of all
    (`processes/data_wait_share_least`, `..._most`), the same of the seconds of a step without waiting for data
    (`processes/step_s_least`, `..._most`), and which process waits most (`processes/waits_most`): steps wait for the
    slowest.

    Samples are counted from the batches, and the device is synchronised only when a window ends, so that measuring
    does not slow down what is measured. Windows begin anew after each validation, so that their ends fall on any step:
    values go straight to the loggers, as `self.log` drops those of steps that are no multiple of `log_every_n_steps`.
    A run that goes on from within a window ends it at the same step, and measures the rest of it.

    Args:
        every_n_steps: batches over which a value is averaged.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._begin(after=0)

    def _begin(self, after: int) -> None:
        """Measure from now on, and the first `after` batches of the window not."""
        self._start = self._batch_end = time.perf_counter()
        self._waited = 0.0
        self._clips = self._frames = self._measured = 0
        self._batches = after

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict["batches"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(after=self._batches)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clips, frames = batch.valid.shape
        self._clips += clips
        self._frames += clips * frames
        self._measured += 1
        self._batches += 1
        if self._batches == self.every_n_steps:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            seconds = time.perf_counter() - self._start
            values = {
                "throughput/clips_per_s": self._clips * trainer.world_size / seconds,
                "throughput/frames_per_s": self._frames * trainer.world_size / seconds,
                "throughput/data_wait_share": self._waited / seconds,
            }
            if trainer.world_size > 1:
                values |= self._spread(trainer, pl_module.device, seconds)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            self._begin(after=0)
        self._batch_end = time.perf_counter()

    def _spread(self, trainer: L.Trainer, device: torch.device, seconds: float) -> dict[str, float]:
        """How processes differ; all end their windows at the same batches."""
        ours = torch.tensor([self._waited / seconds, (seconds - self._waited) / self._measured], device=device)
        wait, step = trainer.strategy.all_gather(ours).T.tolist()
        return {
            "processes/data_wait_share_least": min(wait),
            "processes/data_wait_share_most": max(wait),
            "processes/waits_most": float(wait.index(max(wait))),
            "processes/step_s_least": min(step),
            "processes/step_s_most": max(step),
        }

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A window that spans a validation would count it as training time.
        self._begin(after=0)
