"""SaveOnInterrupt: what Ctrl-C leaves is a checkpoint of a whole step, and never of a part of one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.interrupt import SaveOnInterrupt


class Interrupted(L.LightningModule):
    """One weight, and Ctrl-C in a batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batch, self.done = batch, 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGINT)
        self.done += 1
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize(
    ("pressed", "batches", "steps"),
    [(0, 3, 1), (2, 3, 1), (3, 5, 2)],  # the epoch's 5 batches are steps of 3 and, at its end, of 2
)
@pytest.mark.filterwarnings("ignore")
def test_the_batches_that_a_step_accumulates_are_finished(pressed, batches, steps, tmp_path: Path):
    module = Interrupted(pressed)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, accumulate_grad_batches=3, callbacks=[SaveOnInterrupt(tmp_path / "last.ckpt")],
    )  # fmt: skip
    with pytest.raises(SystemExit):
        trainer.fit(module, DataLoader(torch.zeros(5)))
    assert trainer.interrupted and module.done == batches
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == steps and saved["state_dict"]["weight"] == module.weight
