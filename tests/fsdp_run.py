"""Short trainings of an encoder under a strategy; as a script, several of them on several processes.

torchrun --nproc_per_node 2 tests/fsdp_run.py SHARDS VALIDATION JOBS

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
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from datamodules.clips import ClipDataModule
from fasthmr.lit.checkpoint_io import AtomicCheckpointIO
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.lit.optim import OptimizerConfig
from fasthmr.lit.sharding import FSDP2  # noqa: F401  (so that the trainer knows the name)
from fasthmr.losses import LossWeights
from fasthmr.merging import TokenMerging
from fasthmr.models.hmr import HMRConfig

#: odd sizes, which do not divide evenly over two processes
NET = HMRConfig(
    vit_dim=36, vit_depth=3, vit_heads=3, head_dim=33, head_depth=1, head_heads=2, head_dim_head=16, head_mlp_dim=31,
    token_merging=TokenMerging(keep_tokens=150, per_layer=42),
)  # fmt: skip


class Encoder(MergedEncoderModule):
    """With a large eps: of gradients near zero, which depend on the order of sums, Adam would make whole steps."""

    def configure_optimizers(self) -> Any:
        content = super().configure_optimizers()
        for group in content["optimizer"].param_groups:
            group["eps"] = 1e-4
        return content


def train(
    shards: Path | str,
    val: Path | str,
    out: Path | str,
    strategy: str = "fsdp2",
    resume: Path | str | None = None,
    ema_decay: float | None = 0.9,
    init_from: str | None = None,
    steps: int = 6,
) -> None:
    """Train some steps, with a checkpoint after each second and a validation after each third; write down what each
    process holds of the weights, and its metrics."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    L.seed_everything(3, verbose=False)
    module = Encoder(
        NET,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        loss=LossWeights(token_joints=0.5),
        ema_decay=ema_decay,
        init_from=init_from,
        seed=3,
    )
    data = ClipDataModule(
        shards, val, batch_size=1, frames_per_clip=2, val_batch_size=1, val_frames=4, workers=0, seed=3
    )
    saving = ModelCheckpoint(out, filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=2,
                             save_top_k=-1)  # fmt: skip
    trainer = L.Trainer(
        default_root_dir=out, accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", 1)), strategy=strategy,
        callbacks=[saving], plugins=[AtomicCheckpointIO()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, max_steps=steps, gradient_clip_val=1.0,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.net.parameters())
    told = {"held": held, "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}}
    (Path(out) / f"rank{trainer.global_rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[3]).read_text()):
        train(sys.argv[1], sys.argv[2], **job)
