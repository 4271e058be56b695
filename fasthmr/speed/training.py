"""Frames/s of the synthetic renderer, of reading shards and of training steps; how long training waits for data."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from datamodules.clips import ClipDataModule
from fasthmr.body import load_body
from fasthmr.data.batch import ClipBatch
from fasthmr.data.shards import write_shards
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.lit.optim import OptimizerConfig, build_optimizer
from fasthmr.models.hmr import HMRConfig
from fasthmr.precision import IN_WORDS, autocast, chosen_precision


def per_second(work: Callable[[], int], seconds: float) -> float:
    """Frames/s of `work`, which returns how many frames it did; the first call warms up and is not counted."""
    work()
    frames, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        frames += work()
    return frames / elapsed


def render_rate(seconds: float) -> float:
    """Frames/s of filming and encoding synthetic clips, on one core."""
    source = SynthSource(SynthConfig(clips=10_000, frames=27), load_body())
    numbers = itertools.count()
    return per_second(lambda: len(source.make(next(numbers))), seconds)


def open_data(folder: str, workers: int) -> ClipDataModule:
    """The shards of `folder` as training sees them: 8 frames from each of 4 clips, augmented."""
    data = ClipDataModule(train=folder, val=folder, batch_size=4, frames_per_clip=8, workers=workers)
    data.setup("fit")
    return data


def forever(data: ClipDataModule) -> Iterator[ClipBatch]:
    """Training batches, pass after pass."""
    while True:
        yield from data.train_dataloader()


def step_and_wait(folder: str, seconds: float, device: str) -> tuple[float, float]:
    """Frames/s of training steps of the tiny encoder on one batch, and the share of its time that training with one
    loader process waits for data."""
    module = MergedEncoderModule(HMRConfig.tiny(), ema_decay=None).to(device)
    optimizer, _ = build_optimizer(module.net, OptimizerConfig(), total_steps=1_000_000)

    def step(batch: ClipBatch) -> int:
        with autocast("auto", device):
            loss = module.loss(batch)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        return batch.valid.numel()

    batches = forever(open_data(folder, workers=1))
    batch = next(batches).to(device)
    rate = per_second(lambda: step(batch), seconds)
    waited, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        asked = time.perf_counter()
        batch = next(batches).to(device)
        waited += time.perf_counter() - asked
        step(batch)
    return rate, waited / (time.perf_counter() - start)


def print_data_and_training(seconds: float) -> None:
    """Print the table of renderer, loader and training step."""
    threads, device = torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu"
    table = Table(title="frames/s")
    for name in ("what", "value", "on"):
        table.add_column(name)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        table.add_row("render and encode clips (384 px crops)", f"{render_rate(seconds):.0f}", "1 core")
        write_shards(SynthSource(SynthConfig(clips=8), load_body()), folder)
        batches = forever(open_data(folder, workers=0))
        reading = per_second(lambda: next(batches).valid.numel(), seconds)
        table.add_row("read, decode and augment", f"{reading:.0f}", "1 core")
        torch.set_num_threads(threads)
        step, waiting = step_and_wait(folder, seconds, device)
        precision = IN_WORDS[chosen_precision("auto", device)]
        table.add_row(f"training step, tiny encoder, {precision}", f"{step:.0f}", f"{device}, {threads} threads")
        table.add_row("share of time that training waits for data", f"{waiting:.1%}", "1 loader process")
        table.add_row("loader / step", f"{reading / step:.1f} x", "")
    Console().print(table)
