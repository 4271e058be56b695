"""Curves: TensorBoard's files have every value once, wherever between a checkpoint and the next a run was ended."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.data import DataLoader

from callbacks.curves import Curves
from callbacks.step_numbers import StepNumbers
from callbacks.validated import LastValidation

pytestmark = pytest.mark.filterwarnings("ignore")


class EndedError(Exception):
    pass


class Counting(L.LightningModule):
    """One weight that counts steps, and logs the count; ends after the checkpoint of a step, or its validation."""

    def __init__(self, end: tuple[str, int]) -> None:
        super().__init__()
        self.steps = torch.nn.Parameter(torch.zeros(()))
        self.end = end

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("train/steps", self.steps.detach())
        return -self.steps

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/steps", self.steps.detach())

    def on_train_batch_end(self, *_: object) -> None:
        self._end_after("checkpoint")

    def on_validation_end(self) -> None:
        self._end_after("validation")

    def _end_after(self, what: str) -> None:
        if self.end == (what, self.trainer.global_step):
            raise EndedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(
    folder: Path, end: tuple[str, int] = ("", 0), start: str = "last.ckpt", elsewhere: Path | None = None
) -> None:
    """4 epochs of 3 steps, each with a checkpoint and then a validation; from the last checkpoint on."""
    last = folder / start
    saving = ModelCheckpoint(folder, every_n_train_steps=3, save_last=True, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu", logger=TensorBoardLogger(elsewhere or folder, "", ""), enable_model_summary=False,
        enable_progress_bar=False, max_epochs=4, log_every_n_steps=1, num_sanity_val_steps=0,
        callbacks=[StepNumbers(), Curves(folder), LastValidation(), saving],
    )  # fmt: skip
    with contextlib.suppress(EndedError):
        resume = last if last.exists() else None
        trainer.fit(Counting(end), DataLoader(torch.zeros(3)), DataLoader(torch.zeros(1)), ckpt_path=resume)


def require_all_once(folder: Path, *, shown: bool) -> None:
    """Of what TensorBoard shows, or of all that is in the files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=shown).Reload()
    # In any order: files that one process begins in the same second are not read in that of their beginning.
    steps, validated = (sorted((e.step, e.value) for e in events.Scalars(f"{n}/steps")) for n in ("train", "val"))
    assert steps == [(n, n) for n in range(12)] and validated == [(n, n + 1) for n in (2, 5, 8, 11)]


def test_numbers_that_come_after_the_checkpoint_of_their_step_are_not_lost_and_not_there_twice(tmp_path):
    for end in (("checkpoint", 3), ("checkpoint", 5), ("checkpoint", 8), ("validation", 9), ("checkpoint", 12)):
        train(tmp_path, end)
    train(tmp_path)
    require_all_once(tmp_path, shown=False)


def test_a_run_that_starts_anew_hides_what_was_there(tmp_path):
    train(tmp_path, ("checkpoint", 2))
    time.sleep(1)  # files are read in the order of the seconds in which they were begun
    train(tmp_path)
    require_all_once(tmp_path, shown=True)


def test_a_checkpoint_of_an_earlier_version_hides_the_steps_that_come_again(tmp_path):
    train(tmp_path, ("checkpoint", 5))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del content["callbacks"]["Curves"]
    torch.save(content, tmp_path / "last.ckpt")
    time.sleep(1)
    train(tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("train/steps")] == list(range(12))


def test_what_another_start_cut_off_comes_back_unless_that_start_got_somewhere(tmp_path):
    train(tmp_path, ("checkpoint", 9))
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "early.ckpt")
    train(tmp_path)
    train(tmp_path, ("validation", 9), start="early.ckpt")  # ends before its first checkpoint
    assert list(tmp_path.glob("cut.*"))
    train(tmp_path)
    require_all_once(tmp_path, shown=False)


def test_the_file_that_a_run_writes_itself_is_not_touched(tmp_path):
    train(tmp_path, ("checkpoint", 5))
    train(tmp_path)
    for file in tmp_path.glob("events*"):
        first = next(iter(EventFileLoader(str(file)).Load()))
        assert first.file_version == "brain.Event:2", f"{file} has lost its beginning"


def test_files_of_other_runs_are_left_alone(tmp_path):
    train(tmp_path / "one")
    train(tmp_path / "two", ("checkpoint", 5))
    before = {file: file.read_bytes() for file in (tmp_path / "two").glob("events*")}
    (tmp_path / "two/last.ckpt").write_bytes((tmp_path / "one/last.ckpt").read_bytes())
    train(tmp_path / "two")
    assert {file: file.read_bytes() for file in before} == before


def test_a_logger_that_writes_elsewhere_is_let_alone(tmp_path):
    """Nothing is cut where others may write."""
    elsewhere = tmp_path / "shared"
    elsewhere.mkdir()
    other = elsewhere / "events.out.tfevents.1.of.another.run"
    other.write_bytes(bytes(100_000))
    train(tmp_path / "run", ("checkpoint", 5), elsewhere=elsewhere)
    other.write_bytes(bytes(200_000))
    train(tmp_path / "run", elsewhere=elsewhere)
    assert other.stat().st_size == 200_000
