"""Errors of systems on clips: each encoder sees a clip's frames once, meshes are made and compared by a protocol."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from datamodules.encoding import EncodedFrames, FrameEncoder, TrueFrames
from fasthmr.body import BodyModel
from fasthmr.charts import Curves
from fasthmr.comparison import TRUE_JITTER, SequenceErrors
from fasthmr.data.schema import Gender
from fasthmr.evaluation.clips import EvaluatedClips
from fasthmr.evaluation.config import EvaluationConfig
from fasthmr.evaluation.systems import System
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.metrics import PROTOCOLS, PoseErrors, Protocol
from fasthmr.metrics.classes import accelerations
from fasthmr.metrics.functional import acceleration_error
from fasthmr.precision import chosen_precision
from fasthmr.ranks import from_all_ranks
from fasthmr.side_by_side import PosedMotion

#: frames whose meshes are made at a time
_MESHES = 64


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


@torch.no_grad()
def measure(
    systems: Mapping[str, System],
    clips: EvaluatedClips,
    bodies: Mapping[Gender, BodyModel],
    config: EvaluationConfig,
    regressor: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[Measured]:
    """Errors of all systems on all clips, in the clips' order; with several processes, on each of them.

    Args:
        systems: on one device.
        clips: those to evaluate.
        bodies: of predictions ("neutral"), and of every clip's labels; on the systems' device.
        config: how.
        regressor: (J, V) for protocols that have one.
        rank, world_size: this process measures every `world_size`-th clip.

    Raises:
        ValueError: a system needs masks that a clip does not have, or gives numbers that are not finite; names both.
    """
    device, protocol = next(iter(systems.values())).pipeline.device, PROTOCOLS[config.protocol]
    meter = _Meter(protocol, regressor, device)
    encoders = {
        system.encoder: FrameEncoder(
            system.pipeline.hmr, config.mask_people, chosen_precision(config.precision, device)
        )
        for system in systems.values()
    }
    drawn, filmed = clips.find("show", config.show), clips.find("video", config.video)
    mine = range(rank, len(clips), world_size)
    loader = DataLoader(
        Subset(clips, mine),
        batch_size=None,
        num_workers=min(config.workers, len(mine)),
        generator=torch.Generator(),  # or it would advance torch's global generator
    )
    measured: dict[int, Measured] = {}
    for number, seen in zip(mine, tqdm(loader, unit="clip", desc="evaluating", disable=rank != 0), strict=True):
        truth, frames = seen.truth.to(device), len(seen.truth.pose)
        true_mesh = meter.posed(bodies[seen.gender], axis_angle_to_matrix(truth.pose), truth.betas.expand(frames, -1))
        outputs = {
            encoder_id: encoder(seen.chunks, device).rows(seen.skip, seen.skip + frames)
            for encoder_id, encoder in encoders.items()
        }
        errors, rooted, motions = {}, {}, {}
        for name, system in systems.items():
            encoded = outputs[system.encoder]
            _require_finite(name, truth.key, *encoded)
            betas = protocol.clip_betas(encoded.betas, truth.valid)
            rotations = system.pipeline.refine(encoded.features, encoded.rotations, betas)
            _require_finite(name, truth.key, rotations)
            mesh = meter.posed(bodies["neutral"], rotations, betas)
            errors[name] = meter.errors(mesh, true_mesh, truth)
            if number == drawn:
                rooted[name] = mesh.rooted
            if number == filmed:
                motion = _whole(encoded, rotations, betas, seen.start, seen.frames)
                motions[name] = replace(motion, full_image=system.pipeline.hmr.config.full_image)
        curves = _curves(truth, rooted, true_mesh.rooted) if rooted else None
        measured[number] = Measured(errors, curves, motions or None)
    everything = functools.reduce(lambda a, b: a | b, from_all_ranks(measured))
    return [everything[number] for number in range(len(clips))]


class _Posed(NamedTuple):
    """A body in T poses, metres: its joints (T, 24, 3) and vertices (T, V, 3), and the protocol's joints (T, J, 3) with
    the root at the origin."""

    joints: Tensor
    vertices: Tensor
    rooted: Tensor


class _Meter:
    """Makes meshes and compares them by a protocol."""

    def __init__(self, protocol: Protocol, regressor: Tensor | None, device: torch.device) -> None:
        self.protocol = protocol
        self.regressor = None if regressor is None else regressor.to(device)
        self.metric = PoseErrors(protocol, self.regressor).to(device)

    def posed(self, body: BodyModel, rotations: Tensor, betas: Tensor) -> _Posed:
        """A body in rotations (T, 24, 3, 3) with betas (T, 10)."""
        parts = [body(*part) for part in zip(rotations.split(_MESHES), betas.split(_MESHES), strict=True)]
        joints, vertices = torch.cat([part.joints for part in parts]), torch.cat([part.vertices for part in parts])
        return _Posed(joints, vertices, self.protocol.align(self.protocol.select(joints, vertices, self.regressor))[0])

    def errors(self, mesh: _Posed, true_mesh: _Posed, truth: TrueFrames) -> SequenceErrors:
        """Sums and counts of one sequence."""
        metric, fps = self.metric, float(truth.fps)
        metric.reset()
        metric.update(
            mesh.joints[None], true_mesh.joints[None], mesh.vertices[None], true_mesh.vertices[None],
            truth.valid[None], truth.fps[None],
        )  # fmt: skip
        sums = dict(zip(metric.names, metric.sums.tolist(), strict=True))
        counts = dict(zip(metric.names, metric.counts.tolist(), strict=True))
        if self.protocol.accel is not None:
            for name, moving in (("jitter_m_s2", mesh.rooted), (TRUE_JITTER, true_mesh.rooted)):
                values = accelerations(moving, torch.zeros_like(moving), truth.valid, fps, self.protocol.accel)
                sums[name], counts[name] = float(values.double().sum()), float(values.numel())
        distance_mm = 1000 * (mesh.rooted - true_mesh.rooted)[truth.valid].norm(dim=-1).double().sum(0)
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


def _require_finite(system: str, key: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(f"{system} gave numbers that are not finite in clip {key}: its weights are damaged")
