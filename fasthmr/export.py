"""Hand weights on, and take others' in: `python -m fasthmr.export CHECKPOINT -o FILE.safetensors [--dtype bfloat16]`.

Takes any checkpoint of ours (a training run's too: its averaged weights, without optimiser and loops) and writes the
network alone as one safetensors file, with its header in the file's metadata, and as FILE.json beside it.
`ENCODER+DECODER` makes one file of a whole pipeline. Whatever loads a checkpoint loads the file as well; other programs
read it with the safetensors library. `--hub` writes a folder for huggingface_hub instead.

With `--from`, the checkpoint is another's (docs/checkpoints.md), and becomes ours:

    python -m fasthmr.export hmr2.ckpt -o hmr2.safetensors --from auto --body SMPL_NEUTRAL.pkl
    python -m fasthmr.export camerahmr.ckpt -o camerahmr.safetensors --from auto --body SMPL_NEUTRAL.pkl
    python -m fasthmr.export cam_model.ckpt -o human_fov.safetensors --from auto
    python -m fasthmr.export hamer.ckpt -o start.safetensors --from backbone      the ViT; the head starts anew
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from fasthmr.body import load_body
from fasthmr.checkpoint import encoder_header, human_fov_header, network_of
from fasthmr.cli import HelpFormatter
from fasthmr.files import write_text
from fasthmr.foreign import load_backbone, load_foreign_human_fov, load_hmr, what_is
from fasthmr.models.adapters import Foreign
from fasthmr.models.hmr import Architecture, HMRConfig
from fasthmr.safetensors_io import SUFFIX, write_safetensors

_SOURCES = ("auto", *get_args(Foreign))
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m fasthmr.export", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=str, help="any checkpoint of ours, or ENCODER+DECODER")
    parser.add_argument("-o", "--out", type=str, required=True, help=f"file to write, *{SUFFIX}, or folder (--hub)")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, or bfloat16 for half the size")
    parser.add_argument("--hub", action="store_true", help="write a folder as huggingface_hub's PyTorchModelHubMixin")
    foreign = parser.add_argument_group("of another's checkpoint")
    foreign.add_argument("--from", type=str | None, default=None, help=f"what it holds: {', '.join(_SOURCES)}")
    foreign.add_argument("--body", type=str | None, default=None, help="SMPL_NEUTRAL.pkl: whose poses it predicts")
    foreign.add_argument("--vit_heads", type=int | None, default=None, help="attention heads, for unusual widths")
    foreign.add_argument("--head", type=str, default="hmr2", help="of `--from backbone`: hmr2 or camerahmr")
    return parser


def export(
    content: tuple[Mapping[str, Any], Mapping[str, Tensor]], out: str | Path, dtype: str = "float32", hub: bool = False
) -> None:
    """Write a network to a safetensors file and a JSON file with its header, or to a folder for huggingface_hub.

    Args:
        content: header and weights, as `fasthmr.checkpoint.network_of` and `foreign` return them.
        out: path of the file, or of the folder.
        dtype: "float32" or "bfloat16".
        hub: write a folder.

    Raises:
        ValueError: another dtype or ending, or a kind that the folder is not for.
        OSError: it cannot be written.
    """
    _check(out, dtype, hub)
    header, weights = content
    if hub:
        from fasthmr.hub import write_hub_folder  # the extra `hub`, which nothing else needs

        return write_hub_folder(out, header, weights, _DTYPES[dtype])
    write_safetensors(out, header, weights, _DTYPES[dtype])
    write_text(Path(out).with_suffix(".json"), json.dumps(header, indent=2) + "\n")


def foreign(
    path: str | Path,
    source: str = "auto",
    body: str | None = None,
    vit_heads: int | None = None,
    head: Architecture = "hmr2",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights of another's checkpoint, as if it were ours.

    Args:
        path: of the file.
        source: what it holds: "hmr2", "camerahmr", "human_fov", "backbone", or "auto" for what its names say.
        body: "free" or a body file, whose id is noted. HMR2.0 and CameraHMR predict SMPL's poses, so there it must be
            given; a backbone is nobody's, and "free" if not given.
        vit_heads: attention heads of the backbone, where its width does not tell.
        head: whose head is put on a backbone.

    Raises:
        FileNotFoundError, CheckpointError: as `fasthmr.foreign.load_hmr`.
        ValueError: an option that cannot be, or a missing body.
    """
    for name, value, choices in (("--from", source, _SOURCES), ("--head", head, get_args(Architecture))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    kind = what_is(path) if source == "auto" else source
    if kind == "human_fov":
        fov = load_foreign_human_fov(path)
        return human_fov_header(fov), fov.state_dict()
    if kind == "backbone":
        hmr = load_backbone(path, HMRConfig(architecture=head), vit_heads)
        logging.getLogger("export").info("only the backbone is the file's: the head is untrained, so fine-tune it")
    elif body is None:
        raise ValueError(f"this is {kind}'s, which predicts SMPL's poses: pass --body /path/to/SMPL_NEUTRAL.pkl")
    else:
        hmr = load_hmr(path, "camerahmr" if kind == "camerahmr" else "hmr2", vit_heads)
    header = encoder_header(hmr.config, load_body(body or "free").id, hmr.merge_plan, weights_prefix="")
    return header, hmr.state_dict()


def _check(out: str | Path, dtype: str, hub: bool) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not hub and Path(out).suffix != SUFFIX:
        raise ValueError(f"--out must end in {SUFFIX}, got {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    options = build_parser().parse_args(arguments)
    try:
        _check(options.out, options.dtype, options.hub)
        if (source := options["from"]) is None:
            content = network_of(options.checkpoint)
        else:
            content = foreign(options.checkpoint, source, options.body, options.vit_heads, options.head)
        export(content, options.out, options.dtype, options.hub)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = Path(options.out) / "model.safetensors" if options.hub else Path(options.out)
    print(f"written: {options.out} ({written.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
