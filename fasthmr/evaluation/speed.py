"""What systems cost, and how fast they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fasthmr.cost import decoder_cost, encoder_call, encoder_cost, interleaved_seconds, timed
from fasthmr.evaluation.config import EvaluationConfig
from fasthmr.evaluation.systems import System
from fasthmr.models.diffusion_decoder import DiffusionDecoder


def system_speeds(systems: Mapping[str, System], config: EvaluationConfig) -> dict[str, dict[str, float]]:
    """Seconds a frame of every system's encoder and decoder, all measured in turn, and frames/s of both together.

    An encoder is timed on batches of random pictures, in the configured precision; a decoder on features of as
    many frames as fill one batch of windows, blending and inverse kinematics included.
    """
    calls: dict[str, Callable[[], None]] = {}
    decoded_frames = {}
    for name, system in systems.items():
        pipeline, decoder = system.pipeline, system.pipeline.decoder
        if system.encoder not in calls:
            calls[system.encoder] = encoder_call(pipeline.hmr, config.batch, config.precision)
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
