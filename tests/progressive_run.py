"""A short training with progressive merging; as a script, several of them on several processes.

torchrun --nproc_per_node 2 tests/progressive_run.py SHARDS JOBS

JOBS is a JSON file: a list of keyword arguments of `train`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import progressive
from callbacks.progressive import ProgressiveMerging
from callbacks.validated import LastValidation
from datamodules.clips import ClipDataModule
from fasthmr.calibration import PlanErrors
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.lit.optim import OptimizerConfig
from fasthmr.losses import LossWeights
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.models.hmr import HMRConfig

STEPS = 12
NET = HMRConfig(
    vit_dim=32, vit_depth=6, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_dim_head=16, head_mlp_dim=32,
    drop_path=0.1, token_merging=TokenMerging(),
)  # fmt: skip


def train(
    shards: Path,
    out: Path | str,
    devices: int = 1,
    resume: Path | str | None = None,
    ema_decay: float | None = 0.9,
    callbacks: list[L.Callback] | None = None,
    trainer_keys: dict[str, Any] | None = None,
    **merging: Any,
) -> tuple[L.Trainer, MergedEncoderModule]:
    """Train 12 steps with merges due at steps 4 and 8, and a checkpoint after every second step."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    L.seed_everything(3, verbose=False)
    module = MergedEncoderModule(
        NET,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        loss=LossWeights(token_joints=0.5),
        ema_decay=ema_decay,
        seed=3,
    )
    data = ClipDataModule(
        shards, shards, batch_size=1, frames_per_clip=2, val_batch_size=2, val_frames=4, workers=0, seed=3
    )
    settings: dict[str, Any] = {"budget_mm": 1000.0, "at_steps": [4, 8], "frames_per_clip": 3, **merging}
    if not settings.keys().isdisjoint({"at_epochs", "every_n_steps", "settled_mm"}):
        settings.pop("at_steps")
    merging_layers = ProgressiveMerging(shards, **settings)
    saving = ModelCheckpoint(out, filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=2,
                             save_top_k=-1)  # fmt: skip
    trainer = L.Trainer(
        default_root_dir=out, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
        callbacks=[merging_layers, *(callbacks or []), LastValidation(), saving], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, deterministic=True,
        **{"max_steps": STEPS, "logger": False, **(trainer_keys or {})},
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer, module


def disagree(out: Path) -> None:
    """From now on rank r finds layers r and r + 1 the most similar ones, and writes down which plans it evaluates."""
    rank = int(os.environ["RANK"])
    out.mkdir(parents=True, exist_ok=True)

    class Asked(PlanErrors):
        def __call__(self, plan: LayerMergePlan) -> float:
            with (out / f"asked{rank}.txt").open("a") as file:
                file.write(f"{plan}\n")
            return super().__call__(plan)

    progressive.most_similar_window = lambda similarity, removed: LayerMergePlan(len(similarity)).merged(rank, rank + 1)
    progressive.PlanErrors = Asked


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[2]).read_text()):
        if job.pop("disagree", False):
            disagree(Path(job["out"]))
        train(Path(sys.argv[1]), devices=int(os.environ["WORLD_SIZE"]), **job)
