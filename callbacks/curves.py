"""Curves: TensorBoard has every value of a run once, however often the run was killed and went on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class Curves(L.Callback):
    """Has the curves of a run that goes on continue where its checkpoint was written.

    A checkpoint knows how long TensorBoard's files were when it was written. The run that goes on from it cuts off what
    came after, since all of that comes again. The numbers of a step are one thing that Lightning logs after the
    checkpoint of the step, and no run would log them again: the checkpoint has them.

    A run that starts anew in its folder has TensorBoard hide what one logged that ended before its first checkpoint, as
    does a run that goes on from a checkpoint of earlier versions, which knows no lengths.

    Put this before other callbacks: they log when training starts.
    """

    def __init__(self) -> None:
        self._there: list[Path] = []  # files that earlier processes wrote
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._there = _files(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        known = self._cut()
        for logger in _loggers(trainer):
            # For a TensorBoard that has read what is cut off already.
            hidden = Event(step=trainer.global_step + known, session_log=SessionLog(status=SessionLog.START))
            logger.experiment._get_file_writer().add_event(hidden)
            if known and self._saved["due"]:
                logger.log_metrics(**self._saved["due"])
            logger.save()

    def _cut(self) -> bool:
        """Cut the files to the lengths that the checkpoint knows; False if it knows none of them."""
        lengths = self._saved.get("lengths", {})
        if not any(file.name in lengths for file in self._there):
            return False  # the checkpoint of another run, or there is none
        for file in self._there:
            if file.name not in lengths:
                file.unlink()
            elif file.stat().st_size > lengths[file.name]:
                os.truncate(file, lengths[file.name])
        return True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in _loggers(trainer):
            logger.save()
        lengths = {}
        for path in _files(trainer):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # they must not be shorter after a power cut
                lengths[path.name] = file.seek(0, os.SEEK_END)
        checkpoint["callbacks"][self.state_key] = {"lengths": lengths, "due": _due(trainer)}


def _loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Those of the process that writes."""
    return [x for x in trainer.loggers if isinstance(x, TensorBoardLogger)] if trainer.is_global_zero else []


def _files(trainer: L.Trainer) -> list[Path]:
    return [f for logger in _loggers(trainer) for f in Path(logger.log_dir).glob("events.out.tfevents.*")]


def _due(trainer: L.Trainer) -> dict[str, Any] | None:
    """What Lightning will log of the step that ended when the checkpoint is written; None if it has, or will not."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    batches = loop.batch_progress.current
    if batches.completed == batches.ready or not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"metrics": values | {"epoch": float(trainer.current_epoch)}, "step": loop._batches_that_stepped}
