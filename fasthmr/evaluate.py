"""Compare systems on the same clips: `python -m fasthmr.evaluate SYSTEM... --data SHARDS --protocol body-24 -o OUT`.

    python -m fasthmr.evaluate shipped:encoder_tiny --data data/val -o evaluation
    python -m fasthmr.evaluate whole=big.ckpt merged=small.ckpt FastHMR=small.ckpt+decoder.ckpt --data data/val -o out
    python -m fasthmr.evaluate -c conf/evaluation_tiny.yaml                            a stage of a recipe on its own

SYSTEM is [NAME=]CHECKPOINT[@all_tokens]. CHECKPOINT is that of an encoder, of a pipeline, or ENCODER+DECODER; with
@all_tokens an encoder does not merge its tokens. The others are compared with the first one. Writes table.md,
results.json, sequences.csv and pictures to the folder OUT (docs/evaluate.md).

With torchrun or SLURM's srun, processes share the clips, and find the same numbers:

    torchrun --nproc_per_node 2 -m fasthmr.evaluate ...
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fasthmr.cli import HelpFormatter, UsageError, one_line
from fasthmr.evaluation import EvaluationConfig, describe, evaluate, parse_systems
from fasthmr.evaluation_stage import EvaluationStage
from fasthmr.ranks import rank


def build_parser() -> ArgumentParser:
    """The command line, without the form that takes a file."""
    parser = ArgumentParser(prog="python -m fasthmr.evaluate", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("systems", type=str, nargs="+", metavar="SYSTEM", help="[NAME=]CHECKPOINT[@all_tokens]")
    parser.add_argument("--data", type=str, required=True, help="folder of shards with pose labels")
    parser.add_argument("-o", "--out", type=str, required=True, help="folder to write to")
    parser.add_class_arguments(EvaluationConfig)
    return parser


def run(options: Namespace) -> dict[str, Any]:
    """Do what the command line says; returns what is in results.json.

    Raises:
        ValueError: bad input; nothing was written.
        OSError: a file cannot be read or written.
    """
    config = EvaluationConfig(**{field.name: getattr(options, field.name) for field in fields(EvaluationConfig)})
    return evaluate(parse_systems(options.systems), options.data, config, options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if any(argument.partition("=")[0] in ("-c", "--config") for argument in arguments):
            stage = EvaluationStage(arguments)
            results, out = stage.evaluate(), stage.run_dir
        else:
            options = build_parser().parse_args(arguments)
            results, out = run(options), options.out
    except (UsageError, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    if rank() == 0:
        print(describe(results))
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
