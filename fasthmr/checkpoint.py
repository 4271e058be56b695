"""Checkpoints: the one place that knows what a file on disk means.

Format, version 2
-----------------
A file of `torch.save` (zip) that loads with `torch.load(weights_only=True)`: a dict with at least two keys. Or a
safetensors file (`fasthmr.safetensors_io`) with the same names, and the header as JSON in its metadata.

`"fasthmr"`, the header, plain data only:

| key | meaning |
|---|---|
| `format_version` | 2. Files of version 1 are read: they had no `architecture` in `config`, and no `human_fov` |
| `kind` | `"encoder"`, `"motion_prior"`, `"decoder"`, `"pipeline"` or `"human_fov"` |
| `body` | `BodyModel.id` of the body that rotations and betas belong to; `human_fov` has none |
| `weights_prefix` | which weights of `state_dict` to use: those whose names start with it. May be empty |

`"state_dict"`: name -> tensor. The names that start with `weights_prefix` are, without it, exactly those of the
network's own `state_dict()`; others are allowed and ignored. No body model is ever stored.

| kind | network | further keys of the header |
|---|---|---|
| `encoder` | `HMR` | `config`: `HMRConfig.as_dict()`; `merge_plan`: the events of its `LayerMergePlan`, in order: `[{"keep": 2, "drop": [3, 4]}, ...]`, empty for none |
| `human_fov` | `HumanFoV`, which CameraHMR's focal length comes from | `config`: `{"width": 48}` |
| `motion_prior` | `MotionPrior`, with the statistics that poses are normalised with | `config`: `MotionVAEConfig.as_dict()` |
| `decoder` | `DiffusionDecoder`, its motion prior and all statistics included | `config`: `DiffusionDecoderConfig.as_dict()`; `encoder`: `encoder_id` of the encoder whose features it was trained on |
| `pipeline` | an `HMR` as `hmr.*` and, unless there is none, a `DiffusionDecoder` as `decoder.*` | `encoder`: a mapping with the keys `config` and `merge_plan` of an encoder; `decoder`: a mapping with the key `config`, or null |

`save_*` write just that, with an empty prefix. A Lightning training checkpoint is a superset: its state dict has, for
example, `net.*` and, with averaged weights, `ema.module.*`; its header names the averaged ones; optimiser and loop
states lie beside it and are not read into memory here.

An encoder and a decoder belong together if the decoder was trained on that very encoder's features: fine-tuning or
merging the encoder makes its decoder stale. `save_pipeline` compares them; what it wrote is not compared again, because
both may since have been stored in half precision. Where a pipeline is read, `ENCODER+DECODER` stands for the pipeline
of two checkpoints, which are compared as well.
"""  # noqa: E501  (a table's row is one line)

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthmr.body import require_same_body
from fasthmr.checkpoint_files import (
    FORMAT_VERSION,
    HEADER_KEY,
    CheckpointError,
    filled,
    located,
    raw_header,
    read_checkpoint,
    require_fields,
    weights_of,
    write_checkpoint,
)
from fasthmr.merging import LayerMergePlan
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.models.human_fov import HumanFoV
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.motion_vae import MotionVAEConfig

__all__ = [
    "HEADER_KEY",
    "CheckpointError",
    "DecoderHeader",
    "EncoderHeader",
    "EncoderMismatchError",
    "decoder_header",
    "decoder_id",
    "encoder_header",
    "encoder_id",
    "human_fov_header",
    "load_decoder",
    "load_encoder",
    "load_human_fov",
    "load_pair",
    "load_pipeline_parts",
    "load_prior",
    "network_of",
    "networks_of_header",
    "prior_header",
    "read_checkpoint",
    "read_header",
    "require_same_encoder",
    "save_decoder",
    "save_encoder",
    "save_pipeline",
    "save_prior",
    "write_checkpoint",
]

_ENCODER, _PRIOR, _DECODER, _PIPELINE, _FOV = "encoder", "motion_prior", "decoder", "pipeline", "human_fov"
_HMR_PREFIX, _DECODER_PREFIX = "hmr.", "decoder."


class EncoderMismatchError(ValueError):
    """A decoder was about to be used with another encoder than the one whose features it was trained on."""


@dataclass(frozen=True)
class EncoderHeader:
    """Header of an encoder's checkpoint; the module's docstring says what each field means."""

    format_version: int
    config: HMRConfig
    merge_plan: LayerMergePlan
    body: str
    weights_prefix: str


@dataclass(frozen=True)
class DecoderHeader:
    """Header of a decoder's checkpoint; the module's docstring says what each field means."""

    format_version: int
    config: DiffusionDecoderConfig
    body: str
    encoder: str
    weights_prefix: str


# ---- the encoder ----------------------------------------------------------------------------------------------------


def encoder_header(config: HMRConfig, body_id: str, merge_plan: LayerMergePlan, weights_prefix: str) -> dict[str, Any]:
    """The header to store under `HEADER_KEY` beside a `state_dict`.

    Args:
        config: sizes of the network.
        body_id: `BodyModel.id` of the body it was trained with.
        merge_plan: which of its layers became one.
        weights_prefix: prefix of the weights to use in that state dict, e.g. "net.", "ema.module." or "".
    """
    return _header_of(_ENCODER, body_id, weights_prefix, **_encoder_structure(config, merge_plan))


def save_encoder(path: str | Path, hmr: HMR, body_id: str) -> None:
    """Write an encoder, atomically: `path` holds the old file or the whole new one, whatever happens.

    Args:
        path: file to write; missing folders are made.
        hmr: the network.
        body_id: `BodyModel.id` of the body it was trained with.

    Raises:
        OSError: the file cannot be written, e.g. no permission or a full disk. Nothing half-written stays.
    """
    _save(path, encoder_header(hmr.config, body_id, hmr.merge_plan, weights_prefix=""), _copied(hmr))


def read_header(path: str | Path) -> EncoderHeader:
    """Header of an encoder's checkpoint, without reading its weights. Raises as `load_encoder` does."""
    return _read_encoder_header(Path(path), read_checkpoint(Path(path)))


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
    header = _read_encoder_header(path, content)
    return _filled_hmr(path, header.config, header.merge_plan, header.weights_prefix)


def encoder_id(hmr: HMR) -> str:
    """What an encoder computes, as 16 hex digits: a hash of its config, its merge plan and its weights.

    Settings that have their default values are left out, so that settings which are yet to come change no id.
    """
    return _network_id({"config": _changed(hmr.config), "merge_plan": hmr.merge_plan.as_dict()}, hmr)


def require_same_encoder(expected_id: str, got_id: str | None, where: str) -> None:
    """Refuse to use a decoder, or features, with another encoder than the one that they belong to.

    Args:
        expected_id: `encoder_id` of the encoder in use.
        got_id: the id stored with a decoder or with features; None where nothing is stored.
        where: what holds it, for the message, such as a path.

    Raises:
        EncoderMismatchError: naming both ids.
    """
    if got_id != expected_id:
        theirs = "no encoder" if got_id is None else f"encoder {got_id}"
        raise EncoderMismatchError(
            f"{where} belongs to {theirs}, but this is encoder {expected_id}: use the encoder it was made with, or "
            "train a decoder for this one (model.init_args.init_from starts from another encoder's)"
        )


# ---- the network for the intrinsics ---------------------------------------------------------------------------------


def human_fov_header(fov: HumanFoV) -> dict[str, Any]:
    """The header of its checkpoint."""
    config = {"width": fov.width}
    return {"format_version": FORMAT_VERSION, "kind": _FOV, "weights_prefix": "", "config": config}


def load_human_fov(path: str | Path) -> HumanFoV:
    """The network for the field of view of a checkpoint, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no HumanFoV of ours (`python -m fasthmr.export` makes one of CameraHMR's), or damaged.
    """
    path = Path(path)
    raw = raw_header(path, read_checkpoint(path), _FOV)
    require_fields(path, raw, config=dict, weights_prefix=str)
    width = raw["config"].get("width")
    if type(width) is not int or width < 1:
        raise CheckpointError(f"{path}: header field 'config': width must be a positive whole number, got {width!r}")
    return filled(path, lambda: HumanFoV(width), raw["weights_prefix"])


# ---- the motion prior -----------------------------------------------------------------------------------------------


def prior_header(config: MotionVAEConfig, body_id: str, weights_prefix: str) -> dict[str, Any]:
    """The header of a motion prior's checkpoint; arguments as of `encoder_header`."""
    return _header_of(_PRIOR, body_id, weights_prefix, config=config.as_dict())


def save_prior(path: str | Path, prior: MotionPrior, body_id: str) -> None:
    """Write a motion prior, atomically; arguments and errors as of `save_encoder`."""
    _save(path, prior_header(prior.config, body_id, weights_prefix=""), _copied(prior))


def load_prior(path: str | Path) -> tuple[MotionPrior, str]:
    """The motion prior of its own checkpoint or of a decoder's, on the CPU and in evaluation mode, and the id of the
    body it was trained with.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is neither, is damaged, or its weights do not fit its config.
    """
    path = Path(path)
    content = read_checkpoint(path)
    raw = raw_header(path, content, _PRIOR, _DECODER)
    require_fields(path, raw, config=dict, body=str, weights_prefix=str)
    if raw["kind"] == _DECODER:
        prior, prefix = _decoder_config(path, raw).prior, raw["weights_prefix"] + "prior."
        return filled(path, lambda: MotionPrior(prior), prefix), raw["body"]
    try:
        config = MotionVAEConfig(**raw["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: header field 'config': {error}") from error
    return filled(path, lambda: MotionPrior(config), raw["weights_prefix"]), raw["body"]


# ---- the decoder ----------------------------------------------------------------------------------------------------


def decoder_header(config: DiffusionDecoderConfig, body_id: str, encoder: str, weights_prefix: str) -> dict[str, Any]:
    """The header of a decoder's checkpoint.

    Args:
        config: sizes of the network.
        body_id: `BodyModel.id` of the body it was trained with.
        encoder: `encoder_id` of the encoder whose features it was trained on.
        weights_prefix: as of `encoder_header`.
    """
    return _header_of(_DECODER, body_id, weights_prefix, config=config.as_dict(), encoder=encoder)


def save_decoder(path: str | Path, decoder: DiffusionDecoder, body_id: str, encoder: str) -> None:
    """Write a decoder with its motion prior, atomically; arguments as of `decoder_header`, errors of `save_encoder`."""
    _save(path, decoder_header(decoder.config, body_id, encoder, weights_prefix=""), _copied(decoder))


def load_decoder(path: str | Path) -> tuple[DiffusionDecoder, DecoderHeader]:
    """The decoder of a checkpoint, on the CPU and in evaluation mode, and its header.

    The header says which body and which encoder it belongs to: compare with `require_same_encoder` before use.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no decoder of ours, is damaged, or its weights do not fit its config.
    """
    path = Path(path)
    content = read_checkpoint(path)
    raw = raw_header(path, content, _DECODER)
    require_fields(path, raw, config=dict, body=str, encoder=str, weights_prefix=str)
    config = _decoder_config(path, raw)
    header = DecoderHeader(raw["format_version"], config, raw["body"], raw["encoder"], raw["weights_prefix"])
    return filled(path, lambda: DiffusionDecoder(config, header.encoder), header.weights_prefix), header


def decoder_id(decoder: DiffusionDecoder) -> str:
    """What a decoder computes, as 16 hex digits: a hash of its config, its weights and its motion prior's."""
    return _network_id({"config": _changed(decoder.config)}, decoder)


# ---- both together --------------------------------------------------------------------------------------------------


def save_pipeline(path: str | Path, hmr: HMR, decoder: DiffusionDecoder | None, body_id: str) -> None:
    """Write an encoder and its decoder into one file, atomically.

    Args:
        path: file to write; missing folders are made.
        hmr: the encoder.
        decoder: one that was trained on this encoder's features, or None.
        body_id: `BodyModel.id` of the body that both were trained with.

    Raises:
        EncoderMismatchError: the decoder was trained on another encoder's features.
        OSError: as `save_encoder`.
    """
    _save(path, *_pipeline_content(hmr, decoder, body_id))


def load_pipeline_parts(path: str | Path) -> tuple[HMR, DiffusionDecoder | None, str]:
    """Encoder, decoder and body id of a pipeline's file, or of an encoder's checkpoint: then there is no decoder.

    Networks are on the CPU and in evaluation mode.

    Args:
        path: of either; or `ENCODER+DECODER`, the checkpoints of a pair, where there is no file of that whole name.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is of another kind, is damaged, or its weights do not fit its configs.
        BodyMismatchError, EncoderMismatchError: a pair that does not belong together.
    """
    if pair := _pair(str(path)):
        return load_pair(*pair)
    path = Path(path)
    content = read_checkpoint(path)
    raw = raw_header(path, content, _PIPELINE, _ENCODER)
    if raw["kind"] == _ENCODER:
        return load_encoder(path), None, read_header(path).body
    require_fields(path, raw, encoder=dict, body=str, weights_prefix=str)
    prefix = raw["weights_prefix"]
    config, plan = _encoder_structure_of(path, raw["encoder"])
    hmr = _filled_hmr(path, config, plan, prefix + _HMR_PREFIX)
    if raw.get("decoder") is None:
        return hmr, None, raw["body"]
    require_fields(path, raw, decoder=dict)
    decoder_config = _decoder_config(path, raw["decoder"])
    encoder = encoder_id(hmr)
    decoder = filled(path, lambda: DiffusionDecoder(decoder_config, encoder), prefix + _DECODER_PREFIX)
    return hmr, decoder, raw["body"]


def load_pair(encoder: str | Path, decoder: str | Path) -> tuple[HMR, DiffusionDecoder, str]:
    """The networks of an encoder's and a decoder's checkpoint, on the CPU and in evaluation mode, and their body's id.

    Raises:
        FileNotFoundError, CheckpointError: as `load_encoder` and `load_decoder`.
        BodyMismatchError: they were trained with different bodies.
        EncoderMismatchError: the decoder was trained on another encoder's features.
    """
    hmr, body_id = load_encoder(encoder), read_header(encoder).body
    network, header = load_decoder(decoder)
    require_same_body(body_id, header.body, where=str(decoder))
    require_same_encoder(encoder_id(hmr), header.encoder, where=str(decoder))
    return hmr, network, body_id


def networks_of_header(header: Mapping[str, Any], where: str) -> tuple[HMR, DiffusionDecoder | None]:
    """The networks that the header of an encoder or a pipeline describes, with random weights.

    Args:
        header: plain data.
        where: it is from, for messages.

    Raises:
        CheckpointError: it is of another kind or version, or damaged.
    """
    path = Path(where)
    raw = raw_header(path, {HEADER_KEY: dict(header)}, _PIPELINE, _ENCODER)
    require_fields(path, raw, body=str)
    config, plan = _encoder_structure_of(path, raw["encoder"] if raw["kind"] == _PIPELINE else raw)
    hmr = HMR(config)
    hmr.merge_layers(plan)
    decoder = raw.get("decoder")
    return hmr, None if decoder is None else DiffusionDecoder(_decoder_config(path, decoder))


def network_of(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights of any checkpoint of ours, without what training needs besides: the prefix is empty.

    Args:
        path: of the checkpoint; or `ENCODER+DECODER`, which gives those of a pipeline.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint of ours, or is damaged.
        BodyMismatchError, EncoderMismatchError: as `load_pair`.
    """
    if pair := _pair(str(path)):
        return _pipeline_content(*load_pair(*pair))
    path = Path(path)
    content = read_checkpoint(path)
    raw = raw_header(path, content)
    require_fields(path, raw, weights_prefix=str)
    return {**raw, "weights_prefix": ""}, weights_of(path, content, raw["weights_prefix"])


# ---- internals ------------------------------------------------------------------------------------------------------


def _header_of(kind: str, body_id: str, weights_prefix: str, **more: Any) -> dict[str, Any]:
    common = {"format_version": FORMAT_VERSION, "kind": kind, "body": body_id, "weights_prefix": weights_prefix}
    return {**common, **more}


def _save(path: str | Path, header: dict[str, Any], weights: dict[str, Tensor]) -> None:
    write_checkpoint(Path(path), {HEADER_KEY: header, "state_dict": weights})


def _pipeline_content(
    hmr: HMR, decoder: DiffusionDecoder | None, body_id: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights of a pipeline's file; raises EncoderMismatchError."""
    weights = _copied(hmr, _HMR_PREFIX)
    if decoder is not None:
        require_same_encoder(encoder_id(hmr), decoder.encoder, where="the decoder")
        weights |= _copied(decoder, _DECODER_PREFIX)
    header = _header_of(
        _PIPELINE,
        body_id,
        weights_prefix="",
        encoder=_encoder_structure(hmr.config, hmr.merge_plan),
        decoder=None if decoder is None else {"config": decoder.config.as_dict()},
    )
    return header, weights


def _pair(path: str) -> tuple[str, str] | None:
    """The two paths of `ENCODER+DECODER`; None where there is no +, or a file of that whole name.

    Files may have a + in their names: it is the one with a file on both sides of it, or else the first.
    """
    if "+" not in path or _is_there(path):
        return None
    pairs = [(path[:i], path[i + 1 :]) for i, letter in enumerate(path) if letter == "+" and 0 < i < len(path) - 1]
    return next((pair for pair in pairs if all(map(_is_there, pair))), pairs[0] if pairs else None)


def _is_there(path: str) -> bool:
    try:
        return located(path).is_file()
    except FileNotFoundError:
        return False


def _network_id(structure: dict[str, Any], network: nn.Module) -> str:
    sha = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _copied(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Its weights on the CPU; cloned, so that a view of a larger storage does not drag all of it into the file."""
    return {prefix + name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def _encoder_structure(config: HMRConfig, merge_plan: LayerMergePlan) -> dict[str, Any]:
    return {"config": config.as_dict(), "merge_plan": merge_plan.as_dict()["events"]}


def _encoder_structure_of(path: Path, raw: Mapping[str, Any]) -> tuple[HMRConfig, LayerMergePlan]:
    require_fields(path, raw, config=dict, merge_plan=list)
    try:
        config = HMRConfig.from_dict(raw["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: header field 'config': {error}") from error
    try:
        return config, LayerMergePlan.from_dict({"depth": config.vit_depth, "events": raw["merge_plan"]})
    except ValueError as error:
        raise CheckpointError(f"{path}: header field 'merge_plan': {error}") from error


def _read_encoder_header(path: Path, content: Mapping[str, Any]) -> EncoderHeader:
    raw = raw_header(path, content, _ENCODER)
    require_fields(path, raw, body=str, weights_prefix=str)
    config, plan = _encoder_structure_of(path, raw)
    return EncoderHeader(raw["format_version"], config, plan, raw["body"], raw["weights_prefix"])


def _filled_hmr(path: Path, config: HMRConfig, plan: LayerMergePlan, weights_prefix: str) -> HMR:
    def build() -> HMR:
        hmr = HMR(config)
        hmr.merge_layers(plan)
        return hmr

    return filled(path, build, weights_prefix)


def _decoder_config(path: Path, raw: Mapping[str, Any]) -> DiffusionDecoderConfig:
    require_fields(path, raw, config=dict)
    try:
        return DiffusionDecoderConfig.from_dict(raw["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: header field 'config': {error}") from error


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a config, and of configs in it, that do not have their default values."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {f.name: values[f.name] for f in dataclasses.fields(config) if values[f.name] != f.default}
    return {k: _changed(v) if dataclasses.is_dataclass(v) else v for k, v in changed.items()}
