"""Systems that are compared: how they are named on a command line, and their networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fasthmr.body import BodyModel, require_same_body
from fasthmr.checkpoint import decoder_id, encoder_id, load_pair, load_pipeline_parts
from fasthmr.models.hmr import HMR
from fasthmr.pipeline import Pipeline, PipelineConfig
from fasthmr.report import short_names

_ALL_TOKENS = "@all_tokens"


@dataclass(frozen=True)
class SystemConfig:
    """One row of the table.

    Args:
        encoder: checkpoint of an encoder or of a pipeline; or ENCODER+DECODER.
        decoder: checkpoint of a decoder that was trained on this encoder's features; none: the encoder's own poses.
        tokens: `merged` as the encoder merges them, or `all` of them.
    """

    encoder: str
    decoder: str | None = None
    tokens: Literal["merged", "all"] = "merged"

    def __str__(self) -> str:
        pair = self.encoder if self.decoder is None else f"{self.encoder}+{self.decoder}"
        return pair + (_ALL_TOKENS if self.tokens == "all" else "")


@dataclass(frozen=True)
class System:
    """A system that is loaded.

    Attributes:
        config: what it was asked for as.
        pipeline: its networks; encoders that are the same are one object.
        encoder: `encoder_id`.
        decoder: `decoder_id`, or None.
    """

    config: SystemConfig
    pipeline: Pipeline
    encoder: str
    decoder: str | None


def parse_systems(texts: Sequence[str]) -> dict[str, SystemConfig]:
    """Systems by name, of `[NAME=]CHECKPOINT[@all_tokens]`; without a name, the checkpoint's last parts are it.

    Raises:
        ValueError: two of one name.
    """
    named: list[tuple[str, SystemConfig]] = []
    for text in texts:
        checkpoint = text.removesuffix(_ALL_TOKENS)
        name, equals, rest = checkpoint.partition("=")
        if not equals or "/" in name or Path(checkpoint.partition("+")[0]).is_file():  # as in epoch=3.ckpt
            name, rest = "", checkpoint
        named.append((name, SystemConfig(rest, tokens="merged" if checkpoint == text else "all")))
    paths = list(dict.fromkeys(config.encoder for name, config in named if not name))
    short = dict(zip(paths, short_names(paths), strict=True)) if paths else {}
    systems: dict[str, SystemConfig] = {}
    for name, config in named:
        name = name or short[config.encoder] + (", all tokens" if config.tokens == "all" else "")
        if name in systems:
            raise ValueError(f"two systems are called {name!r}: give them names, NAME=CHECKPOINT")
        systems[name] = config
    return systems


def load_systems(
    systems: Mapping[str, SystemConfig], body: BodyModel, config: PipelineConfig, device: torch.device
) -> dict[str, System]:
    """The networks of systems, on `device`; `body` must be there.

    Raises:
        FileNotFoundError, CheckpointError: as `fasthmr.checkpoint.load_pipeline_parts`.
        BodyMismatchError, EncoderMismatchError: one of another body, or a decoder of another encoder.
        ValueError: no system, or one with a decoder is to see all tokens.
    """
    if not systems:
        raise ValueError("there is no system to evaluate: give at least one checkpoint")
    encoders: dict[str, HMR] = {}
    loaded = {}
    for name, system in systems.items():
        if system.decoder is None:
            hmr, decoder, body_id = load_pipeline_parts(system.encoder)
        else:
            hmr, decoder, body_id = load_pair(system.encoder, system.decoder)
        require_same_body(body.id, body_id, where=str(system))
        if system.tokens == "all":
            if decoder is not None:
                raise ValueError(
                    f"{name}: a decoder takes the features that it was trained on, which are those of merged tokens: "
                    f"evaluate the encoder alone with {_ALL_TOKENS}"
                )
            hmr.set_token_merging(None)
        number = encoder_id(hmr)
        pipeline = Pipeline(encoders.setdefault(number, hmr), decoder, body, config).to(device)
        loaded[name] = System(system, pipeline, number, None if decoder is None else decoder_id(decoder))
    return loaded
