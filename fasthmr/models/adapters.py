"""Adapters: state dicts of foreign checkpoints in our names. Nothing is dropped that is not listed here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from fasthmr.models.hmr import Architecture, HMRConfig

#: parts of an HMR2.0 checkpoint that are no part of the network: its GAN's discriminator, the licensed body, and a
#: flag of its training code.
HMR2_IGNORED = re.compile(r"discriminator\.|smpl\.|initialized$")
#: the same of CameraHMR's: its training keeps licensed bodies (`CameraHMR/core/camerahmr_trainer.py`) and HumanFoV.
CAMERAHMR_IGNORED = re.compile(r"smpl\.|smpl_layer\.|smpl_gt(_male|_female)?\.|cam_model\.|initialized$")
#: layers that HumanFoV has and never calls
HUMAN_FOV_IGNORED = re.compile(r"fc2\.|backbone\.final_layer\.")
#: where CameraHMR's training checkpoints keep HumanFoV
_FOV_PREFIX = "cam_model."

#: what a foreign checkpoint holds; "backbone" is a ViT as HMR2.0 has it, of whatever else is in the file
Foreign = Literal["hmr2", "camerahmr", "human_fov", "backbone"]

_IGNORED = {"hmr2": HMR2_IGNORED, "camerahmr": CAMERAHMR_IGNORED}
#: where HMR2.0's name differs from ours. The backbone, the read-outs and the mean parameters have the same names.
_RENAMED = {
    "smpl_head.transformer.to_token_embedding.": "smpl_head.token_embed.",
    "smpl_head.transformer.pos_embedding": "smpl_head.token_pos",
}
_LAYER = re.compile(r"smpl_head\.transformer\.transformer\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_PARTS = {
    "0.norm": "self_norm",
    "0.fn.to_qkv": "self_attn.qkv",
    "0.fn.to_out.0": "self_attn.proj",
    "1.norm": "cross_norm",
    "1.fn.to_q": "cross_attn.q",
    "1.fn.to_kv": "cross_attn.kv",
    "1.fn.to_out.0": "cross_attn.proj",
    "2.norm": "mlp_norm",
    "2.fn.net.0": "mlp.fc1",
    "2.fn.net.3": "mlp.fc2",
}
#: attention heads by width, of the ViTs that ViTPose comes in (S, B, L, H); weights do not tell
_VIT_HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}
#: HMR2.0's and CameraHMR's
_HEAD_HEADS = 8
_FIRST_BLOCK = "blocks.0.attn.qkv.weight"


def recognised(names: Collection[str]) -> Foreign | None:
    """What a checkpoint with these names holds; None: nothing that is known."""
    if "downsample_stage_1.0.weight" in {name.removeprefix("backbone.") for name in names}:
        return "human_fov"
    if "smpl_head.transformer.to_token_embedding.weight" in names and "smpl_head.decpose.weight" in names:
        return "camerahmr" if "smpl_head.deckp.weight" in names else "hmr2"
    return "backbone" if _backbone_prefix(names) is not None else None


def hmr_state_dict(foreign: Mapping[str, Tensor], architecture: Architecture = "hmr2") -> dict[str, Tensor]:
    """The state dict of our `HMR` from that of an HMR2.0 or CameraHMR checkpoint (`checkpoint["state_dict"]`).

    Names that are neither known nor in `HMR2_IGNORED` or `CAMERAHMR_IGNORED` pass through, so that whoever loads
    strictly names them.
    """
    ignored = _IGNORED[architecture]
    return {_our_name(name): tensor for name, tensor in foreign.items() if not ignored.match(name)}


def foreign_names(ours: Collection[str]) -> dict[str, str]:
    """HMR2.0's name of each of our `HMR`'s names: the inverse of what `hmr_state_dict` does to names."""
    parts = {value: key for key, value in _LAYER_PARTS.items()}
    names = {}
    for name in ours:
        layer = re.fullmatch(r"smpl_head\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            names[name] = f"smpl_head.transformer.transformer.layers.{layer[1]}.{parts[layer[2]]}.{layer[3]}"
        else:
            renamed = (theirs + name.removeprefix(o) for theirs, o in _RENAMED.items() if name.startswith(o))
            names[name] = next(renamed, name)
    return names


def human_fov_state_dict(foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our `HumanFoV` from that of CameraHMR's FLNet (a checkpoint of its own), or from a training
    checkpoint of CameraHMR, which has it as `cam_model.*`; names pass through as in `hmr_state_dict`."""
    if any(name.startswith(_FOV_PREFIX) for name in foreign):
        foreign = _without(foreign, _FOV_PREFIX)
    return {name: tensor for name, tensor in foreign.items() if not HUMAN_FOV_IGNORED.match(name)}


def backbone_state_dict(foreign: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The ViT of any checkpoint that has one as HMR2.0's (HMR2.0, HaMeR, TokenHMR: `backbone.*`; ViTPose: the same, or
    without prefix), with our names `backbone.*`; and the names that are no part of it.

    Raises:
        ValueError: there is no such ViT.
    """
    prefix = _backbone_prefix(foreign)
    if prefix is None:
        raise ValueError(f"it has no ViT as HMR2.0's: no name ends in {_FIRST_BLOCK!r}")
    ours = _without(foreign, prefix)
    vit = re.compile(r"pos_embed$|patch_embed\.proj\.|blocks\.\d+\.|last_norm\.")
    weights = {f"backbone.{name}": tensor for name, tensor in ours.items() if vit.match(name)}
    return weights, [name for name in foreign if f"backbone.{name.removeprefix(prefix)}" not in weights]


def backbone_sizes(weights: Mapping[str, Tensor], vit_heads: int | None) -> dict[str, int | float]:
    """The fields `vit_*` of `HMRConfig` of weights with our names.

    Args:
        weights: `backbone.*`, others are not looked at.
        vit_heads: attention heads, which weights do not tell; None: as ViTPose has them for this width.

    Raises:
        ValueError: a tensor that tells a size is missing or no matrix, or the number of heads is not known.
    """
    dim = _shape(weights, "backbone.blocks.0.attn.proj.weight")[0]
    hidden = _shape(weights, "backbone.blocks.0.mlp.fc1.weight")[0]
    heads = _VIT_HEADS.get(dim) if vit_heads is None else vit_heads
    if heads is None:
        raise ValueError(
            f"how many attention heads has a ViT of width {dim}? The weights do not tell: pass vit_heads (--vit_heads)"
        )
    numbers = {int(found[1]) for name in weights if (found := re.match(r"backbone\.blocks\.(\d+)\.", name))}
    return {"vit_dim": dim, "vit_depth": len(numbers), "vit_heads": heads, "vit_mlp_ratio": hidden / dim}


def hmr_config(weights: Mapping[str, Tensor], architecture: Architecture, vit_heads: int | None) -> HMRConfig:
    """Sizes of the network of a whole state dict with our names; arguments and errors as of `backbone_sizes`."""
    numbers = {int(found[1]) for name in weights if (found := re.match(r"smpl_head\.layers\.(\d+)\.", name))}
    return HMRConfig.from_dict(
        {
            "architecture": architecture,
            **backbone_sizes(weights, vit_heads),
            "head_dim": _shape(weights, "smpl_head.token_embed.weight")[0],
            "head_depth": len(numbers),
            "head_heads": _HEAD_HEADS,
            "head_dim_head": _shape(weights, "smpl_head.layers.0.cross_attn.q.weight")[0] // _HEAD_HEADS,
            "head_mlp_dim": _shape(weights, "smpl_head.layers.0.mlp.fc1.weight")[0],
        }
    )


def _our_name(foreign: str) -> str:
    layer = _LAYER.fullmatch(foreign)
    if layer and layer[2] in _LAYER_PARTS:
        return f"smpl_head.layers.{layer[1]}.{_LAYER_PARTS[layer[2]]}.{layer[3]}"
    for theirs, ours in _RENAMED.items():
        if foreign.startswith(theirs):
            return ours + foreign.removeprefix(theirs)
    return foreign


def _backbone_prefix(names: Collection[str]) -> str | None:
    for name in names:
        prefix = name.removesuffix(_FIRST_BLOCK)
        if prefix != name and f"{prefix}patch_embed.proj.weight" in names:
            return prefix
    return None


def _without(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    tensor = weights.get(name)
    if tensor is None or tensor.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got {'nothing' if tensor is None else tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]
