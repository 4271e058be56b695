"""What an encoder costs: parameters, multiply-adds in two conventions, and frames/s on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fasthmr.conventions import CROP_PX
from fasthmr.merging import LayerMergePlan, MergedTokens, merge_tokens
from fasthmr.models.hmr import HMR, HMRConfig, middle_columns

#: what thop counts for an element that goes through a LayerNorm
_THOP_NORM_MACS = 4


@dataclass(frozen=True)
class EncoderCost:
    """Cost of one frame.

    Attributes:
        layers: of the backbone, after merging.
        tokens: that the head reads, after merging.
        params: all parameters of the network.
        params_thop: as the `thop` package counts: parameters of layers that are called, so without positions.
        macs_thop: multiply-adds as `thop` counts: linear layers and convolutions, 4 for each element of a LayerNorm,
            none for attention. This is FastHMR's Tab. 12.
        macs_all: multiply-adds of every matrix product, those of attention and of token merging included.
    """

    layers: int
    tokens: int
    params: int
    params_thop: int
    macs_thop: int
    macs_all: int

    def as_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def encoder_cost(config: HMRConfig, plan: LayerMergePlan | None = None) -> EncoderCost:
    """Cost of an encoder of these sizes under a plan; nothing is allocated or computed.

    A worked number: HMR2.0's size has 670.21 M parameters and 122.59 G multiply-adds (thop).

    Raises:
        ValueError: the plan is for another depth, or leaves too few layers for token merging.
    """
    params_thop = macs_thop = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal params_thop, macs_thop
        params_thop += sum(p.numel() for p in module.parameters())
        if isinstance(module, nn.Linear):
            macs_thop += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            macs_thop += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.LayerNorm):
            macs_thop += _THOP_NORM_MACS * output.numel()

    with torch.device("meta"):
        hmr = HMR(config).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        hmr.to_empty(device="cpu")
        hmr.merge_layers(plan if plan is not None else hmr.merge_plan)
        for module in hmr.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
                module.register_forward_hook(count)
        mask = torch.zeros(1, CROP_PX, CROP_PX, dtype=torch.bool)
        # The counter does not know the fused attention of CPUs; spelled out, its products are counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            output = hmr(torch.zeros(1, 3, CROP_PX, CROP_PX), mask)
        return EncoderCost(
            layers=len(hmr.backbone.blocks),
            tokens=output.tokens.shape[1],
            params=sum(p.numel() for p in hmr.parameters()),
            params_thop=params_thop,
            macs_thop=macs_thop,
            macs_all=flops.get_total_flops() // 2,
        )


def interleaved_seconds(systems: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each system's call, all of them measured in turn, round after round, so that a machine that
    slows down slows down all; the first call of each warms up and is not counted."""
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for call in systems.values():
        call()
    for _ in range(rounds):
        for name, call in systems.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def frames_per_second(
    encoders: Mapping[str, HMR], batch: int, rounds: int = 5, bf16: bool = True, compiled: bool = False
) -> dict[str, float]:
    """Frames/s of encoders on the device that they are on, measured in turn, medians.

    Args:
        encoders: by name; all on one device. Masks, where they are needed, are of a person that fills a third.
        batch: frames at a time.
        rounds: measurements of each.
        bf16: with weights and images in bfloat16 (a copy; read-outs stay in float32), as one would run them.
        compiled: by torch.compile, whose time is not counted.

    Raises:
        ValueError: `batch` or `rounds` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    device = next(iter(encoders.values())).smpl_head.init_cam.device
    images, mask = _someone(batch, device)
    if bf16:
        encoders, images = {name: in_bf16(hmr) for name, hmr in encoders.items()}, images.bfloat16()
    if compiled:
        torch.compiler.reset()  # so that no shape of an earlier measurement makes these dynamic
    calls = {name: _timed(hmr, images, mask, device=device, compiled=compiled) for name, hmr in encoders.items()}
    seconds = interleaved_seconds(calls, rounds)
    return {name: batch / value for name, value in seconds.items()}


def merging_share(hmr: HMR, batch: int, rounds: int = 5, compiled: bool = False) -> float:
    """What share of the time of the first layer goes into choosing and merging its tokens (bf16).

    Raises:
        ValueError: the encoder merges no tokens, or `batch` or `rounds` is below 1.
    """
    settings = hmr.config.token_merging
    if settings is None:
        raise ValueError("this encoder merges no tokens")
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    hmr = in_bf16(hmr)
    device = hmr.smpl_head.init_cam.device
    images, mask = _someone(batch, device)
    with torch.inference_mode():
        tokens = hmr.backbone.embed(middle_columns(images).bfloat16())
        state = MergedTokens.start(tokens, hmr.person_tokens(mask))
    block, merged = hmr.backbone.layers[0], hmr.backbone.tokens_merged(len(hmr.backbone.blocks))[0]
    keys = tokens.unflatten(-1, (hmr.config.vit_heads, -1)).mean(2)
    sizes = (state.sizes, settings.average, state.slots)
    calls = {
        "block": _timed(block.forward_merging, state, merged, settings, device=device, compiled=compiled),
        "merging": _timed(
            merge_tokens, tokens, keys, state.is_person, merged, *sizes, device=device, compiled=compiled
        ),
    }
    seconds = interleaved_seconds(calls, rounds)
    return seconds["merging"] / seconds["block"]


def _timed(
    function: Callable[..., object], *arguments: object, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """A call as it is timed: without gradients, until the device is done."""
    if compiled:
        function = torch.compile(function, dynamic=False)

    @torch.inference_mode()
    def call() -> None:
        function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def in_bf16(hmr: HMR) -> HMR:
    """A copy that computes in bfloat16, but for the read-outs, which stay in float32."""
    copied = copy.deepcopy(hmr)
    copied.backbone.bfloat16()
    head = copied.smpl_head
    head.layers.bfloat16()
    head.token_embed.bfloat16()
    head.token_pos.data = head.token_pos.data.bfloat16()
    return copied


def _someone(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images, and masks of a person that fills a third."""
    images = torch.randn(batch, 3, CROP_PX, CROP_PX, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.zeros(batch, CROP_PX, CROP_PX, dtype=torch.bool, device=device)
    mask[:, 16:240, 80:176] = True
    return images, mask
