"""A training run that only writes down what it is shown; as a script, a run that can be killed and resumed.

python tests/tiny_training.py DIR [--devices N] [--workers N] [--delay SECONDS] [--resume] ...
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_clips import drawn_clip

from datamodules.clips import ClipDataModule
from fasthmr.body import load_body
from fasthmr.data.batch import ClipBatch
from fasthmr.data.schema import Clip
from fasthmr.data.shards import write_shards


@dataclass(frozen=True)
class DrawnClips:
    """A clip source of stick figures."""

    count: int
    frames: int
    body: str

    def __len__(self) -> int:
        return self.count

    def make(self, index: int) -> Clip:
        return drawn_clip(f"clip{index:03d}", self.frames, body=self.body, seed=index)

    def describe(self) -> dict[str, object]:
        return {"name": "drawn", "clips": self.count, "frames": self.frames, "body": self.body}


def make_set(directory: Path, count: int, frames: int = 4, body: str | None = None, clips_per_shard: int = 3) -> Path:
    source = DrawnClips(count, frames, body or load_body().id)
    write_shards(source, directory, clips_per_shard=clips_per_shard, workers=1, progress=False)
    return directory


class Seen(L.LightningModule):
    """One weight, and a record of every batch: (number of the batch, clips, digest of pixels and labels)."""

    def __init__(self, directory: Path | None = None, delay_s: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.directory, self.delay_s = directory, delay_s
        self.trained: list[tuple[int, str, str]] = []
        self.validated: list[str] = []

    def training_step(self, batch: ClipBatch, batch_idx: int) -> torch.Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        digest = hashlib.sha256()
        for field in (batch.images, batch.masks, batch.joints2d, batch.rotations, batch.frame_index):
            digest.update(field.numpy().tobytes())
        self.trained.append((number, " ".join(batch.keys), digest.hexdigest()))
        self._write("trained", " ".join(map(str, self.trained[-1])))
        time.sleep(self.delay_s)
        return (self.weight - batch.joints2d.mean()) ** 2

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        self.validated += batch.keys
        self._write("validated", "\n".join(batch.keys))

    def on_validation_epoch_end(self) -> None:
        self.trainer.strategy.reduce(self.weight.detach(), reduce_op="sum")  # here all ranks must meet

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def _write(self, name: str, line: str) -> None:
        if self.directory is not None:
            with (self.directory / f"{name}_{self.global_rank}.txt").open("a") as file:
                file.write(line + "\n")


class SaveBetweenEpochs(L.Callback):
    """Checkpoints from where `ModelCheckpoint` also writes them: at the end of validation and of training epochs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.directory / f"val-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.directory / f"epoch-{trainer.current_epoch}.ckpt")


def fit(
    data: Path,
    module: Seen,
    checkpoints: Path | None = None,
    ckpt_path: Path | None = None,
    workers: int = 0,
    devices: int = 1,
    streaming: bool = False,
    clips_per_epoch: int | None = None,
    every_n_steps: int = 1,
    callbacks: list[L.Callback] | None = None,
    **trainer_args: object,
) -> L.Trainer:
    """Train on DATA/train with batches of 2 clips x 2 frames, saving a checkpoint after every step and every epoch."""
    quiet()
    datamodule = ClipDataModule(
        data / "train", data / "val", batch_size=2, frames_per_clip=2, val_batch_size=2, val_frames=3,
        workers=workers, seed=11, streaming=streaming, clips_per_epoch=clips_per_epoch, shuffle_buffer=3,
    )  # fmt: skip
    callbacks = list(callbacks or [])
    if checkpoints is not None:
        callbacks += [
            ModelCheckpoint(
                checkpoints, "step-{step}", every_n_train_steps=every_n_steps, save_top_k=-1, save_last=True
            ),
            SaveBetweenEpochs(checkpoints),
        ]
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp" if devices > 1 else "auto",
        devices=devices,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=checkpoints is not None,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **trainer_args},
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists.*")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--max_epochs", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = args.data / "run"
    run.mkdir(exist_ok=True)
    module = Seen(run, args.delay)
    trainer = fit(
        args.data,
        module,
        checkpoints=run if args.devices == 1 else None,
        ckpt_path=run / "last.ckpt" if args.resume else None,
        workers=args.workers,
        devices=args.devices,
        every_n_steps=3,
        max_epochs=args.max_epochs,
    )
    if (args.data / "val_small").exists():
        small = ClipDataModule(args.data / "train", args.data / "val_small", val_batch_size=2, val_frames=3, workers=0)
        trainer.validate(module, datamodule=small, verbose=False)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
