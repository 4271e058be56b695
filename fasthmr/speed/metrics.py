"""How fast errors are computed: frames/s of meshes that are compared by a protocol, and of making a mesh."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from fasthmr.body import load_body
from fasthmr.cost import interleaved_seconds, timed
from fasthmr.metrics import PROTOCOLS, PoseErrors

#: of SMPL
_VERTICES = 6890


def metrics_frames_per_second(frames: int = 256, rounds: int = 5) -> dict[str, float]:
    """Frames/s on the CPU, all measured in turn, medians.

    Args:
        frames: of the sequence whose errors are computed.
        rounds: measurements of each.

    Returns:
        By what is done: for each protocol, all errors of meshes of 6,890 vertices that are there, regressing joints
        included; and a mesh of the body in this package, of which every frame of an evaluation takes one for each
        system and one for the truth.

    Raises:
        ValueError: a number below 1.
    """
    if frames < 1:
        raise ValueError(f"frames must be 1 or more, got {frames}")
    noise = torch.Generator().manual_seed(0)
    joints, other_joints = torch.randn(2, 1, frames, 24, 3, generator=noise)
    vertices, other_vertices = torch.randn(2, 1, frames, _VERTICES, 3, generator=noise)
    valid, fps = torch.ones(1, frames, dtype=torch.bool), torch.tensor([30.0])
    calls = {}
    for protocol in PROTOCOLS.values():
        wanted = protocol.regressor
        regressor = None if wanted is None else torch.rand(wanted.num_joints, _VERTICES, generator=noise)
        metric = PoseErrors(protocol, regressor)
        calls[protocol.name] = timed(
            metric.update, joints, other_joints, vertices, other_vertices, valid, fps, device=torch.device("cpu")
        )
    body = load_body()
    rotations, betas = torch.eye(3).expand(frames, 24, 3, 3), torch.randn(frames, 10, generator=noise)
    calls["mesh of the free body"] = timed(body, rotations, betas, device=torch.device("cpu"))
    return {name: frames / seconds for name, seconds in interleaved_seconds(calls, rounds).items()}


def print_metrics(frames: int, rounds: int) -> None:
    """Print them as measured on one core.

    Raises:
        ValueError: a number below 1.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speeds = metrics_frames_per_second(frames, rounds)
    finally:
        torch.set_num_threads(threads)
    table = Table(title=f"{frames} frames, 1 core, medians of {rounds} measured in turn")
    table.add_column("errors by protocol")
    table.add_column("frames/s", justify="right")
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:.0f}")
    Console().print(table)
