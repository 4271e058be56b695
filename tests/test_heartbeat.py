"""Heartbeat and Summary: what the log and the run folder say of a run that is slow, or stands still."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.heartbeat import Heartbeat
from callbacks.summary import Summary


class Slow(L.LightningModule):
    """Stands still in the batch of step 1."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seconds = seconds

    def training_step(self, batch: SimpleNamespace, batch_idx: int) -> torch.Tensor:
        if batch_idx == 1:
            time.sleep(self.seconds)
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def named(samples: list[int]) -> SimpleNamespace:
    return SimpleNamespace(keys=[f"clip{i}" for i in samples])


def train(folder: Path, seconds: float, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Slow(seconds), DataLoader(list(range(3)), collate_fn=named))


@pytest.mark.filterwarnings("ignore")
def test_a_process_that_stands_still_is_named_with_step_and_clips(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, 1.5, Heartbeat(every_s=0.5, stalled_s=0.4), Summary())
    alarms = [record.getMessage() for record in caplog.records if "stood still" in record.getMessage()]
    assert alarms and all("step 1, training on the batch of clip1; at " in alarm for alarm in alarms)
    assert re.match(r"process 0 on \S+ has stood still for \d+ s: ", alarms[0]) and "test_heartbeat.py:" in alarms[0]
    assert "step 1 of 3, epoch 0, " in caplog.text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["processes"], summary["restarts"]) == (3, 1, 0) and summary["seconds"] >= 1.5


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="stalled_s more than 0, got 300"):
        Heartbeat(stalled_s=0)
