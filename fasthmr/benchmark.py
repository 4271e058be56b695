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
import sys
from collections.abc import Sequence
from typing import get_args

from fasthmr.precision import PrecisionChoice
from fasthmr.speed.decoder import print_decoder
from fasthmr.speed.encoders import SIZES, print_encoders
from fasthmr.speed.loading import print_loading
from fasthmr.speed.metrics import print_metrics
from fasthmr.speed.scaling import print_scaling
from fasthmr.speed.training import print_data_and_training


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
    encoder.add_argument(
        "--precision", choices=get_args(PrecisionChoice), default="auto", help="auto: bf16 if there are instructions"
    )
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
            print_metrics(options.frames, options.rounds)
        elif options.what == "load":
            print_loading(options.size, options.folder)
        elif options.what == "scaling":
            print_scaling(**{name: value for name, value in vars(options).items() if name != "what"})
        elif options.what == "decoder":
            print_decoder(options.size, options.windows, options.training_windows, options.rounds)
        elif options.what == "encoder":
            print_encoders(
                options.checkpoints, options.size, options.merged, options.batch, options.rounds, options.precision,
                options.compile,
            )  # fmt: skip
        else:
            print_data_and_training(options.seconds)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
