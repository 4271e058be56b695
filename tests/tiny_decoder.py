"""A decoder's training of seconds: clips of several lengths, an untrained encoder and prior as checkpoints, the run."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_clips import drawn_clip

from datamodules.features import FeatureDataModule
from fasthmr.body import load_body
from fasthmr.checkpoint import save_encoder, save_prior
from fasthmr.data.schema import Clip
from fasthmr.data.shards import write_shards
from fasthmr.lit.decoder import DenoiserSizes, DiffusionDecoderModule
from fasthmr.lit.optim import OptimizerConfig
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.motion_vae import MotionVAEConfig

WINDOW = 12
ENCODER = HMRConfig(
    vit_dim=32, vit_depth=2, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_dim_head=16, head_mlp_dim=32
)
PRIOR = MotionVAEConfig(window=WINDOW, latents=3, dim=32, depth=3, heads=2, mlp_dim=32, dropout=0.1)
DENOISER = DenoiserSizes(depth=3, heads=2, mlp_dim=32, dropout=0.1)
#: shorter than a window, of a window, of several with a shorter one at the end (of one frame: 13), and of one frame
LENGTHS = (5, 12, 35, 20, 13, 1)


@dataclass(frozen=True)
class ClipsOfLengths:
    """A clip source of stick figures."""

    lengths: tuple[int, ...]
    body: str

    def __len__(self) -> int:
        return len(self.lengths)

    def make(self, index: int) -> Clip:
        return drawn_clip(f"clip{index:03d}", self.lengths[index], body=self.body, seed=index)

    def describe(self) -> dict[str, object]:
        return {"name": "drawn", "lengths": list(self.lengths), "body": self.body}


def make_clips(folder: Path, lengths: tuple[int, ...] = LENGTHS, body: str | None = None) -> Path:
    source = ClipsOfLengths(lengths, body or load_body().id)
    write_shards(source, folder, clips_per_shard=3, workers=1, progress=False)
    return folder


def make_encoder(path: Path, seed: int = 0, body: str | None = None) -> str:
    torch.manual_seed(seed)
    hmr = HMR(ENCODER)
    # An untrained head looks at nothing: its token is the same for every picture, nearly.
    torch.nn.init.normal_(hmr.smpl_head.layers[0].cross_attn.proj.weight)
    save_encoder(path, hmr, body or load_body().id)
    return str(path)


def make_prior(path: Path, seed: int = 0, config: MotionVAEConfig = PRIOR, body: str | None = None) -> str:
    torch.manual_seed(seed)
    save_prior(path, MotionPrior(config), body or load_body().id)
    return str(path)


def module(prior: str, encoder: str, **settings: Any) -> DiffusionDecoderModule:
    torch.manual_seed(7)
    defaults = {"denoiser": DENOISER, "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=1), "ema_decay": 0.9}
    return DiffusionDecoderModule(prior, encoder, **{**defaults, **settings})


def data(clips: Path, encoder: str, folder: Path, **settings: Any) -> FeatureDataModule:
    defaults = {"window": WINDOW, "batch_size": 2, "val_batch_size": 4, "workers": 0}
    return FeatureDataModule(clips, clips, encoder, folder, **{**defaults, **settings})


def fit(
    model: L.LightningModule,
    clips: L.LightningDataModule,
    out: Path,
    steps: int = 6,
    resume: Path | None = None,
    callbacks: tuple[L.Callback, ...] = (),
) -> L.Trainer:
    """Train, three steps an epoch, with a checkpoint OUT/step{n}.ckpt after every step."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    saving = ModelCheckpoint(
        out, filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1
    )
    trainer = L.Trainer(
        default_root_dir=out, accelerator="cpu", max_steps=steps, callbacks=[*callbacks, saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=clips, ckpt_path=resume)
    return trainer
