"""Evaluation: what several systems say about the same frames, compared with the truth, sequence by sequence.

A system is an encoder, maybe with a decoder. Every clip goes as a whole through every system: each encoder sees its
frames once, however many systems share it, and a decoder all of its features. Clips are dealt out to the processes of a
job, what was measured is gathered by clip, and everything else is computed from that, on each of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.encoding import EncodedFrames, FrameEncoder, People, Precision, TrueFrames, cut_chunks
from datamodules.samples import middle_window
from fasthmr.body import BodyModel, load_body, require_same_body
from fasthmr.charts import (
    Curves,
    draw_acceleration_over_time,
    draw_accuracy_and_speed,
    draw_error_over_time,
    draw_joint_errors,
)
from fasthmr.checkpoint import decoder_id, encoder_id, load_pair, load_pipeline_parts
from fasthmr.comparison import TRUE_JITTER, SequenceErrors, compare, sequences_csv, tables
from fasthmr.conventions import JOINTS24
from fasthmr.cost import decoder_cost, encoder_call, encoder_cost, interleaved_seconds, timed
from fasthmr.data.batch import ClipBatch
from fasthmr.data.schema import Clip
from fasthmr.data.shards import ClipStore
from fasthmr.files import write_text
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.metrics import PROTOCOLS, PoseErrors, Protocol
from fasthmr.metrics.classes import accelerations
from fasthmr.metrics.functional import acceleration_error
from fasthmr.models.diffusion_decoder import DiffusionDecoder
from fasthmr.models.hmr import HMR
from fasthmr.pipeline import Pipeline, PipelineConfig
from fasthmr.ranks import chosen_device, from_all_ranks, from_first_rank, join
from fasthmr.report import readable, save_figure, short_names
from fasthmr.sequence import SequenceConfig
from fasthmr.side_by_side import PosedMotion, write_side_by_side

TABLE, RESULTS, SEQUENCES, VIDEO = "table.md", "results.json", "sequences.csv", "side_by_side.mp4"
_ALL_TOKENS = "@all_tokens"
#: options that name a clip
_CLIP_OPTIONS = ("show", "video")
#: frames whose meshes are made at a time
_MESHES = 64


# ---- what is compared ------------------------------------------------------------------------------------------------


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
class EvaluationConfig:
    """How systems are evaluated.

    Args:
        protocol: which joints, root and frames count.
        frames_per_clip: so many consecutive frames from the middle of each clip; all if not given.
        max_clips: so many clips, spread evenly over the set; all if not given.
        body: `free`, or a body file in SMPL's format.
        regressor: .npy file of the matrix that the protocol's joints are regressed with, if it has one.
        precision: of the encoders, bf16 (autocast) or 32; all else is computed in float32.
        mask_people: whose tokens are protected: of the `subject`, or of `all`.
        steps: denoising steps of decoders.
        bootstrap: draws of sequences that confidence intervals are made from.
        seed: of these draws.
        show: clip whose errors and jitter are drawn over time: its number among those evaluated, or its key.
        video: clip that is shown side by side in an mp4: its number among those evaluated, or its key.
        speed: measure frames/s.
        batch: frames at a time when speed is measured.
        rounds: measurements of each system.
        workers: processes that decode pictures.
        device: cpu or cuda; the best there is if not given.

    Raises:
        ValueError: a value that cannot be; names it.
    """

    protocol: str = "body-24"
    frames_per_clip: int | None = None
    max_clips: int | None = None
    body: str = "free"
    regressor: str | None = None
    precision: Precision = "bf16"
    mask_people: People = "subject"
    steps: int = 1
    bootstrap: int = 2000
    seed: int = 0
    show: int | str = 0
    video: int | str | None = None
    speed: bool = True
    batch: int = 8
    rounds: int = 5
    workers: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        for name, least in (
            ("frames_per_clip", 1), ("max_clips", 1), ("steps", 1), ("bootstrap", 1), ("batch", 1), ("rounds", 1),
            ("workers", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")


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


# ---- measuring -------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What was measured on one clip.

    Attributes:
        errors: by system.
        curves: if it is the clip that is drawn.
        motions: by system, of all frames of the clip, if it is the clip that is filmed.
    """

    errors: dict[str, SequenceErrors]
    curves: Curves | None
    motions: dict[str, PosedMotion] | None


class _Seen(NamedTuple):
    """What the systems see of a clip: its number and length, the first frame, labels, and chunks of which the first
    `skip` frames come before that."""

    number: int
    frames: int
    start: int
    truth: TrueFrames
    chunks: list[ClipBatch]
    skip: int


class _Clips(Dataset[_Seen]):
    """Labels and crops of clips, for a loader's processes to decode."""

    def __init__(self, store: ClipStore, numbers: Sequence[int], frames_per_clip: int | None) -> None:
        self.store, self.numbers, self.frames_per_clip = store, numbers, frames_per_clip

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> _Seen:
        clip = self.store[self.numbers[index]]
        start, stop = _span(clip, self.frames_per_clip)
        chunks, skip = cut_chunks(clip, start, stop)
        return _Seen(self.numbers[index], len(clip), start, TrueFrames.of(clip).rows(start, stop), chunks, skip)


def _span(clip: Clip, frames: int | None) -> tuple[int, int]:
    """First frame, and last + 1, of those that are evaluated."""
    index = middle_window(len(clip), min(frames or len(clip), len(clip)))
    return int(index[0]), int(index[-1]) + 1


def chosen_clips(store: ClipStore, config: EvaluationConfig) -> list[int]:
    """Numbers of the clips to evaluate: those of a sample spread evenly over the set that have labels.

    Raises:
        ValueError: there is none, or one whose labels belong to a gendered body.
    """
    if not len(store):
        raise ValueError(f"{store.folder} has no clips")
    count = min(config.max_clips or len(store), len(store))
    labelled = []
    for number in np.linspace(0, len(store) - 1, count).round().astype(int).tolist():
        clip = store[number]
        if not TrueFrames.of(clip).rows(*_span(clip, config.frames_per_clip)).valid.any():
            continue
        if clip.gender != "neutral":
            raise ValueError(f"clip {clip.key} has labels of a {clip.gender} body, evaluation knows the neutral one")
        labelled.append(number)
    if not labelled:
        raise ValueError(f"{store.folder} has no pose labels to measure errors with: evaluate on a set that has")
    return labelled


class _Meter:
    """Compares meshes by a protocol."""

    def __init__(self, body: BodyModel, protocol: Protocol, regressor: Tensor | None, device: torch.device) -> None:
        self.body, self.protocol = body, protocol
        self.regressor = None if regressor is None else regressor.to(device)
        self.metric = PoseErrors(protocol, self.regressor).to(device)

    def mesh(self, rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
        """Joints (T, 24, 3) and vertices (T, V, 3), metres, of rotations (T, 24, 3, 3) and betas (T, 10)."""
        parts = [self.body(*part) for part in zip(rotations.split(_MESHES), betas.split(_MESHES), strict=True)]
        return torch.cat([part.joints for part in parts]), torch.cat([part.vertices for part in parts])

    def rooted(self, mesh: tuple[Tensor, Tensor]) -> Tensor:
        """The protocol's joints (T, J, 3), root at the origin."""
        return self.protocol.align(self.protocol.select(*mesh, self.regressor))[0]

    def errors(
        self, mesh: tuple[Tensor, Tensor], true_mesh: tuple[Tensor, Tensor], truth: TrueFrames
    ) -> SequenceErrors:
        """Sums and counts of one sequence."""
        metric, fps = self.metric, float(truth.fps)
        metric.reset()
        (joints, vertices), (true_joints, true_vertices) = ([part[None] for part in m] for m in (mesh, true_mesh))
        metric.update(joints, true_joints, vertices, true_vertices, truth.valid[None], truth.fps[None])
        sums = dict(zip(metric.names, metric.sums.tolist(), strict=True))
        counts = dict(zip(metric.names, metric.counts.tolist(), strict=True))
        joints, true_joints = self.rooted(mesh), self.rooted(true_mesh)
        if self.protocol.accel is not None:
            for name, moving in (("jitter_m_s2", joints), (TRUE_JITTER, true_joints)):
                values = accelerations(moving, torch.zeros_like(moving), truth.valid, fps, self.protocol.accel)
                sums[name], counts[name] = float(values.double().sum()), float(values.numel())
        distance_mm = 1000 * (joints - true_joints)[truth.valid].norm(dim=-1).double().sum(0)
        return SequenceErrors(truth.key, len(truth.valid), int(truth.valid.sum()), sums, counts, distance_mm.tolist())


def _curves(truth: TrueFrames, joints: Mapping[str, Tensor], true_joints: Tensor) -> Curves:
    """Numbers of each frame, of the systems' and the true rooted joints (T, J, 3)."""
    missing = ~truth.valid

    def acceleration(values: Tensor, known: Tensor) -> list[float]:
        lengths = torch.full((len(values),), math.nan, device=values.device)
        if len(values) >= 3:
            lengths[1:-1] = acceleration_error(values, torch.zeros_like(values), float(truth.fps))
            lengths[1:-1][~(known[2:] & known[1:-1] & known[:-2])] = math.nan
        return lengths.tolist()

    def error_mm(values: Tensor) -> list[float]:
        return (1000 * (values - true_joints).norm(dim=-1).mean(-1)).masked_fill(missing, math.nan).tolist()

    return Curves(
        truth.key,
        float(truth.fps),
        {name: error_mm(values) for name, values in joints.items()},
        {name: acceleration(values, torch.ones_like(missing)) for name, values in joints.items()},
        acceleration(true_joints, truth.valid),
    )


def _whole(encoded: EncodedFrames, rotations: Tensor, betas: Tensor, start: int, frames: int) -> PosedMotion:
    """The motion of a clip of so many frames, of which those from `start` on were evaluated."""
    rows = slice(start, start + len(rotations))
    parts = (rotations, betas, encoded.camera, torch.ones(len(rotations), dtype=torch.bool))
    full = []
    for part in parts:
        values = part.new_zeros(frames, *part.shape[1:], device="cpu")
        values[rows] = part.cpu()
        full.append(values)
    return PosedMotion(*full)


@torch.no_grad()
def measure(
    systems: Mapping[str, System],
    store: ClipStore,
    clips: Sequence[int],
    config: EvaluationConfig,
    regressor: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[Measured]:
    """Errors of all systems on all clips, in the clips' order; with several processes, on each of them.

    Args:
        systems: on one device, where their body is as well.
        store: the clips.
        clips: numbers of those to evaluate.
        config: how.
        regressor: (J, V) for protocols that have one.
        rank, world_size: this process measures every `world_size`-th clip.

    Raises:
        ValueError: a system needs masks that a clip does not have, or gives numbers that are not finite; names both.
    """
    some = next(iter(systems.values())).pipeline
    device, body, protocol = some.device, some.body, PROTOCOLS[config.protocol]
    meter = _Meter(body, protocol, regressor, device)
    encoders = {
        system.encoder: FrameEncoder(system.pipeline.hmr, config.mask_people, config.precision)
        for system in systems.values()
    }
    drawn, filmed = (
        _place(store, clips, clip, name) for name, clip in (("show", config.show), ("video", config.video))
    )
    mine = list(clips[rank::world_size])
    loader = DataLoader(
        _Clips(store, mine, config.frames_per_clip),
        batch_size=None,
        num_workers=min(config.workers, len(mine)),
        generator=torch.Generator(),  # or it would advance torch's global generator
    )
    measured: dict[int, Measured] = {}
    for seen in tqdm(loader, unit="clip", desc="evaluating", disable=rank != 0):
        truth, frames = seen.truth.to(device), len(seen.truth.pose)
        true_mesh = meter.mesh(axis_angle_to_matrix(truth.pose), truth.betas.expand(frames, -1))
        outputs = {
            number: encoder(seen.chunks, device).rows(seen.skip, seen.skip + frames)
            for number, encoder in encoders.items()
        }
        errors, joints, motions = {}, {}, {}
        for name, system in systems.items():
            encoded = outputs[system.encoder]
            _require_finite(name, truth.key, *encoded)
            betas = encoded.betas
            if protocol.average_betas:
                betas = betas.mean(0, keepdim=True).expand(frames, -1)
            rotations = system.pipeline.refine(encoded.features, encoded.rotations, betas)
            _require_finite(name, truth.key, rotations)
            mesh = meter.mesh(rotations, betas)
            errors[name] = meter.errors(mesh, true_mesh, truth)
            if seen.number == drawn:
                joints[name] = meter.rooted(mesh)
            if seen.number == filmed:
                motions[name] = _whole(encoded, rotations, betas, seen.start, seen.frames)
        curves = _curves(truth, joints, meter.rooted(true_mesh)) if joints else None
        measured[seen.number] = Measured(errors, curves, motions or None)
    everything = functools.reduce(lambda a, b: a | b, from_all_ranks(measured))
    return [everything[number] for number in clips]


def _place(store: ClipStore, clips: Sequence[int], clip: int | str | None, option: str) -> int | None:
    """Number in the store of a clip that is given by its number among those evaluated, or by its key."""
    if clip is None:
        return None
    keys = [key for key, _ in store.lengths()]
    evaluated = {keys[number]: number for number in clips}
    if isinstance(clip, str) and clip in evaluated:
        return evaluated[clip]
    if isinstance(clip, int) and 0 <= clip < len(clips):
        return clips[clip]
    raise ValueError(
        f"{option} must be the key of a clip that is evaluated, or a number below the {len(clips)} of them, "
        f"got {clip!r}"
    )


def _require_finite(system: str, key: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(f"{system} gave numbers that are not finite in clip {key}: its weights are damaged")


# ---- speed -----------------------------------------------------------------------------------------------------------


def system_speeds(systems: Mapping[str, System], config: EvaluationConfig) -> dict[str, dict[str, float]]:
    """Seconds a frame of every system's encoder and decoder, all measured in turn, and frames/s of both together.

    An encoder is timed on batches of random pictures, in bfloat16 if that is the precision; a decoder on features of as
    many frames as fill one batch of windows, blending and inverse kinematics included.
    """
    calls: dict[str, Callable[[], None]] = {}
    decoded_frames = {}
    for name, system in systems.items():
        pipeline, decoder = system.pipeline, system.pipeline.decoder
        if system.encoder not in calls:
            calls[system.encoder] = encoder_call(pipeline.hmr, config.batch, bf16=config.precision == "bf16")
        if isinstance(decoder, DiffusionDecoder):
            settings = pipeline.config.sequence
            stride = decoder.window - settings.overlap_frames(decoder.window)
            frames = decoded_frames[name] = decoder.window + (settings.batch - 1) * stride
            width = decoder.encoder_dim
            noise = torch.randn(frames, width, generator=torch.Generator().manual_seed(0)).to(pipeline.device)
            features = decoder.feature_mean[:width] + decoder.feature_deviation[:width] * noise
            betas, rotations = features.new_zeros(frames, 10), torch.eye(3).to(features).expand(frames, 24, 3, 3)
            calls[name] = timed(pipeline.refine, features, rotations, betas, device=pipeline.device)
    seconds = interleaved_seconds(calls, config.rounds)
    speeds = {}
    for name, system in systems.items():
        encoder = seconds[system.encoder] / config.batch
        decoder_s = seconds[name] / decoded_frames[name] if name in decoded_frames else 0.0
        speeds[name] = {
            "frames_per_s": 1 / (encoder + decoder_s),
            "encoder_s_per_frame": encoder,
            "decoder_s_per_frame": decoder_s,
        }
    return speeds


def system_cost(system: System, steps: int) -> dict[str, int | float]:
    """Parameters of a system, and multiply-adds of a frame: the encoder's, and the share of a decoder's window."""
    pipeline = system.pipeline
    cost: dict[str, int | float] = dict(encoder_cost(pipeline.hmr.config, pipeline.hmr.merge_plan).as_dict())
    if isinstance(pipeline.decoder, DiffusionDecoder):
        window = pipeline.decoder.window
        settings = pipeline.config.sequence
        stride = window - settings.overlap_frames(window)
        for name, value in decoder_cost(pipeline.decoder.config, steps).items():
            cost[f"decoder_{name}"] = value
            cost[name] += value / stride if name.startswith("macs") else value
        cost |= {"window": window, "stride": stride}
    return cost


# ---- the whole -------------------------------------------------------------------------------------------------------


def evaluate(
    systems: Mapping[str, SystemConfig], data: str, config: EvaluationConfig, out: str | Path
) -> dict[str, Any]:
    """Evaluate systems and write what was found to a folder.

    Of several processes all compute, all return the results, and the first one writes.

    Args:
        systems: by name; the others are compared with the first.
        data: folder of a finished set of shards with pose labels.
        config: how.
        out: folder to write to; docs/evaluate.md lists the files. Others in it stay as they are.

    Returns:
        What is in results.json.

    Raises:
        ValueError: bad input; nothing was written.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"results are written to a folder, and {out} is a file: choose another name")
    device = chosen_device(config.device)
    body = load_body(config.body)
    regressor = _regressor(config, body)
    store = ClipStore(data)
    store.require_body(body.id)
    clips = chosen_clips(store, config)
    for option in _CLIP_OPTIONS:
        _place(store, clips, getattr(config, option), option)  # refuses before anything is computed
    settings = PipelineConfig(
        precision=config.precision, mask_people=config.mask_people, sequence=SequenceConfig(steps=config.steps)
    )
    rank, world_size = join(device)
    loaded = load_systems(systems, body.to(device), settings, device)
    measured = measure(loaded, store, clips, config, regressor, rank, world_size)
    speeds = from_first_rank(system_speeds(loaded, config) if config.speed and rank == 0 else None)
    errors = {name: [one.errors[name] for one in measured] for name in loaded}
    compared = compare(errors, config.bootstrap, config.seed)
    results = {
        "protocol": {"name": config.protocol, "description": PROTOCOLS[config.protocol].describe()},
        "data": _described(store, clips, config, errors),
        "body": body.id,
        "config": dict(vars(config)),
        "machine": _machine(device),
        "processes": world_size,
        "systems": [
            {
                "name": name,
                "checkpoint": str(system.config),
                "encoder": system.encoder,
                "decoder": system.decoder,
                "cost": system_cost(system, config.steps),
                "frames_per_s": None if speeds is None else speeds[name]["frames_per_s"],
                "speed": None if speeds is None else speeds[name],
                **compared[name],
            }
            for name, system in loaded.items()
        ],
    }
    results = _without_nan(results)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        _write(out, results, errors, measured, store, clips, body)
    return results


def describe(results: Mapping[str, Any]) -> str:
    """table.md: protocol and data on top, the tables, and what their numbers are."""
    config, data, machine, systems = (results[key] for key in ("config", "data", "machine", "systems"))
    which = "all frames" if config["frames_per_clip"] is None else f"up to {config['frames_per_clip']} from the middle"
    lines = [
        f"Protocol {results['protocol']['description']}.",
        f"Data: {data['folder']} ({data['id']}), {data['sequences']} of {data['manifest']['clips']} clips, {which}: "
        f"{data['frames']} frames, {data['labelled']} of them with labels. Body: {results['body']}.",
        f"Encoders in {config['precision']} on {machine['device']} ({machine['name']}), decoders in "
        f"{_counted(config['steps'], 'step')} of float32; {_counted(results['processes'], 'process', 'processes')}.",
    ]
    notes = [
        f"Intervals: {config['bootstrap']} draws of sequences with replacement (seed {config['seed']}), each pooled "
        "over frames; of differences with the same draws for both. `-`: there is no such number."
    ]
    truth = systems[0]["errors"].get(TRUE_JITTER)
    if truth is not None and truth["value"] is not None:
        mean = f"{truth['value']:.2f} m/s²"
        notes.append(f"Jitter: mean acceleration of the joints, root removed; that of the ground truth is {mean}.")
    notes.append("Parameters, and multiply-adds a frame, as `thop` counts them (FastHMR, Tab. 12): none for attention.")
    for system in systems:
        if "window" in (cost := system["cost"]):
            notes.append(
                f"{system['name']}: {readable(cost['decoder_macs_thop'] / 1e9)} G are its decoder's for a window of "
                f"{cost['window']} frames, which takes it {cost['stride']} frames further."
            )
    if systems[0]["speed"] is not None:
        notes.append(
            f"Frames/s: encoder in batches of {config['batch']} and decoder, without reading pictures; medians of "
            f"{config['rounds']} rounds in which all were measured in turn, {_counted(machine['threads'], 'thread')}."
        )
    return "\n".join([*lines, "", tables(systems), *(f"- {note}" for note in notes), ""])


def _write(
    out: Path,
    results: Mapping[str, Any],
    errors: Mapping[str, Sequence[SequenceErrors]],
    measured: Sequence[Measured],
    store: ClipStore,
    clips: Sequence[int],
    body: BodyModel,
) -> None:
    """Every file whole; of those that an earlier evaluation wrote here, none stays beside this one's."""
    systems = results["systems"]
    (curves,) = (one.curves for one in measured if one.curves is not None)
    protocol = PROTOCOLS[results["protocol"]["name"]]
    joints = [JOINTS24[i] if protocol.regressor is None else f"joint {i}" for i in protocol.subset]
    figures = {
        "joints.png": draw_joint_errors(systems, joints),
        "error_over_time.png": draw_error_over_time(curves),
        "jitter_over_time.png": draw_acceleration_over_time(curves),
        "accuracy_and_speed.png": draw_accuracy_and_speed(systems) if systems[0]["speed"] is not None else None,
    }
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, out / name)
        else:
            (out / name).unlink(missing_ok=True)
    (out / VIDEO).unlink(missing_ok=True)
    for number, one in zip(clips, measured, strict=True):
        if one.motions is not None:
            write_side_by_side(out / VIDEO, store[number], one.motions, body)
    write_text(out / SEQUENCES, sequences_csv(errors))
    write_text(out / TABLE, describe(results))
    write_text(out / RESULTS, json.dumps(results, indent=1))


def _regressor(config: EvaluationConfig, body: BodyModel) -> Tensor | None:
    """The matrix of the protocol, if it has one."""
    matrix = None
    if config.regressor is not None:
        try:
            matrix = torch.from_numpy(np.load(config.regressor, allow_pickle=False).astype(np.float32))
        except (ValueError, AttributeError, EOFError) as error:
            raise ValueError(f"regressor {config.regressor} is no .npy file of numbers: {error}") from error
    protocol = PROTOCOLS[config.protocol]
    if matrix is not None or protocol.regressor is not None:
        protocol.require_regressor(matrix, body.num_vertices)
    return matrix


def _described(
    store: ClipStore, clips: Sequence[int], config: EvaluationConfig, errors: Mapping[str, Sequence[SequenceErrors]]
) -> dict[str, Any]:
    manifest = vars(store.manifest)
    shards = json.dumps(manifest["shards"], sort_keys=True)
    some = next(iter(errors.values()))
    return {
        "folder": str(store.folder),
        "id": hashlib.sha256(shards.encode()).hexdigest()[:16],
        "sequences": len(clips),
        "frames": sum(one.frames for one in some),
        "labelled": sum(one.labelled for one in some),
        "manifest": manifest,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (cpus := Path("/proc/cpuinfo")).exists():
        models = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    threads, cores = torch.get_num_threads(), os.cpu_count()
    return {"device": device.type, "name": name, "cores": cores, "threads": threads, "torch": torch.__version__}


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _without_nan(value: Any) -> Any:
    """The same with None for what is no number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
