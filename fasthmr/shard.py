"""Make, look at and verify shards of clips: `python -m fasthmr.shard make|inspect|verify`.

    python -m fasthmr.shard make --out data/walkers --clips 200 --seed 7
    python -m fasthmr.shard make --out data/mocap --clips 500 --motion PATH --backgrounds PHOTOS --workers 8
    python -m fasthmr.shard inspect data/walkers --show sheet.png
    python -m fasthmr.shard verify data/walkers

`make` can be stopped and run again: finished shards are kept. `verify` ends with code 1 if anything is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from fasthmr.body import load_body
from fasthmr.cli import HelpFormatter
from fasthmr.data.shards import ClipStore, verify_shards, write_shards
from fasthmr.data.sheet import contact_sheet
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.files import write_png


def build_parser() -> ArgumentParser:
    """The command line; the options of `make` are the fields of `SynthConfig`."""
    make = ArgumentParser(description="Film synthetic people, or any motion of AMASS's format, and write shards.")
    make.add_argument("--out", type=str, required=True, help="folder of the set")
    make.add_argument("--body", type=str, default="free", help="`free`, or a body file in SMPL's format")
    make.add_argument("--clips_per_shard", type=int, default=16, help="what a killed writer loses at most")
    make.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    make.add_class_arguments(SynthConfig)
    inspect = ArgumentParser(description="Say what a set holds.")
    inspect.add_argument("folder", type=str)
    inspect.add_argument("--show", type=str, help="write a contact sheet to this PNG file")
    inspect.add_argument("--clips", type=int, default=8, help="clips listed and shown, spread over the set")
    verify = ArgumentParser(description="Compare all checksums, decode all images, check all labels.")
    verify.add_argument("folder", type=str)
    parser = ArgumentParser(prog="python -m fasthmr.shard", description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subcommands()
    commands.add_subcommand("make", make)
    commands.add_subcommand("inspect", inspect)
    commands.add_subcommand("verify", verify)
    return parser


def make_set(options: Namespace) -> int:
    """Write a set."""
    fields = SynthConfig.__dataclass_fields__
    source = SynthSource(SynthConfig(**{name: options[name] for name in fields}), load_body(options.body))
    manifest = write_shards(source, options.out, options.clips_per_shard, options.workers)
    counts = f"{manifest.clips} clips, {manifest.frames} frames, {len(manifest.shards)} shards"
    print(f"{options.out}: {counts}, body {manifest.body}")
    return 0


def inspect_set(options: Namespace) -> int:
    """Print what a set holds, and draw its contact sheet."""
    store = ClipStore(options.folder)
    manifest = store.manifest
    size = sum(tar.stat().st_size for tar in store.shards)
    counts = f"{manifest.clips} clips, {manifest.frames} frames, {len(store.shards)} shards"
    print(f"{options.folder}: {counts}, {size / 1e6:.1f} MB")
    print(f"schema version {manifest.schema_version}, body {manifest.body}")
    told = {name: textwrap.shorten(str(value), 80, placeholder=" ...") for name, value in manifest.source.items()}
    print("made from " + ", ".join(f"{name}={value}" for name, value in told.items()))
    table = Table()
    for name in ("clip", "source", "frames", "fps", "image", "kB", "not ground truth"):
        table.add_column(name, no_wrap=name == "clip", overflow="fold")  # keys are for copying
    shown = [store[int(i)] for i in np.linspace(0, len(store) - 1, min(options.clips, len(store)))]
    for clip in shown:
        kilobytes = (len(clip.frames.data) + len(clip.masks.data)) / 1000
        other = ", ".join(f"{k}: {v}" for k, v in clip.status.items() if v != "ground_truth") or "-"
        width, height = clip.image_size
        table.add_row(
            clip.key, clip.source, str(len(clip)), f"{clip.fps:g}", f"{width}x{height}", f"{kilobytes:.0f}", other
        )
    Console().print(table)
    if options.show:
        write_png(Path(options.show), contact_sheet(shown))
        print(f"contact sheet written to {options.show}")
    return 0


def verify_set(options: Namespace) -> int:
    """Print every problem of a set; 1 if there is any."""
    problems = verify_shards(options.folder, progress=True)
    for problem in problems:
        print(problem)
    print(f"{options.folder}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}")
    return 1 if problems else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    options = build_parser().parse_args(arguments)
    command = {"make": make_set, "inspect": inspect_set, "verify": verify_set}[options.subcommand]
    try:
        return command(options[options.subcommand])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished shards are kept, run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
