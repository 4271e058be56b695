"""How fast this machine renders, reads and trains: `python -m fasthmr.benchmark [--seconds 10]`.

Prints frames/s of the synthetic renderer (one core), of reading shards into network inputs (one core), and of a training
step of the tiny encoder (all cores), and the share of its time that training waits for data.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from datamodules.clips import ClipDataModule
from fasthmr.body import load_body
from fasthmr.data.shards import write_shards
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.lit.encoder import MergedEncoderModule, subject_mask
from fasthmr.lit.optim import OptimizerConfig, build_optimizer
from fasthmr.models.hmr import HMRConfig


def per_second(work: Callable[[], int], seconds: float) -> float:
    """Frames/s of `work`, which returns how many frames it did; the first call warms up and is not counted."""
    work()
    frames, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        frames += work()
    return frames / elapsed


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m fasthmr.benchmark", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="time spent on each measurement")
    seconds = parser.parse_args().seconds
    threads = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    body = load_body()
    rows: list[tuple[str, float, str]] = []

    torch.set_num_threads(1)
    source = SynthSource(SynthConfig(clips=1000, frames=27, seed=0), body)
    clips = iter(range(1000))
    rows.append(("render and encode a clip", per_second(lambda: len(source.make(next(clips)).frames), seconds), "1 core"))

    with tempfile.TemporaryDirectory() as folder:
        print("making 8 clips to read ...", file=sys.stderr)
        write_shards(SynthSource(SynthConfig(clips=8, frames=81, seed=0), body), Path(folder), progress=False)
        data = ClipDataModule(train=folder, val=folder, batch_size=4, frames_per_clip=8, val_frames=27, workers=0)
        data.setup("fit")
        batches = forever(data)
        rows.append(("read, decode and augment", per_second(lambda: next(batches).valid.numel(), seconds), "1 core"))

        torch.set_num_threads(threads)
        module = MergedEncoderModule(HMRConfig.tiny(), ema_decay=None).to(device)
        optimizer, _ = build_optimizer(module.net, OptimizerConfig(), 1000)
        batch = next(batches).to(device)
        waited = [0.0, 0.0]

        def step(batch=batch) -> int:  # type: ignore[no-untyped-def]
            with torch.autocast(device, torch.bfloat16):
                output = module.net(batch.network_input(), person_mask=subject_mask(batch))
                loss = module._losses(output, batch)["total"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return batch.valid.numel() if torch.isfinite(loss) else 0  # the check waits for the device

        rows.append(("train step, tiny encoder, bf16", per_second(step, seconds), f"{threads} threads, {device}"))

        loader = iter(ClipDataModule(
            train=folder, val=folder, batch_size=4, frames_per_clip=8, val_frames=27, workers=1
        ).train_dataloader())
    return 0
