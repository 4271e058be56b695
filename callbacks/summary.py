"""Summary: one JSON file that says how a run went, for tables of many runs."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import lightning as L
import torch

from fasthmr.files import write_text


class Summary(L.Callback):
    """Writes `<default_root_dir>/summary.json` when training ends: steps, time, processes, and the last metrics.

    Seconds and steps per second are of the last start of the job alone; `restarts` says how often SLURM had started it
    before.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began, self._first = time.perf_counter(), trainer.global_step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not hasattr(self, "_began"):
            return
        seconds = time.perf_counter() - self._began
        content = {
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": round(seconds, 1),
            "steps_per_s": round((trainer.global_step - self._first) / seconds, 3),
            "processes": trainer.world_size,
            "nodes": trainer.num_nodes,
            "device": pl_module.device.type,
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "metrics": {k: float(v) for k, v in sorted(trainer.callback_metrics.items())},
        }
        if pl_module.device.type == "cuda":
            content["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(pl_module.device) / 1e9, 2)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.json", json.dumps(content, indent=1))
