"""How fast motion prior and diffusion decoder are: sampling, inverse kinematics, training; and training's memory."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fasthmr.body import decode_pose, encode_pose, load_body
from fasthmr.checkpoint import load_decoder, load_encoder
from fasthmr.cost import encoder_call, interleaved_seconds, timed
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.hmr import HMR
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.precision import IN_WORDS, autocast, chosen_precision
from fasthmr.speed.encoders import SIZES, three_versions
from fasthmr.speed.memory import peak_memory

#: KL weight of the prior's training; its value costs no time
_KL_WEIGHT = 1e-4
#: frames of a batch of the encoder that the decoder is compared with
_ENCODER_BATCH = 8


def decoder_of(size: str) -> DiffusionDecoder:
    """`paper`: the sizes of FastHMR's Tab. 13 to 15 with random weights; `tiny`: the shipped one."""
    if size == "paper":
        return DiffusionDecoder(DiffusionDecoderConfig()).eval()
    return load_decoder("shipped:decoder_tiny")[0]


def encoder_of(size: str) -> HMR:
    """What belongs to it: 28 layers and Mask-ToMe at HMR2.0's size with random weights; or the shipped one."""
    if size == "paper":
        *_, fewest = three_versions(SIZES["hmr2"], merged=4).values()
        return fewest
    return load_encoder("shipped:encoder_tiny")


def print_decoder(size: str, windows: list[int], training_windows: int, rounds: int) -> None:
    """Print what a decoder takes beside its encoder, and how fast it and its prior train.

    All of sampling is measured in turn, in float32 as the pipeline does it; the encoder, and training with AdamW,
    in bf16 where the device has instructions for it. Each training has a process of its own; memory is that process' at
    most, on a GPU what torch has taken of it.

    Args:
        size: `paper` or `tiny`.
        windows: batch sizes, windows at a time.
        training_windows: windows of a training step.
        rounds: measurements of each.

    Raises:
        ValueError: a number below 1.
    """
    for name, values in (("--windows", windows), ("--training_windows", [training_windows]), ("--rounds", [rounds])):
        if min(values) < 1:
            raise ValueError(f"{name} must be 1 or more, got {min(values)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder_of(size).to(device)
    where = f"{device.type}, {torch.get_num_threads()} threads, medians of {rounds}"
    frames = decoder_of(size).window
    calls, of_frames = {"encoder": encoder_call(encoder, _ENCODER_BATCH)}, {"encoder": _ENCODER_BATCH}
    for count in windows:
        for name, call in sampling_calls(decoder_of(size), count, device).items():
            calls[f"{name}, {count}"], of_frames[f"{name}, {count}"] = call, count * frames
    seconds = interleaved_seconds(calls, rounds)
    per_frame = {name: value / of_frames[name] for name, value in seconds.items()}
    table = Table(title=f"one denoising step, windows of {frames} frames; {where}, in turn")
    for name in ("what", "at a time", "frames/s", "share of encoder and decoder"):
        table.add_column(name, justify="left" if name == "what" else "right")
    precision = IN_WORDS[chosen_precision("auto", device)]
    table.add_row(f"encoder, {precision}", f"{_ENCODER_BATCH} frames", f"{1 / per_frame['encoder']:.1f}", "")
    for count in windows:
        parts = {name: per_frame[f"{name}, {count}"] for name in ("diffusion", "inverse kinematics")}
        for name, value in (*parts.items(), ("both", sum(parts.values()))):
            whole = per_frame["encoder"] + sum(parts.values())
            table.add_row(name, f"{count} windows", f"{1 / value:.0f}", f"{value / whole:.1%}")
    Console().print(table)

    table = Table(title=f"training, {training_windows} windows a step; {where}")
    for name in ("what", "windows/s", "frames/s", "memory, GB"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name, kind in (("motion prior", "prior"), ("decoder", "decoder")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            value, memory = pool.apply(_measured_training, (kind, size, training_windows, rounds, str(device)))
        rate = training_windows / value
        table.add_row(name, f"{rate:.1f}", f"{rate * frames:.0f}", f"{memory / 1e9:.2f}")
    Console().print(table)


def sampling_calls(decoder: DiffusionDecoder, windows: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Calls to be timed: `diffusion`, features of windows to poses; `inverse kinematics`, poses to rotations."""
    decoder, body = decoder.to(device).eval(), load_body().to(device)
    rotations, betas = _someone_moving(windows, decoder.window, device)
    features = torch.randn(windows, decoder.window, decoder.encoder_dim, device=device)
    poses = encode_pose(rotations, betas, body, decoder.representation)

    def sample() -> Tensor:
        return decoder(decoder.conditions(features, rotations, betas, body))

    turn = functools.partial(decode_pose, poses, betas, body, decoder.representation)
    return {"diffusion": timed(sample, device=device), "inverse kinematics": timed(turn, device=device)}


def training_call(kind: str, decoder: DiffusionDecoder, windows: int, device: torch.device) -> Callable[[], None]:
    """A training step of the prior or of the decoder on one batch, to be timed."""
    decoder, body = decoder.to(device), load_body().to(device)
    rotations, betas = _someone_moving(windows, decoder.window, device)
    poses = encode_pose(rotations, betas, body, decoder.representation)
    features = torch.randn(windows, decoder.window, decoder.encoder_dim, device=device)
    read = decoder.conditions(features, rotations, betas, body)
    trained: nn.Module = MotionPrior(decoder.config.prior).to(device) if kind == "prior" else decoder.denoiser
    optimizer = torch.optim.AdamW(trained.train().parameters())

    def loss() -> Tensor:
        if not isinstance(trained, MotionPrior):
            return decoder.loss(read, poses)
        latent = trained.encode(poses)
        error = trained.vae.decode(latent.sample(), decoder.window) - trained.normalise(poses)
        return error.square().mean() + _KL_WEIGHT * latent.kl()

    def step() -> None:
        with autocast("auto", device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        value.item()  # waits for the device

    return step


def _measured_training(kind: str, size: str, windows: int, rounds: int, device: str) -> tuple[float, int]:
    """Seconds of a step, and bytes of memory at most; in a process of its own."""
    step = training_call(kind, decoder_of(size), windows, torch.device(device))
    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    return sorted(times)[len(times) // 2], memory


def _someone_moving(windows: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotations (windows, frames, 24, 3, 3) and betas (windows, frames, 10) of no particular motion."""
    generator = torch.Generator().manual_seed(0)
    poses = 0.3 * torch.randn(windows, frames, 24, 3, generator=generator)
    return axis_angle_to_matrix(poses).to(device), torch.zeros(windows, frames, 10, device=device)
