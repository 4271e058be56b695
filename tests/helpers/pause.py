"""A callback that stands still until the process is asked to stop: a signal is then sure to come in that step."""

import os
import time
from pathlib import Path

import lightning as L

from fasthmr import stopping

_PATIENCE_S = 600


class PauseAtSteps(L.Callback):
    """At the end of the batch that makes one of `steps` optimiser steps, wait for a signal; each step only once.

    Writes `folder/<step>-<rank>.txt` with the number of the process that waits.
    """

    def __init__(self, folder: str, steps: list[int]) -> None:
        self.folder, self.steps = Path(folder), steps

    def on_train_batch_end(self, trainer, *args) -> None:
        file = self.folder / f"{trainer.global_step}-{trainer.global_rank}.txt"
        if trainer.global_step not in self.steps or file.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(str(os.getpid()))
        began = time.monotonic()
        while stopping.asked() is None and time.monotonic() - began < _PATIENCE_S:
            time.sleep(0.05)
