"""ViT: the backbone of HMR2.0 and CameraHMR, from the middle of a person crop to patch tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fasthmr.merging import MergedTokens, TokenMerging, merge_tokens
from fasthmr.models.layers import DropPath, FeedForward, SelfAttention, init_transformer_weights

NORM_EPS = 1e-6
#: zero pixels around the image before it is cut into patches, as in ViTPose: patch i covers the pixels from 16 i - 2 to
#: 16 i + 13. 256 + 4 pixels hold 16 whole patches, so the padding adds no patch; the last 2 pixels are not seen.
PATCH_PADDING_PX = 2


class Block(nn.Module):
    """One pre-norm transformer layer: attention and a feed-forward network, each added to its input."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SelfAttention(dim, heads, dim // heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FeedForward(dim, mlp_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, sizes: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), for any N; `sizes` (B, N) for proportional attention."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), sizes))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def forward_merging(self, state: MergedTokens, num_merged: int, settings: TokenMerging) -> MergedTokens:
        """The same with tokens merged between attention and feed-forward network: only this place gives the MACs of
        FastHMR, Tab. 12."""
        sizes = state.sizes if settings.proportional_attention else None
        attended, keys = self.attn.with_keys(self.norm1(state.tokens), sizes)
        tokens = state.tokens + self.drop_path(attended)
        metric = keys.mean(1) if settings.metric == "keys" else tokens
        merged = merge_tokens(tokens, metric, state.is_person, num_merged, state.sizes, settings.average, state.slots)
        return merged._replace(tokens=merged.tokens + self.drop_path(self.mlp(self.norm2(merged.tokens))))


class PatchEmbed(nn.Module):
    """One linear map of every patch to a token, row by row."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch, padding=PATCH_PADDING_PX)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D), N = rows * columns."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision transformer as in ViTPose and HMR2.0 (`4D-Humans/hmr2/models/backbones/vit.py`), of any size.

    `blocks` is keyed by the ORIGINAL number of each layer ("0", "1", ...): where layers are merged, keys disappear, and
    those that stay keep their names in the state dict.

    Args:
        dim: width D of the tokens.
        depth: number of layers.
        heads: attention heads; they divide `dim`.
        mlp_ratio: hidden width of the feed-forward networks over `dim`.
        image: height and width of the input, px.
        patch: side of a patch, px.
        drop_path: probability of dropping a branch of the last layer; it grows linearly from 0 at the first layer.
        token_merging: Mask-ToMe in the first layers that are left; None merges no tokens.

    Raises:
        ValueError: `token_merging` cannot be done with so many tokens and layers.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        image: tuple[int, int] = (256, 192),
        patch: int = 16,
        drop_path: float = 0.0,
        token_merging: TokenMerging | None = None,
    ) -> None:
        super().__init__()
        rows, columns = ((side + 2 * PATCH_PADDING_PX - patch) // patch + 1 for side in image)
        self.image = image
        self.num_tokens = rows * columns
        self.token_merging = token_merging
        self.tokens_merged(depth)  # refuses what cannot be done
        self.patch_embed = PatchEmbed(dim, patch)
        # Row 0 belonged to the class token of the pre-trained network, which has none any more.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_tokens, dim))
        blocks = [
            Block(dim, heads, int(dim * mlp_ratio), drop_path=drop_path * i / max(1, depth - 1)) for i in range(depth)
        ]
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.last_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.apply(init_transformer_weights)
        self.patch_embed.proj.weight.data = whitening_filters(dim, patch)
        for block in blocks:
            _start_block(block, depth)
        # Trained from there on. Started near zero instead, a small ViT takes many times longer to see where things are.
        self.pos_embed.data[:, 1:] = sinusoid_positions(rows, columns, dim)

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens with their positions, before the first layer: (B, 3, H, W) -> (B, N, D)."""
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.image:
            raise ValueError(
                f"images must have shape (B, 3, {self.image[0]}, {self.image[1]}), got {tuple(images.shape)}"
            )
        # The class token's position is added to every token as a constant: the weights were trained with it.
        return self.patch_embed(images) + (self.pos_embed[:, 1:] + self.pos_embed[:, :1])

    def forward(self, images: Tensor, is_person: Tensor | None = None) -> MergedTokens:
        """Tokens after the last norm.

        Args:
            images: (B, 3, H, W) normalised.
            is_person: (B, N) bool, tokens that token merging protects; None protects none.

        Returns:
            (B, N, D) tokens, row by row unless they are merged, and where each original one is.
        """
        state = MergedTokens.start(self.embed(images), is_person)
        return self.finish(self.run(state, self.layers))

    def run(self, state: MergedTokens, blocks: Sequence[Block], first: int = 0, end: int | None = None) -> MergedTokens:
        """From the input of layer `first` to that of layer `end` (None: to the output of the last one).

        `blocks` are all layers of the network: ours, or others in their place.
        """
        merged = self.tokens_merged(len(blocks))
        settings = self.token_merging
        for number, block in enumerate(blocks[first:end], first):
            if settings is not None and number < len(merged):
                state = block.forward_merging(state, merged[number], settings)
            else:
                sizes = state.sizes if settings is not None and settings.proportional_attention else None
                state = state._replace(tokens=block(state.tokens, sizes))
        return state

    @property
    def layers(self) -> list[Block]:
        """The blocks that are left, front to back."""
        return cast(list[Block], list(self.blocks.values()))

    def finish(self, state: MergedTokens) -> MergedTokens:
        """The last norm."""
        return state._replace(tokens=self.last_norm(state.tokens))

    def tokens_merged(self, depth: int) -> tuple[int, ...]:
        """How many tokens each of the first of `depth` layers merges; ValueError if these are too few."""
        return () if self.token_merging is None else self.token_merging.schedule(self.num_tokens, depth)


def _start_block(block: Block, depth: int) -> None:
    """A better start than random for training from scratch on little data.

    Keys equal queries, so that a token first attends to itself and to what looks like it or lies beside it (in the
    spirit of Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023). What each branch adds is
    scaled by 1 / sqrt(2 depth), as in GPT-2, so that the first layers are not drowned by the last.
    """
    with torch.no_grad():
        query, key, _ = block.attn.qkv.weight.chunk(3)
        key.copy_(query)
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight.mul_((2 * depth) ** -0.5)


def whitening_filters(dim: int, patch: int) -> Tensor:
    """First weights of the patch embedding, (dim, 3, patch, patch): cosine waves in brightness and two colours.

    The lowest frequencies come first, and each is divided by its usual spread in photographs (amplitudes fall with
    1 / frequency, colours vary a third as much), so that all tokens' numbers start about equally large and unrelated.
    Random filters would all mostly see the mean colour. If `dim` exceeds the number of waves, they repeat.
    """
    position, order = torch.arange(patch) + 0.5, torch.arange(patch)
    waves = torch.cos(math.pi * position * order[:, None] / patch)
    waves = waves / waves.norm(dim=1, keepdim=True)
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    colors = colors / colors.norm(dim=1, keepdim=True)
    spread = {
        (row, column, color): (1.0 if color == 0 else 0.3) * patch / (1.8 * max(math.hypot(row, column), 0.7))
        for row, column, color in itertools.product(range(patch), range(patch), range(3))
    }
    order_of_size = sorted(spread, key=lambda wave: (-spread[wave], wave))
    chosen = itertools.islice(itertools.cycle(order_of_size), dim)
    return torch.stack(
        [torch.einsum("c,h,w->chw", colors[c], waves[r], waves[k]) / spread[r, k, c] for r, k, c in chosen]
    )


def sinusoid_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Sine and cosine of each token's row (first half of the numbers) and column: (rows * columns, dim).

    Wavelengths are those of "Attention is all you need", for each axis, as MAE starts from.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    frequency = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))

    def along(length: int) -> Tensor:
        phase = torch.arange(length)[:, None] * frequency
        return torch.cat((phase.sin(), phase.cos()), dim=1)

    by_row, by_column = along(rows), along(columns)
    return torch.cat((by_row.repeat_interleave(columns, 0), by_column.repeat(rows, 1)), dim=1)
