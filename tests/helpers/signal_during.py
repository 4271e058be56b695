"""A callback that sends its own process SIGUSR1 in a merge, a validation and a checkpoint, each once in all runs."""

import os
import signal
from pathlib import Path

import lightning as L

import callbacks.progressive


class SignalDuring(L.Callback):
    """In the first merge, the checkpoint of step 7 and a validation after step 12; a file in `folder` for each."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        merge = callbacks.progressive.collapse_while_training

        def collapse(*args, **kwargs):
            self._send("merge")
            return merge(*args, **kwargs)

        callbacks.progressive.collapse_while_training = collapse

    def on_validation_batch_start(self, trainer, *args) -> None:
        if trainer.global_step > 12:
            self._send("validation")

    def on_save_checkpoint(self, trainer, *args) -> None:
        if trainer.global_step == 7:
            self._send("checkpoint")

    def _send(self, where: str) -> None:
        file = self.folder / where
        if not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGUSR1)
