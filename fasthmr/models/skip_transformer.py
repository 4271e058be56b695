"""Transformers with long skip connections, as a U-Net has them (U-ViT; MLD, Chen et al. 2023), for short sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class SkipTransformer(nn.Module):
    """An odd number of post-norm layers; each of the last ones also gets the output of its mirror image.

    Layers 1 .. k, one in the middle, k more: the last k start from a linear map of (current, output of the layer that
    lies as far before the middle). Layers are torch's own, with GELU.

    Args:
        dim: width D of the tokens.
        depth: number of layers, odd.
        heads: attention heads.
        mlp_dim: hidden width of the feed-forward networks.
        dropout: in training.
        memory: whether the layers also attend to a second sequence.

    Raises:
        ValueError: `depth` is even, or `heads` does not divide `dim`.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, mlp_dim: int, dropout: float = 0.0, memory: bool = False
    ) -> None:
        super().__init__()
        if depth < 1 or depth % 2 == 0:
            raise ValueError(f"depth must be odd, got {depth}: one layer in the middle, as many after as before")
        if dim % heads:
            raise ValueError(f"heads must divide dim ({dim}), got {heads}")

        def layer() -> nn.Module:
            kind: Callable[..., nn.Module] = nn.TransformerDecoderLayer if memory else nn.TransformerEncoderLayer
            return kind(dim, heads, mlp_dim, dropout, activation="gelu", batch_first=True)

        half = (depth - 1) // 2
        self.input_blocks = nn.ModuleList(layer() for _ in range(half))
        self.middle_block = layer()
        self.output_blocks = nn.ModuleList(layer() for _ in range(half))
        self.linear_blocks = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor, ignored: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            tokens: (B, N, D).
            ignored: (B, N) bool, tokens that nobody attends to, such as padding; None for none.
            memory: (B, M, D), for layers that attend to it.
        """

        def through(block: nn.Module, x: Tensor) -> Tensor:
            if memory is None:
                return block(x, src_key_padding_mask=ignored)
            return block(x, memory, tgt_key_padding_mask=ignored)

        skipped = []
        with _attention(tokens.device):
            for block in self.input_blocks:
                tokens = through(block, tokens)
                skipped.append(tokens)
            tokens = through(self.middle_block, tokens)
            for block, linear in zip(self.output_blocks, self.linear_blocks, strict=True):
                tokens = through(block, linear(torch.cat((tokens, skipped.pop()), dim=-1)))
        return self.norm(tokens)


def sinusoids(count: int, dim: int) -> Tensor:
    """(count, dim): sines, then cosines, of the position at geometrically falling frequencies. Learned positions start
    from them: random ones tell frames apart so badly that training takes several times as long."""
    frequencies = torch.exp(-math.log(200.0) * torch.arange(dim // 2) / (dim // 2))
    phase = torch.arange(count)[:, None] * frequencies
    return torch.cat((phase.sin(), phase.cos(), torch.zeros(count, dim % 2)), dim=1)


def _attention(device: torch.device) -> AbstractContextManager[object]:
    """Of sequences this short, the CPU's fused attention takes more time than a plain one: half more in training."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
