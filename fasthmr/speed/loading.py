"""Seconds and memory of loading a checkpoint of HMR2.0's format and one of ours, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fasthmr.body import load_body
from fasthmr.checkpoint import encoder_header, load_encoder
from fasthmr.foreign import load_hmr
from fasthmr.models.adapters import foreign_names
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.safetensors_io import write_safetensors
from fasthmr.speed.encoders import SIZES
from fasthmr.speed.memory import peak_memory


def print_loading(size: str, folder: str | None) -> None:
    """Print how long loading takes, and the memory of its process at most, over the memory of the weights.

    Raises:
        OSError: the files cannot be written.
    """
    config = SIZES[size]
    with tempfile.TemporaryDirectory(dir=folder) as written:
        theirs, ours = Path(written) / "theirs.ckpt", Path(written) / "ours.safetensors"
        in_own_process(write_both_formats, config, theirs, ours)
        weights = ours.stat().st_size
        table = Table(title=f"{size}, {weights / 1e9:.2f} GB of weights, {torch.get_num_threads()} threads")
        for name in ("what", "seconds", "peak memory, GB", "over the weights"):
            table.add_column(name)
        for name, work, arguments in (
            ("nothing, but torch and us imported", in_no_time, ()),
            ("HMR2.0's checkpoint", load_hmr, (theirs, "hmr2", config.vit_heads)),
            ("ours, safetensors", load_encoder, (ours,)),
        ):
            seconds, peak = in_own_process(work, *arguments)
            table.add_row(name, f"{seconds:.1f}", f"{peak / 1e9:.2f}", f"{peak / weights:.2f} x")
        Console().print(table)


def write_both_formats(config: HMRConfig, theirs: Path, ours: Path) -> None:
    """An encoder with random weights as a Lightning checkpoint of HMR2.0's, and as one of ours."""
    with torch.device("meta"):
        hmr = HMR(config)
    weights = {name: torch.rand(tensor.shape) for name, tensor in hmr.state_dict().items()}
    names = foreign_names(weights)
    torch.save({"epoch": 35, "global_step": 10**6, "state_dict": {names[n]: t for n, t in weights.items()}}, theirs)
    write_safetensors(ours, encoder_header(config, load_body().id, hmr.merge_plan, weights_prefix=""), weights)


def in_no_time() -> None:
    """What a process costs that does nothing."""


def in_own_process(work: Callable[..., object], *arguments: object) -> tuple[float, int]:
    """Seconds that a call takes in a new process, and that process' memory at most, bytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, arguments))


def _measured(work: Callable[..., object], arguments: tuple[object, ...]) -> tuple[float, int]:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start, peak_memory()
