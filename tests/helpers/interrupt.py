"""A callback that presses Ctrl-C, as a terminal does: all processes of the run get the signal."""

import os
import signal

import lightning as L


class InterruptAtStep(L.Callback):
    """SIGINT to the process group at the end of the batch that makes `step` optimiser steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.killpg(os.getpgid(0), signal.SIGINT)
