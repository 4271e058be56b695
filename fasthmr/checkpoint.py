"""Checkpoints: the one place that knows what a file on disk means.

Format, version 1
-----------------
A file of `torch.save` (zip) that loads with `torch.load(weights_only=True)`: a dict with at least two keys.

`"fasthmr"`, the header, plain data only:

| key | meaning |
|---|---|
| `format_version` | 1 |
| `kind` | `"encoder"` |
| `config` | sizes of the network: `HMRConfig.as_dict()` |
| `merge_plan` | the events of the `LayerMergePlan`, in order: `[{"keep": 2, "drop": [3, 4]}, ...]`; empty for none |
| `body` | `BodyModel.id` of the body that the rotations and betas belong to |
| `weights_prefix` | which weights of `state_dict` to use: those whose names start with it. May be empty |

`"state_dict"`: name -> tensor. The names that start with `weights_prefix` are, without it, exactly those of
`HMR.state_dict()` for that config and plan; others are allowed and ignored. No body model is ever stored.

A motion prior's header has the kind `"motion_prior"`, no plan, and the config `MotionVAEConfig.as_dict()`; its names
are those of `MotionPrior.state_dict()`, which holds the statistics that poses are normalised with.

`save_encoder` writes just that, with an empty prefix. A Lightning training checkpoint is a superset: its state dict has
`net.*` and, with averaged weights, `ema.module.*`; its header names the averaged ones; optimiser and loop states lie
beside it and are not read into memory here.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthmr.files import written_whole
from fasthmr.merging import LayerMergePlan
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.motion_vae import MotionVAEConfig

FORMAT_VERSION = 1
HEADER_KEY = "fasthmr"
_KIND = "encoder"
_PRIOR_KIND = "motion_prior"
_MAX_NAMES = 6
_READ_BYTES = 2**22


class CheckpointError(ValueError):
    """A file is not a checkpoint that this version can load; the message names the file and what is wrong."""


@dataclass(frozen=True)
class EncoderHeader:
    """Header of an encoder's checkpoint; the module's docstring says what each field means."""

    format_version: int
    config: HMRConfig
    merge_plan: LayerMergePlan
    body: str
    weights_prefix: str


def encoder_header(config: HMRConfig, body_id: str, merge_plan: LayerMergePlan, weights_prefix: str) -> dict[str, Any]:
    """The header to store under `HEADER_KEY` beside a `state_dict`.

    Args:
        config: sizes of the network.
        body_id: `BodyModel.id` of the body it was trained with.
        merge_plan: which of its layers became one.
        weights_prefix: prefix of the weights to use in that state dict, e.g. "net.", "ema.module." or "".
    """
    return {
        "format_version": FORMAT_VERSION,
        "kind": _KIND,
        "config": config.as_dict(),
        "merge_plan": merge_plan.as_dict()["events"],
        "body": body_id,
        "weights_prefix": weights_prefix,
    }


def prior_header(config: MotionVAEConfig, body_id: str, weights_prefix: str) -> dict[str, Any]:
    """The header of a motion prior's checkpoint: as `encoder_header`, of kind "motion_prior", without a plan."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": _PRIOR_KIND,
        "config": config.as_dict(),
        "body": body_id,
        "weights_prefix": weights_prefix,
    }


def load_prior(path: str | Path) -> tuple[MotionPrior, str]:
    """The motion prior of a checkpoint, on the CPU and in evaluation mode, and the id of the body it was trained with.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no motion prior of ours, is damaged, or its weights do not fit its config.
    """
    path = Path(path)
    content = read_checkpoint(path)
    raw = _raw_header(path, content, _PRIOR_KIND, (("config", dict), ("body", str), ("weights_prefix", str)))
    _verify_checksums(path, weights=True)
    weights = _weights(path, content, raw["weights_prefix"])
    try:
        config = MotionVAEConfig(**raw["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: header field 'config': {error}") from error
    with torch.device("meta"):
        prior = MotionPrior(config)
    _require_same_tensors(path, expected=prior.state_dict(), got=weights)
    prior.to_empty(device="cpu")
    prior.load_state_dict(weights)
    return prior.eval(), raw["body"]


def save_encoder(path: str | Path, hmr: HMR, body_id: str) -> None:
    """Write an encoder, atomically: `path` holds the old file or the whole new one, whatever happens.

    Args:
        path: file to write; missing folders are made.
        hmr: the network.
        body_id: `BodyModel.id` of the body it was trained with.

    Raises:
        OSError: the file cannot be written, e.g. no permission or a full disk. Nothing half-written stays.
    """
    path = Path(path)
    # Cloned, so that a tensor that is a view of a larger storage does not drag all of it into the file.
    weights = {name: tensor.detach().cpu().clone() for name, tensor in hmr.state_dict().items()}
    content = {
        HEADER_KEY: encoder_header(hmr.config, body_id, hmr.merge_plan, weights_prefix=""),
        "state_dict": weights,
    }
    write_checkpoint(path, content)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain data, atomically; missing folders are made. Raises OSError as `save_encoder` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        torch.save(dict(content), file)


def read_header(path: str | Path) -> EncoderHeader:
    """Header of an encoder's checkpoint, without reading its weights. Raises as `load_encoder` does."""
    return _header(Path(path), read_checkpoint(Path(path)))


def load_encoder(path: str | Path) -> HMR:
    """The network of a checkpoint, on the CPU and in evaluation mode; averaged weights where it has them.

    Draws no random numbers. Which body it belongs to is in `read_header(path).body`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint of ours, is damaged, of another format version, or its weights do not
            fit its config (the message names them).
    """
    path = Path(path)
    content = read_checkpoint(path)
    header = _header(path, content)
    _verify_checksums(path, weights=True)
    weights = _weights(path, content, header.weights_prefix)
    # Built without memory and filled after: random initial weights would cost time and move the global generator.
    with torch.device("meta"):
        hmr = HMR(header.config)
        hmr.merge_layers(header.merge_plan)
    _require_same_tensors(path, expected=hmr.state_dict(), got=weights)
    hmr.to_empty(device="cpu")
    hmr.load_state_dict(weights)
    return hmr.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Top-level dict of a file, without executing anything in it; its tensors are mapped, not read.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds something other than tensors and plain data.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give the checkpoint itself")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is damaged, incomplete, or no checkpoint: it is not a whole zip file")
    _verify_checksums(path, weights=False)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds objects other than tensors and plain data: {error}") from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a fasthmr checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def _header(path: Path, content: Mapping[str, Any]) -> EncoderHeader:
    fields = (("config", dict), ("merge_plan", list), ("body", str), ("weights_prefix", str))
    raw = _raw_header(path, content, _KIND, fields)
    try:
        config = HMRConfig.from_dict(raw["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: header field 'config': {error}") from error
    try:
        plan = LayerMergePlan.from_dict({"depth": config.vit_depth, "events": raw["merge_plan"]})
    except ValueError as error:
        raise CheckpointError(f"{path}: header field 'merge_plan': {error}") from error
    return EncoderHeader(raw["format_version"], config, plan, raw["body"], raw["weights_prefix"])


def _raw_header(
    path: Path, content: Mapping[str, Any], kind: str, fields: tuple[tuple[str, type], ...]
) -> dict[str, Any]:
    raw = content.get(HEADER_KEY)
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise CheckpointError(f"{path} is not a fasthmr checkpoint: it has no {HEADER_KEY!r} header")
    version = raw["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this version of fasthmr reads {FORMAT_VERSION}: "
            f"use {'a newer' if isinstance(version, int) and version > FORMAT_VERSION else 'the'} fasthmr that wrote it"
        )
    if raw.get("kind") != kind:
        raise CheckpointError(f"{path} is a checkpoint of kind {raw.get('kind')!r}, not {kind!r}")
    for key, wanted in fields:
        if not isinstance(raw.get(key), wanted):
            raise CheckpointError(f"{path}: header field {key!r} must be a {wanted.__name__}, got {raw.get(key)!r}")
    return raw


def _weights(path: Path, content: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    state_dict = content.get("state_dict")
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path} has no 'state_dict'")
    weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if not weights:
        raise CheckpointError(f"{path} has no weights whose names start with {prefix!r}, which its header asks for")
    return weights


def _require_same_tensors(path: Path, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := [name for name in expected if name not in got]:
        problems.append(f"missing {_names(missing)}")
    if unexpected := [name for name in got if name not in expected]:
        problems.append(f"unexpected {_names(unexpected)}")
    if misshapen := [
        f"{name} {tuple(got[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and got[name].shape != tensor.shape
    ]:
        problems.append(f"wrong shape {_names(misshapen)}")
    if problems:
        raise CheckpointError(f"the weights of {path} do not fit its config: {'; '.join(problems)}")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _verify_checksums(path: Path, weights: bool) -> None:
    """Compare the file with the checksums inside it: torch maps the weights without looking at them.

    Reads the whole file, or without `weights` only what is not a tensor (torch names tensors `<any>/data/<number>`).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if weights or Path(member.filename).parent.name != "data":
                    with archive.open(member) as stream:
                        while stream.read(_READ_BYTES):
                            pass  # reading to the end compares the checksum
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
