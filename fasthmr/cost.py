"""What encoders and decoders cost: parameters, multiply-adds in two conventions, and frames/s on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fasthmr.conventions import CROP_PX
from fasthmr.merging import LayerMergePlan, MergedTokens, merge_tokens
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.hmr import HMR, HMRConfig, HMROutput, middle_columns
from fasthmr.models.human_fov import FOV_INPUT_PX, HumanFoV
from fasthmr.precision import PrecisionChoice, chosen_precision

#: what thop counts for an element that goes through a LayerNorm or a BatchNorm
_THOP_NORM_MACS = 4
_COUNTED = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.Upsample, nn.MultiheadAttention)

_Net = TypeVar("_Net", bound=nn.Module)
_Output = TypeVar("_Output")


@dataclass(frozen=True)
class EncoderCost:
    """Cost of one frame.

    Attributes:
        layers: of the backbone, after merging.
        tokens: that the head reads, after merging.
        params: all parameters of the network.
        params_thop: as the `thop` package counts: parameters of layers that are called, so without positions.
        macs_thop: multiply-adds as `thop` counts: linear layers and convolutions, 4 for each element of a norm, 1 for
            each of a map that is enlarged by repetition, none for attention. This is FastHMR's Tab. 12, where CameraHMR
            includes its network for the intrinsics.
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

    def build() -> HMR:
        hmr = HMR(config)
        hmr.merge_layers(plan if plan is not None else hmr.merge_plan)
        return hmr

    def run(hmr: HMR) -> HMROutput:
        mask = torch.zeros(1, CROP_PX, CROP_PX, dtype=torch.bool)
        return hmr(torch.zeros(1, 3, CROP_PX, CROP_PX), mask, torch.zeros(1, 3))

    hmr, output, counted = _counted(build, run)
    return EncoderCost(layers=len(hmr.backbone.blocks), tokens=output.tokens.shape[1], **counted)


def fov_cost() -> dict[str, int]:
    """Cost of CameraHMR's network for the intrinsics, for one picture: `params`, `params_thop`, `macs_thop` and
    `macs_all` as of `EncoderCost`."""

    def run(fov: HumanFoV) -> Tensor:
        return fov(torch.zeros(1, 3, FOV_INPUT_PX, FOV_INPUT_PX))

    return _counted(HumanFoV, run)[2]


def decoder_cost(config: DiffusionDecoderConfig, steps: int = 1) -> dict[str, int]:
    """Cost of a decoder for one window in so many denoising steps, counts as of `fov_cost`.

    A worked number: with five layers in each transformer, the paper's sizes have 6.79 G multiply-adds (thop) for a
    window of 243 frames, which is FastHMR's Tab. 12.
    """

    def run(decoder: DiffusionDecoder) -> Tensor:
        latents, features = decoder.noise[None], torch.zeros(1, decoder.window, decoder.feature_dim)
        for _ in range(steps):  # without the scheduler, which multiplies no matrices
            latents = decoder.denoiser(latents, torch.zeros(1, dtype=torch.long), features)
        start = torch.zeros_like(latents)
        if config.diffusion.residual:
            start = decoder.prior.encode(features[..., decoder.encoder_dim :]).mean
        poses = decoder.prior.decode(start + latents, decoder.window)
        return poses + decoder.detail(features, start, None) if config.diffusion.detail else poses

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # in a layer that is one call nothing can be counted
    try:
        return _counted(lambda: DiffusionDecoder(config), run)[2]
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _counted(build: Callable[[], _Net], run: Callable[[_Net], _Output]) -> tuple[_Net, _Output, dict[str, int]]:
    """A network, what it returns, and the four counts of that."""
    params_thop = macs_thop = 0
    called: set[nn.Module] = set()

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal params_thop, macs_thop
        if module not in called:  # a layer that is called twice has its parameters once
            called.add(module)
            params_thop += sum(p.numel() for p in module.parameters())
        if isinstance(module, nn.Linear):
            macs_thop += output.numel() * module.in_features
        elif isinstance(module, nn.MultiheadAttention):  # its four linear maps, which are no modules that are called
            macs_thop += 2 * module.embed_dim * (inputs[0].numel() + inputs[1].numel())
        elif isinstance(module, nn.Conv2d):
            macs_thop += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Upsample):
            macs_thop += output.numel()
        else:
            macs_thop += _THOP_NORM_MACS * output.numel()

    with torch.device("meta"):
        network = build().eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network.to_empty(device="cpu")
        for module in network.modules():
            if isinstance(module, _COUNTED):
                module.register_forward_hook(count)
        # The counter does not know the fused attention of CPUs; spelled out, its products are counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            output = run(network)
    counted = {
        "params": sum(p.numel() for p in network.parameters()),
        "params_thop": params_thop,
        "macs_thop": macs_thop,
        "macs_all": flops.get_total_flops() // 2,
    }
    return network, output, counted


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
    encoders: Mapping[str, HMR],
    batch: int,
    rounds: int = 5,
    precision: PrecisionChoice = "auto",
    compiled: bool = False,
) -> dict[str, float]:
    """Frames/s of encoders on the device that they are on, measured in turn, medians.

    Args:
        encoders: by name; all on one device. Masks, where they are needed, are of a person that fills a third.
        batch: frames at a time.
        rounds: measurements of each.
        precision: bf16 with weights and images in it (a copy; read-outs stay in float32), as one would run them; 32; or
            auto, bf16 where the device has instructions for it.
        compiled: by torch.compile, whose time is not counted.

    Raises:
        ValueError: `batch` or `rounds` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    if compiled:
        torch.compiler.reset()  # so that no shape of an earlier measurement makes these dynamic
    calls = {name: encoder_call(hmr, batch, precision, compiled) for name, hmr in encoders.items()}
    seconds = interleaved_seconds(calls, rounds)
    return {name: batch / value for name, value in seconds.items()}


def encoder_call(
    hmr: HMR, batch: int, precision: PrecisionChoice = "auto", compiled: bool = False
) -> Callable[[], None]:
    """A call of an encoder on the device that it is on, to be timed; arguments as of `frames_per_second`."""
    device = hmr.smpl_head.init_cam.device
    images, mask = _someone(batch, device)
    box = torch.tensor([[0.0, 0.0, 0.4]], device=device).expand(batch, -1)
    if chosen_precision(precision, device) == "bf16":
        hmr, images = in_bf16(hmr), images.bfloat16()
    return timed(hmr, images, mask, box, device=device, compiled=compiled)


def merging_share(
    hmr: HMR, batch: int, rounds: int = 5, precision: PrecisionChoice = "auto", compiled: bool = False
) -> float:
    """What share of the time of the first layer goes into choosing and merging its tokens.

    Raises:
        ValueError: the encoder merges no tokens, or `batch` or `rounds` is below 1.
    """
    settings = hmr.config.token_merging
    if settings is None:
        raise ValueError("this encoder merges no tokens")
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    device = hmr.smpl_head.init_cam.device
    images, mask = _someone(batch, device)
    if chosen_precision(precision, device) == "bf16":
        hmr, images = in_bf16(hmr), images.bfloat16()
    with torch.inference_mode():
        tokens = hmr.backbone.embed(middle_columns(images))
        state = MergedTokens.start(tokens, hmr.person_tokens(mask))
    block, merged = hmr.backbone.layers[0], hmr.backbone.tokens_merged(len(hmr.backbone.blocks))[0]
    keys = tokens.unflatten(-1, (hmr.config.vit_heads, -1)).mean(2)
    sizes = (state.sizes, settings.average, state.slots)
    calls = {
        "block": timed(block.forward_merging, state, merged, settings, device=device, compiled=compiled),
        "merging": timed(merge_tokens, tokens, keys, state.is_person, merged, *sizes, device=device, compiled=compiled),
    }
    seconds = interleaved_seconds(calls, rounds)
    return seconds["merging"] / seconds["block"]


def timed(
    function: Callable[..., object], *arguments: object, device: torch.device, compiled: bool = False
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
