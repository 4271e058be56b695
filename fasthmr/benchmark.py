"""How fast this machine is: `python -m fasthmr.benchmark [--seconds 10]` and `python -m fasthmr.benchmark encoder`.

The first prints frames/s of the synthetic renderer (one core), of reading shards into network inputs (one core), and of
training steps of the tiny encoder (all cores), and the share of its time that training waits for data.

The second prints what encoders cost and how fast they are, measured in turn: those of checkpoints, or HMR2.0's size
with random weights as it is, with layers merged, and with tokens merged besides.

    python -m fasthmr.benchmark encoder                                 HMR2.0's size (needs 14 GB of memory)
    python -m fasthmr.benchmark encoder best.ckpt best-merged.ckpt --batch 1 8 64
    python -m fasthmr.benchmark encoder --compile                       the same by torch.compile, which takes minutes

The third, `python -m fasthmr.benchmark load`, loads a checkpoint of HMR2.0's format with random weights (2.7 GB on
disk, twice), as it is and as ours, each in a process of its own.

`python -m fasthmr.benchmark decoder [--size tiny]` says what the diffusion decoder takes beside its encoder
(28 layers and Mask-ToMe at HMR2.0's size; the shipped one), and how fast it and the motion prior train.

`python -m fasthmr.benchmark scaling [CONFIG]` trains a config's encoder on several processes and predicts what many
GPUs would need of network and disks; docs/clusters.md reads it.

`python -m fasthmr.benchmark metrics` measures evaluation without networks, on one core: errors of meshes by every
protocol, and making such meshes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from datamodules.clips import ClipDataModule
from fasthmr.body import load_body
from fasthmr.checkpoint import encoder_header, load_encoder
from fasthmr.cost import encoder_cost, frames_per_second, merging_share
from fasthmr.data.batch import ClipBatch
from fasthmr.data.shards import write_shards
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.decoder_speed import peak_memory, print_speed
from fasthmr.evaluation.metrics_speed import print_metrics_speed
from fasthmr.foreign import load_hmr
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.lit.optim import OptimizerConfig, build_optimizer
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.models.adapters import foreign_names
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.report import readable, short_names
from fasthmr.safetensors_io import write_safetensors
from fasthmr.scaling import print_scaling

SIZES = {"hmr2": HMRConfig.hmr2(), "tiny": HMRConfig.tiny()}


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
        with torch.autocast(device, torch.bfloat16):
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


def speed_of_data_and_training(seconds: float) -> None:
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
        table.add_row("training step, tiny encoder, bf16", f"{step:.0f}", f"{device}, {threads} threads")
        table.add_row("share of time that training waits for data", f"{waiting:.1%}", "1 loader process")
        table.add_row("loader / step", f"{reading / step:.1f} x", "")
    Console().print(table)


def cost_of_encoders(
    checkpoints: list[str], size: str, merged: int, batches: list[int], rounds: int, compiled: bool = False
) -> None:
    """Print cost and speed of encoders: those of checkpoints, or one of a size with random weights in three versions.

    The TFLOP/s that are reached count every matrix product twice, for its multiplications and its additions.

    Raises:
        ValueError: a checkpoint or size that cannot be.
    """
    for name, values in (("--batch", batches), ("--rounds", [rounds])):
        if min(values) < 1:
            raise ValueError(f"{name} must be 1 or more, got {min(values)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if checkpoints:
        named = zip(short_names(checkpoints), checkpoints, strict=True)
        encoders = {name: load_encoder(path).to(device) for name, path in named}
    else:
        encoders = {name: hmr.to(device) for name, hmr in three_versions(SIZES[size], merged).items()}
    how = f"bf16, {'compiled' if compiled else 'eager'}, {device}, {torch.get_num_threads()} threads"
    table = Table(title=f"{how}, medians of {rounds} measured in turn")
    names = ["encoder", "layers", "tokens", "params M", "MACs G (thop)", "MACs G (all)"]
    for batch in batches:
        names += [f"frames/s, batch {batch}", f"TFLOP/s, batch {batch}"]
    for name in names:
        table.add_column(name, justify="left" if name == "encoder" else "right")
    speeds = [frames_per_second(encoders, batch, rounds, compiled=compiled) for batch in batches]
    first = next(iter(encoders))
    for name, hmr in encoders.items():
        cost = encoder_cost(hmr.config, hmr.merge_plan)
        numbers = [readable(cost.params / 1e6), readable(cost.macs_thop / 1e9), readable(cost.macs_all / 1e9)]
        for speed in speeds:
            numbers += [f"{speed[name]:.2f} ({speed[name] / speed[first]:.2f} x)"]
            numbers += [readable(2 * cost.macs_all * speed[name] / 1e12)]
        table.add_row(name, str(cost.layers), str(cost.tokens), *numbers)
    Console(width=100 + 40 * len(batches)).print(table)
    for name, hmr in encoders.items():
        if hmr.config.token_merging is not None:
            shares = (f"{merging_share(hmr, batch, rounds, compiled):.1%} at batch {batch}" for batch in batches)
            print(f"{name}: of the first layer's time, choosing and merging tokens takes {', '.join(shares)}")


def speed_of_decoder(size: str, windows: list[int], training_windows: int, rounds: int) -> None:
    """Print the tables of `fasthmr.decoder_speed`, with the encoder that the decoder's size belongs to."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if size == "paper":
        *_, encoder = three_versions(SIZES["hmr2"], merged=4).values()
    else:
        encoder = load_encoder("shipped:encoder_tiny")
    print_speed(size, encoder.to(device), windows, training_windows, rounds)


def loading_of_checkpoints(size: str, folder: str | None) -> None:
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


def three_versions(config: HMRConfig, merged: int) -> dict[str, HMR]:
    """An encoder as it is, with `merged` layers less, and with Mask-ToMe besides; random weights."""
    depth = config.vit_depth
    if not 0 < merged < depth:
        raise ValueError(f"--merged must be 1 to {depth - 1} of the {depth} layers, got {merged}")
    whole = HMR(config).eval()
    fewer = copy.deepcopy(whole)
    fewer.merge_layers(LayerMergePlan(depth).merged(depth - 1 - merged, depth - 1))
    fewest = copy.deepcopy(fewer)
    fewest.set_token_merging(TokenMerging())
    return {"baseline": whole, f"{depth - merged} layers": fewer, f"{depth - merged} layers, Mask-ToMe": fewest}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fasthmr.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time spent on each measurement")
    commands = parser.add_subparsers(dest="what")
    encoder = commands.add_parser("encoder", help="cost and speed of encoders")
    encoder.add_argument("checkpoints", nargs="*", help="ours; without any, random weights of --size")
    encoder.add_argument("--size", choices=list(SIZES), default="hmr2")
    encoder.add_argument("--merged", type=int, default=4, help="layers less, for random weights")
    encoder.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="frames at a time")
    encoder.add_argument("--rounds", type=int, default=5, help="measurements of each")
    encoder.add_argument("--compile", action="store_true", help="by torch.compile; needs a C++ compiler or a GPU")
    load = commands.add_parser("load", help="seconds and memory of loading checkpoints")
    load.add_argument("--size", choices=list(SIZES), default="hmr2")
    load.add_argument("--folder", default=None, help="where to write them for the time being; else as TMPDIR says")
    metrics = commands.add_parser("metrics", help="frames/s of an evaluation's errors")
    metrics.add_argument("--frames", type=int, default=256, help="of a sequence")
    metrics.add_argument("--rounds", type=int, default=5, help="measurements of each")
    decoder = commands.add_parser("decoder", help="speed of the diffusion decoder, and of training it and its prior")
    decoder.add_argument("--size", choices=["paper", "tiny"], default="paper")
    decoder.add_argument("--windows", type=int, nargs="+", default=[1, 8], help="windows at a time")
    decoder.add_argument("--training_windows", type=int, default=32, help="windows of a training step")
    decoder.add_argument("--rounds", type=int, default=5, help="measurements of each")
    scaling = commands.add_parser("scaling", help="training on several processes, and what many GPUs would need")
    scaling.add_argument("config", nargs="?", default="conf/encoder_tiny.yaml", help="of one stage, of an encoder")
    scaling.add_argument("--data", default=None, help="folder of shards; without it, a few clips are made")
    scaling.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="to measure on this machine")
    scaling.add_argument("--seconds", type=float, default=60.0, help="for each number of processes")
    scaling.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="to predict for")
    scaling.add_argument("--gpu_frames_per_s", type=float, default=None, help="of one alone; else as one process here")
    scaling.add_argument("--gbit_per_s", type=float, default=200.0, help="of each GPU's link")
    scaling.add_argument("--gpus_per_node", type=int, default=8)
    scaling.add_argument("--open_ms", type=float, default=10.0, help="to open a shard on shared storage")
    scaling.add_argument("--dataset_gb", type=float, default=1000.0, help="all shards together")
    options = parser.parse_args(arguments)
    try:
        if options.what == "metrics":
            print_metrics_speed(options.frames, options.rounds)
        elif options.what == "load":
            loading_of_checkpoints(options.size, options.folder)
        elif options.what == "scaling":
            print_scaling(**{name: value for name, value in vars(options).items() if name != "what"})
        elif options.what == "decoder":
            speed_of_decoder(options.size, options.windows, options.training_windows, options.rounds)
        elif options.what == "encoder":
            cost_of_encoders(
                options.checkpoints, options.size, options.merged, options.batch, options.rounds, options.compile
            )
        else:
            speed_of_data_and_training(options.seconds)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
