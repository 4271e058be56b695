"""Throughput: of several processes it says how they differ, and a window that a run stopped in ends where it would."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed
from torch.utils.data import DataLoader

from callbacks.throughput import Throughput

WAIT_S = 0.1


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: SimpleNamespace, batch_idx: int) -> torch.Tensor:
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def slow_in_the_second_process(samples: list[int]) -> SimpleNamespace:
    """A batch of 2 frames a clip; the second process waits for it."""
    if distributed.is_initialized() and distributed.get_rank() == 1:
        time.sleep(WAIT_S)
    return SimpleNamespace(valid=torch.ones(len(samples), 2, dtype=torch.bool))


def train(folder: Path, devices: int, steps: int, resume: Path | None = None) -> EventAccumulator:
    """Windows of 3 batches."""
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_steps=steps,
        logger=TensorBoardLogger(folder, "", ""), enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[Throughput(3)],
    )  # fmt: skip
    data = DataLoader(list(range(8 * devices)), collate_fn=slow_in_the_second_process)
    trainer.fit(Plain(), data, ckpt_path=resume)
    if devices == 1:
        trainer.save_checkpoint(folder / "last.ckpt")
    return EventAccumulator(str(folder)).Reload()


@pytest.mark.filterwarnings("ignore")
def test_the_process_that_waits_most_is_named_and_the_others_wait_for_it(tmp_path):
    events = train(tmp_path, 2, 6)
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all([step for step, _ in values] == [3, 6] for values in shown.values())
    last = {tag: values[-1][1] for tag, values in shown.items()}
    assert last["processes/waits_most"] == 1
    assert last["processes/data_wait_share_least"] < 0.5 < last["processes/data_wait_share_most"] <= 1
    # The first process waits in its steps, for the gradients of the second.
    assert last["processes/step_s_least"] < WAIT_S / 2 < last["processes/step_s_most"]
    assert last["throughput/data_wait_share"] == last["processes/data_wait_share_least"], "the first one's"
    assert last["throughput/frames_per_s"] == pytest.approx(2 * last["throughput/clips_per_s"])
    assert last["throughput/clips_per_s"] < 2 / WAIT_S, "of both processes"


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_ends_the_window_that_it_stopped_in(tmp_path):
    assert "throughput/clips_per_s" in train(tmp_path, 1, 4).Tags()["scalars"]
    time.sleep(1)  # files are read in the order of the seconds in which they were begun
    events = train(tmp_path, 1, 8, tmp_path / "last.ckpt")
    assert [e.step for e in events.Scalars("throughput/clips_per_s")] == [3, 6]
