"""Hand weights on: `python -m fasthmr.export CHECKPOINT -o FILE.safetensors [--dtype bfloat16]`.

Takes any checkpoint of ours (a training run's too: its averaged weights, without optimiser and loops) and writes the
network alone as one safetensors file, with its header in the file's metadata. Whatever loads a checkpoint loads the
file as well; other programs read it with the safetensors library.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from fasthmr.checkpoint import network_of
from fasthmr.cli import HelpFormatter
from fasthmr.safetensors_io import SUFFIX, write_safetensors

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m fasthmr.export", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=str, help="any checkpoint of ours")
    parser.add_argument("-o", "--out", type=str, required=True, help=f"file to write, *{SUFFIX}")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, or bfloat16 for half the size")
    return parser


def export(checkpoint: str | Path, out: str | Path, dtype: str = "float32") -> None:
    """Write the network of a checkpoint to a safetensors file.

    Raises:
        FileNotFoundError, CheckpointError: as `fasthmr.checkpoint.network_of`.
        ValueError: another dtype or ending.
        OSError: the file cannot be written.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if Path(out).suffix != SUFFIX:
        raise ValueError(f"--out must end in {SUFFIX}, got {out}")
    header, weights = network_of(checkpoint)
    write_safetensors(out, header, weights, _DTYPES[dtype])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    options = build_parser().parse_args(arguments)
    try:
        export(options.checkpoint, options.out, options.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.out} ({Path(options.out).stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
