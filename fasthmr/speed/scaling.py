"""How training scales: measured on a few processes of this machine, and predicted for many GPUs.

Measured is what a config trains, on its own settings and clips that are made for it, or on shards of yours. Every
process takes steps under DDP on one batch that stays on its device, in turn with and without exchanging gradients
(`no_sync`): the share of communication is what exchanging adds to a step, so what DDP hides behind the backward pass
does not count. All-reducing as many bytes alone gives the bandwidth; bytes are those that a ring moves. Then steps are
fed by the config's loader, from empty buffers on, and the share of time in which they wait for it is taken. Reading is
measured without loader processes, on one core: frames/s, and the bytes that the system says were read.

Predicted is what `fasthmr.speed.needs` says of it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from datamodules.clips import ClipDataModule
from fasthmr.body import load_body
from fasthmr.cli import FitParser, UsageError
from fasthmr.data.batch import ClipBatch
from fasthmr.data.shards import write_shards
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.lit.optim import build_optimizer
from fasthmr.precision import has_bf16
from fasthmr.speed.needs import Assumptions, Needs, needs, ring_bytes

#: measurements of each kind, whose median counts
_ROUNDS = 5
_BATCHES_OF_MADE_CLIPS = 4
#: batches that each loader process has ready at most (torch's default)
_PREFETCHED = 2


# ---- what is measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Training on some processes of this machine.

    Args:
        processes: how many.
        frames_per_s: of all together, on batches that are there.
        fed_frames_per_s: the same, fed by the loader.
        step_s: seconds of a step.
        lone_step_s: of one that exchanges no gradients.
        all_reduce_s: of an all-reduce of the gradients' bytes, and nothing else.
        waiting: share of the time that steps fed by the loader wait for it; of the process that waits most.
        gradient_bytes: of the whole model.
        step_frames: frames of a step on each process.
    """

    processes: int
    frames_per_s: float
    fed_frames_per_s: float
    step_s: float
    lone_step_s: float
    all_reduce_s: float
    waiting: float
    gradient_bytes: int
    step_frames: int

    @property
    def communication(self) -> float:
        """Share of a step that exchanging gradients adds to it."""
        return max(0.0, 1 - self.lone_step_s / self.step_s)

    @property
    def all_reduce_bytes_per_s(self) -> float:
        """What each process sends in a second of all-reducing."""
        return ring_bytes(self.processes, self.gradient_bytes) / self.all_reduce_s


@dataclass(frozen=True)
class Reading:
    """Reading training batches on one core, without loader processes.

    Args:
        frames_per_s: frames that are trained on.
        bytes_per_frame: read for each of them.
        clip_frames: how many of a clip they are.
    """

    frames_per_s: float
    bytes_per_frame: float
    clip_frames: int


@dataclass(frozen=True)
class Job:
    """What is measured.

    Args:
        model, data: a config's, plain data; shards and how many loader processes are in `data`.
        bf16: steps are taken in mixed precision.
        threads: of each process.
        seconds: time for each number of processes, about.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    bf16: bool
    threads: int
    seconds: float

    def built(self) -> tuple[MergedEncoderModule, ClipDataModule]:
        """The model, and its data, set up.

        Raises:
            ValueError: a setting is wrong.
        """
        parser: Any = FitParser()
        parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
        try:
            parsed = parser.parse_object({"model": self.model, "data": self.data})
        except UsageError as error:
            raise ValueError(str(error)) from error
        # jsonargparse 4.49 has renamed it.
        parts = getattr(parser, "instantiate", parser.instantiate_classes)(parsed)
        parts.data.setup("fit")
        return parts.model, parts.data


class _Loss(nn.Module):
    """Gives the loss as DDP wants it: as the output of a network."""

    def __init__(self, module: MergedEncoderModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: ClipBatch) -> Tensor:
        return self.module.loss(batch)["total"]


def job_of(config: str | Path, data: str | Path, seconds: float, processes: Sequence[int]) -> Job:
    """What a one-stage config trains, on the shards of a folder.

    Raises:
        OSError, ValueError: the config cannot be read, or is not of an encoder on clips.
    """
    content = _config(config)
    model, loader = content["model"], content["data"]
    clips = {"train": str(data), "val": str(data), "make_train": None, "make_val": None, "val_frames": 3}
    return Job(
        model={**model, "init_args": {**model["init_args"], "init_from": None}},
        data={**loader, "init_args": {**loader["init_args"], **clips}},
        bf16=_in_bf16(content.get("trainer", {}).get("precision")),
        threads=max(1, (os.cpu_count() or 1) // max(processes)),
        seconds=seconds,
    )


def _in_bf16(precision: str | None) -> bool:
    """Whether a trainer's `precision` is bf16; None: fit's default, which depends on the device."""
    return has_bf16("cuda" if torch.cuda.is_available() else "cpu") if precision is None else "bf16" in str(precision)


def make_clips(config: str | Path, folder: str | Path) -> None:
    """Render a few batches of the training clips of a config.

    Raises:
        OSError, ValueError: as `job_of`; or it says of no clips how to make them.
    """
    settings = _config(config)["data"]["init_args"]
    if not settings.get("make_train"):
        raise ValueError(f"{config} does not say how to make training clips (make_train): give a folder with --data")
    clips = {**settings["make_train"], "clips": _BATCHES_OF_MADE_CLIPS * settings.get("batch_size", 8)}
    try:
        source = SynthSource(SynthConfig(**clips), load_body())
    except TypeError as error:
        raise ValueError(f"{config}: data.init_args.make_train: {error}") from error
    write_shards(source, folder, clips_per_shard=4, workers=os.cpu_count() or 1)


def _config(path: str | Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(content, dict) or not all("init_args" in (content.get(key) or {}) for key in ("model", "data")):
        raise ValueError(f"{path} is no config of one stage of training: it has no `model` and `data`")
    names = [content[key].get("class_path", "").rpartition(".")[2] for key in ("model", "data")]
    if names != [MergedEncoderModule.__name__, ClipDataModule.__name__]:
        raise ValueError(
            f"scaling is measured for an encoder on clips, got {names[0]} on {names[1]} in {path}: take a config such "
            "as conf/encoder_tiny.yaml"
        )
    return content


def measure_reading(job: Job) -> Reading:
    """Read training batches on one core for a tenth of the job's time, but at least two."""
    _, data = replace(job, data={**job.data, "init_args": {**job.data["init_args"], "workers": 0}}).built()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = _forever(data)
        next(batches)
        frames, before, start = 0, _bytes_read(), time.perf_counter()
        for number in itertools.count(1):
            frames += next(batches).valid.numel()
            elapsed = time.perf_counter() - start
            if number >= 2 and elapsed > job.seconds / 10:
                break
    finally:
        torch.set_num_threads(threads)
    return Reading(frames / elapsed, (_bytes_read() - before) / frames, data.sampling.frames)


def _bytes_read() -> int:
    """Bytes that this process has read so far, from disks or from the system's cache of them (Linux)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _forever(data: ClipDataModule) -> Iterator[ClipBatch]:
    loader = data.train_dataloader()
    while True:
        yield from loader


def measure(job: Job, processes: int) -> Measured:
    """Train on so many processes of this machine: with a GPU each where there are as many, else on the CPU.

    Raises:
        ValueError: there are to be none.
    """
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (processes, job, folder), nprocs=processes)
        return Measured(**json.loads((Path(folder) / "measured.json").read_text()))


def _work(rank: int, processes: int, job: Job, folder: str) -> None:
    torch.set_num_threads(job.threads)
    on_gpu = torch.cuda.device_count() >= processes
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    measured = _measured(processes, job, device)
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(asdict(measured)))
    distributed.destroy_process_group()


def _measured(processes: int, job: Job, device: torch.device) -> Measured:
    torch.manual_seed(distributed.get_rank())
    module, data = job.built()
    module.to(device)
    network = DistributedDataParallel(_Loss(module), device_ids=[device] if device.type == "cuda" else None)
    optimizer, _ = build_optimizer(network, module.optimizer_config, total_steps=1_000_000)
    batches = _forever(data)
    batch = next(batches).to(device)
    gradients = torch.zeros(sum(p.numel() for p in module.trained_parameters()), device=device)

    def step(batch: ClipBatch, exchange: bool = True) -> None:
        apart: AbstractContextManager[None] = nullcontext() if exchange else network.no_sync()
        with apart:
            with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
                loss = network(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    def all_reduce() -> None:
        distributed.all_reduce(gradients)
        gradients[0].item()

    works: dict[str, Callable[[], None]] = {
        "step": lambda: step(batch),
        "lone": lambda: step(batch, exchange=False),
        "all_reduce": all_reduce,
    }
    share = job.seconds / (len(works) + 1)
    # As often as the slowest process can, so that all do the same.
    times = {name: max(1, int(share / _ROUNDS / _seconds(work, 1, device))) for name, work in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(_ROUNDS):
        for name, work in works.items():
            taken[name].append(_seconds(work, times[name], device))
    seconds = {name: statistics.median(values) for name, values in taken.items()}

    waited = 0.0

    def fed() -> None:
        nonlocal waited
        asked = time.perf_counter()
        new = next(batches).to(device)
        waited += time.perf_counter() - asked
        step(new)

    for _ in range(_PREFETCHED * data.workers):
        next(batches)
    steps = max(1, int(share / seconds["step"]))
    fed_s = _seconds(fed, steps, device)
    waiting = _most(waited / (steps * fed_s), device)
    frames = batch.valid.numel()
    return Measured(
        processes=processes,
        frames_per_s=processes * frames / seconds["step"],
        fed_frames_per_s=processes * frames / fed_s,
        step_s=seconds["step"],
        lone_step_s=seconds["lone"],
        all_reduce_s=seconds["all_reduce"],
        waiting=waiting,
        gradient_bytes=gradients.nbytes,
        step_frames=frames,
    )


def _seconds(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one call on the slowest process; all begin together."""
    distributed.barrier()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return _most((time.perf_counter() - start) / times, device)


def _most(value: float, device: torch.device) -> float:
    most = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return most.item()


# ---- tables ------------------------------------------------------------------------------------------------------


def print_scaling(
    config: str,
    data: str | None,
    processes: Sequence[int],
    seconds: float,
    gpus: Sequence[int],
    gpu_frames_per_s: float | None,
    gbit_per_s: float,
    gpus_per_node: int,
    open_ms: float,
    dataset_gb: float,
) -> None:
    """Print both tables.

    Args:
        config: a one-stage config of an encoder.
        data: folder of shards; None: clips are made.
        processes: numbers of processes to measure on this machine.
        seconds: time for each of them.
        gpus: numbers of GPUs to predict for.
        gpu_frames_per_s: of one GPU alone; None: as one process here.
        gbit_per_s: speed of each GPU's link.
        gpus_per_node, open_ms, dataset_gb: as of `Assumptions`.

    Raises:
        OSError, ValueError: a config or shards that cannot be read, or a number that cannot be.
    """
    if min(processes) < 1:
        raise ValueError(f"--processes must be 1 or more, got {min(processes)}")
    with tempfile.TemporaryDirectory() as made:
        if data is None:
            make_clips(config, made)
        job = job_of(config, data or made, seconds, processes)
        reading = measure_reading(job)
        measured = [measure(job, number) for number in processes]
    first = measured[0]
    frames_per_s = gpu_frames_per_s or first.frames_per_s / first.processes
    given = Assumptions(
        gpu_frames_per_s=frames_per_s,
        step_frames=first.step_frames,
        gradient_bytes=first.gradient_bytes,
        link_bytes_per_s=gbit_per_s * 1e9 / 8,
        read_bytes_per_frame=reading.bytes_per_frame,
        loader_frames_per_s=reading.frames_per_s,
        clip_frames=reading.clip_frames,
        gpus_per_node=gpus_per_node,
        open_s=open_ms / 1e3,
        dataset_bytes=dataset_gb * 1e9,
    )
    Console(width=120).print(_measured_table(Path(config).name, job, measured))
    Console(width=120).print(_needs_table(given, [needs(number, given) for number in gpus]))


def _measured_table(config: str, job: Job, measured: Sequence[Measured]) -> Table:
    table = Table(title=f"{config}: {measured[0].step_frames} frames a step and process, {job.threads} threads each")
    rows: dict[str, Callable[[Measured], str]] = {
        "frames/s, all processes": lambda m: f"{m.frames_per_s:.1f}",
        "over the first, for each process": lambda m: (
            f"{m.frames_per_s / m.processes / (measured[0].frames_per_s / measured[0].processes):.2f} x"
        ),
        "step": lambda m: f"{1e3 * m.step_s:.1f} ms",
        "step without exchanging gradients": lambda m: f"{1e3 * m.lone_step_s:.1f} ms",
        "share of communication": lambda m: f"{m.communication:.1%}",
        "all-reduce of the gradients alone": lambda m: f"{1e3 * m.all_reduce_s:.1f} ms",
        "sent by each process meanwhile": lambda m: (
            f"{m.all_reduce_bytes_per_s / 1e9:.2f} GB/s" if m.processes > 1 else ""
        ),
        "frames/s, fed by the loader": lambda m: f"{m.fed_frames_per_s:.1f}",
        "share of waiting for data": lambda m: f"{m.waiting:.1%}",
    }
    return _filled(table, [f"{m.processes} process(es)" for m in measured], rows, measured)


def _needs_table(given: Assumptions, needed: Sequence[Needs]) -> Table:
    table = Table(
        title="predicted",
        caption=f"A GPU: {given.gpu_frames_per_s:.0f} frames/s alone, {given.step_frames} frames a step, a link of "
        f"{given.link_bytes_per_s * 8e-9:.0f} Gbit/s; {given.gradient_bytes / 1e6:.0f} MB of gradients. A loader "
        f"process: {given.loader_frames_per_s:.0f} frames/s, for each of which {given.read_bytes_per_frame / 1e3:.0f} "
        f"kB are read; {1e3 * given.open_s:g} ms to open a shard. {given.dataset_bytes / 1e9:g} GB of shards.",
    )
    rows: dict[str, Callable[[Needs], str]] = {
        "step alone": lambda n: f"{1e3 * n.step_s:.0f} ms",
        "sent by each GPU in a step": lambda n: f"{n.all_reduce_bytes / 1e6:.0f} MB",
        "that takes": lambda n: f"{1e3 * n.all_reduce_s:.1f} ms",
        "share of communication, at most": lambda n: f"{n.communication:.1%}",
        "loader processes for each GPU": lambda n: f"{n.workers}",
        "read from storage": lambda n: f"{n.read_bytes_per_s / 1e6:.0f} MB/s",
        "shards opened, reading at random": lambda n: f"{n.opened_per_s:.0f} /s",
        "files open on a machine, in sequence": lambda n: f"{n.open_files}",
        "shard size, in sequence": lambda n: (
            "too few clips" if n.shard_bytes is None else f"{n.shard_bytes / 1e6:.0f} MB"
        ),
        "at least": lambda n: f"{n.smallest_shard_bytes / 1e6:.0f} MB",
    }
    return _filled(table, [f"{n.gpus} GPU(s)" for n in needed], rows, needed)


def _filled(table: Table, columns: Sequence[str], rows: dict[str, Callable[[Any], str]], of: Sequence[Any]) -> Table:
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for name, value in rows.items():
        table.add_row(name, *map(value, of))
    return table
