"""Layers that the backbone and the head share: attention, feed-forward network, stochastic depth.

Shape letters: B images, N tokens, M query tokens, D width, H heads, K width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: (B, H, M, K), (B, H, N, K), (B, H, N, K) -> (B, H, M, K).

    `bias`, which broadcasts to (B, H, M, N), is added to the logits.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Torch's fused CPU kernel does its products in float32. Plain bf16 products of 192 tokens take a third of its
        # time, forward and backward together (measured on an EPYC with avx512_bf16, torch 2.13).
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        return (logits if bias is None else logits + bias).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    Args:
        dim: width D of the tokens.
        heads: number of heads H.
        head_dim: width K of one head; H*K may differ from D.
        qkv_bias: whether queries, keys and values have biases.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, tokens: Tensor, sizes: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); as `with_keys`."""
        return self.with_keys(tokens, sizes)[0]

    def with_keys(self, tokens: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention, and the keys that it compared.

        Args:
            tokens: (B, N, D).
            sizes: (B, N) how many tokens each stands for: it gets as much attention as these would ("proportional
                attention" of ToMe); None: as one.

        Returns:
            (B, N, D), and the keys (B, H, N, K).
        """
        # Views, not copies: the fused attention kernels read heads with strides.
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if sizes is None else sizes.log()[:, None, None].to(q.dtype)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2)), k


class CrossAttention(nn.Module):
    """Multi-head attention of query tokens to any number of context tokens, without biases in q, k and v.

    Args:
        dim: width D of the query tokens.
        context_dim: width of the context tokens.
        heads: number of heads H.
        head_dim: width K of one head.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, M, D), (B, N, context_dim) -> (B, M, D)."""
        q = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with the exact (erf) GELU between them, as in the originals."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.dropout(F.gelu(self.fc1(tokens))))


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes a residual branch for a random share of the images.

    What is kept is divided by the probability of keeping it, so that the mean is that of evaluation.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.probability == 0:
            return branch
        keep = 1 - self.probability
        kept = branch.new_empty((len(branch), *[1] * (branch.ndim - 1))).bernoulli_(keep)
        return branch * (kept / keep)

    def extra_repr(self) -> str:
        return f"probability={self.probability:.3g}"


def init_transformer_weights(module: nn.Module) -> None:
    """The start of a transformer trained from scratch, for `Module.apply`: Xavier-uniform weights, zero biases.

    The usual normal weights of 0.02 suit widths near 1000. At width 192 they pass on so little that in a test task (say
    where a blob is) nothing is learned in the 160 steps in which this start, with `vit.sinusoid_positions`, is done.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
