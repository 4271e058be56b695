"""Adapters: state dicts of foreign checkpoints in our names. Nothing is dropped that is not listed here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

#: parts of an HMR2.0 checkpoint that are no part of the network: its GAN's discriminator, the licensed body, and a
#: flag of its training code.
HMR2_IGNORED = re.compile(r"discriminator\.|smpl\.|initialized$")

#: where HMR2.0's name differs from ours. The backbone, the read-outs and the mean parameters have the same names.
_HMR2_RENAMED = {
    "smpl_head.transformer.to_token_embedding.": "smpl_head.token_embed.",
    "smpl_head.transformer.pos_embedding": "smpl_head.token_pos",
}
_HMR2_LAYER = re.compile(r"smpl_head\.transformer\.transformer\.layers\.(\d+)\.(.+)\.(weight|bias)")
_HMR2_LAYER_PARTS = {
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


def hmr2_state_dict(foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our `HMR` from that of an HMR2.0 checkpoint (`checkpoint["state_dict"]`).

    Names that are neither known nor in `HMR2_IGNORED` pass through, so that a strict `load_state_dict` names them.
    """
    return {_hmr2_name(name): tensor for name, tensor in foreign.items() if not HMR2_IGNORED.match(name)}


def _hmr2_name(foreign: str) -> str:
    layer = _HMR2_LAYER.fullmatch(foreign)
    if layer and layer[2] in _HMR2_LAYER_PARTS:
        return f"smpl_head.layers.{layer[1]}.{_HMR2_LAYER_PARTS[layer[2]]}.{layer[3]}"
    for theirs, ours in _HMR2_RENAMED.items():
        if foreign.startswith(theirs):
            return ours + foreign.removeprefix(theirs)
    return foreign
