"""StepNumbers: curves of a run that was resumed several times have each step once, under its own number."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from callbacks.step_numbers import StepNumbers
from callbacks.validated import LastValidation
from fasthmr.stopping import Stopped


class Counting(L.LightningModule):
    """One weight that counts steps, and logs the count."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("train/steps", self.steps.detach())
        return -self.steps

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/steps", self.steps.detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Logged(DummyLogger):
    """Keeps (name, step, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[str, int | None, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.values += [(name, step, value) for name, value in metrics.items() if name.endswith("/steps")]


class SaveAndStop(L.Callback):
    """Ends a run as `SaveOnInterrupt` does."""

    def __init__(self, checkpoint: Path, step: int) -> None:
        self.checkpoint, self.step = checkpoint, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.checkpoint)
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
            raise Stopped(signal.SIGUSR1)


def train(folder: Path, stop: int, resume: Path | None) -> list[tuple[str, int | None, float]]:
    """4 epochs of 3 steps, each followed by a validation, as far as step `stop`."""
    logged = Logged()
    trainer = L.Trainer(
        accelerator="cpu", logger=logged, enable_model_summary=False, enable_progress_bar=False, max_epochs=4,
        log_every_n_steps=1, enable_checkpointing=False, num_sanity_val_steps=0,
        callbacks=[StepNumbers(), LastValidation(), SaveAndStop(folder / f"{stop}.ckpt", stop)],
    )  # fmt: skip
    with contextlib.suppress(Stopped):
        trainer.fit(Counting(), DataLoader(torch.zeros(3)), DataLoader(torch.zeros(1)), ckpt_path=resume)
    return logged.values


@pytest.mark.filterwarnings("ignore")
def test_every_step_is_logged_under_its_number_however_often_a_run_was_resumed(tmp_path):
    """In the middle of an epoch, at the end of one, and in the middle of the one after."""
    logged, resume = [], None
    for stop in (2, 6, 8, 99):
        logged += train(tmp_path, stop, resume)
        resume = tmp_path / f"{stop}.ckpt"
    assert [v for v in logged if v[0] == "train/steps"] == [("train/steps", n, float(n)) for n in range(12)]
    assert [v for v in logged if v[0] == "val/steps"] == [("val/steps", n, n + 1.0) for n in (2, 5, 8, 11)]
