"""Curves: TensorBoard has every value of a run once, however often the run was killed and went on."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from fasthmr.files import written_whole

log = logging.getLogger(__name__)

#: how TensorBoard's files begin, and what it does not take for one of them
_SHOWN, _ASIDE = "events.out.tfevents.", "cut."


class Curves(L.Callback):
    """Has the curves of a run that goes on continue where its checkpoint was written.

    A checkpoint knows how long TensorBoard's files were when it was written. The run that goes on from it cuts off what
    came after, since all of that comes again; until its second checkpoint it keeps the files as they were, as `cut.*`,
    and puts them back if another start goes on from elsewhere. The numbers of a step are one thing that Lightning logs
    after the checkpoint of the step, and no run would log them again: the checkpoint has them.

    A run that starts anew in its folder has TensorBoard hide what one logged that ended before its first checkpoint, as
    does a run that goes on from a checkpoint of earlier versions, which knows no lengths.

    Put this before other callbacks: they log when training starts.

    Args:
        run_dir: the run's own folder, into which nobody else writes. Loggers that write elsewhere are let alone.

    Attributes:
        go_on: the files have what was logged until now.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.go_on = False
        self._saved: dict[str, Any] = {}
        self._checkpoints = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._checkpoints = 0
        for logger in self._loggers(trainer):
            self.go_on = self._cut(logger)
            # For a TensorBoard that has read what is cut off already.
            hidden = Event(step=trainer.global_step + self.go_on, session_log=SessionLog(status=SessionLog.START))
            logger.experiment._get_file_writer().add_event(hidden)
            if self.go_on and self._saved["due"]:
                logger.log_metrics(**self._saved["due"])
            logger.save()

    def _cut(self, logger: TensorBoardLogger) -> bool:
        """Cut the files to the lengths that the checkpoint knows; False if it knows none of them."""
        folder, lengths = Path(logger.log_dir), self._saved.get("lengths", {})
        for aside in folder.glob(f"{_ASIDE}*"):
            aside.replace(aside.with_name(_SHOWN + aside.name.removeprefix(_ASIDE)))
        ours = Path(logger.experiment._get_file_writer().event_writer._file_name).name
        there = {file.name: file for file in folder.glob(f"{_SHOWN}*") if file.name != ours}
        if not lengths.keys() & there.keys():
            return False  # the checkpoint of another run, or there is none
        for name, file in there.items():
            length = lengths.get(name, 0)
            if file.stat().st_size > length:
                aside = file.with_name(_ASIDE + name.removeprefix(_SHOWN))
                if length:
                    with written_whole(aside) as copy, file.open("rb") as whole:
                        shutil.copyfileobj(whole, copy)
                    os.truncate(file, length)
                else:
                    file.replace(aside)
        for name, length in lengths.items():
            if name not in there or there[name].stat().st_size < length:
                log.warning("curves: %s is not as long as when the checkpoint was written; a part is lost", name)
        return True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        lengths = {}
        for logger in self._loggers(trainer):
            logger.save()
            for path in Path(logger.log_dir).glob(f"{_SHOWN}*"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # they must not be shorter after a power cut
                    lengths[path.name] = file.seek(0, os.SEEK_END)
            if self._checkpoints:
                for aside in Path(logger.log_dir).glob(f"{_ASIDE}*"):
                    aside.unlink()
        self._checkpoints += 1
        checkpoint["callbacks"][self.state_key] = {"lengths": lengths, "due": _due(trainer)}

    def _loggers(self, trainer: L.Trainer) -> list[TensorBoardLogger]:
        """Those of the process that writes, in the run's folder."""
        return [
            logger
            for logger in trainer.loggers
            if trainer.is_global_zero
            and isinstance(logger, TensorBoardLogger)
            and Path(logger.log_dir).resolve().is_relative_to(self.run_dir.resolve())
        ]


def _due(trainer: L.Trainer) -> dict[str, Any] | None:
    """What Lightning will log of the step that ended when the checkpoint is written; None if it has, or will not."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    batches: Any = loop.batch_progress.current
    if batches.completed == batches.processed or not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"metrics": values | {"epoch": float(trainer.current_epoch)}, "step": loop._batches_that_stepped}
