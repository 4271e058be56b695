"""Mask-ToMe: token merging that spends background first (FastHMR, Sec. 3.2; ToMe, Bolya et al. 2023).

Shape letters: B images, N tokens, C channels, K width of the metric, R merged tokens, M = N - R tokens left,
N0 tokens before any merging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Average = Literal["plain", "size"]
# Scores lie in [-1, 1]; these put the three kinds of tokens one after the other when all are sorted at once.
_PERSON_OFFSET = -4.0
_KEPT_OFFSET = -8.0


class MergedTokens(NamedTuple):
    """Tokens of B images in the course of merging.

    Attributes:
        tokens: (B, N, C).
        is_person: (B, N) bool, whether any of a token's originals shows the person; None: nothing is protected.
        sizes: (B, N) float32, how many originals each token stands for.
        slots: (B, N0) int64, where each original token is now.
    """

    tokens: Tensor
    is_person: Tensor | None
    sizes: Tensor
    slots: Tensor

    @classmethod
    def start(cls, tokens: Tensor, is_person: Tensor | None) -> MergedTokens:
        """Tokens (B, N, C) before any merging; `is_person` (B, N) bool or None."""
        batch, count = tokens.shape[:2]
        slots = torch.arange(count, device=tokens.device).expand(batch, count)
        return cls(tokens, is_person, torch.ones(batch, count, device=tokens.device), slots)


@dataclass(frozen=True)
class TokenMerging:
    """Settings of Mask-ToMe.

    Args:
        keep_tokens: how many tokens are left in the end.
        per_layer: how many are merged in a layer; the last layer that merges takes what is missing.
        mask: "given": every image comes with a person mask, whose tokens are protected; "none": plain ToMe, all tokens
            are equal and masks are not looked at.
        person_share: a token shows the person if at least this share of its patch does; 0 means any of it.
        metric: what similarity is measured on: the attention's "keys", averaged over heads, or the "tokens" after it.
        average: "plain" mean of what is merged, or weighted by "size", as in ToMe.
        proportional_attention: add the logarithm of sizes to the attention's logits, as in ToMe.

    Raises:
        ValueError: a value that cannot be; names the field.
    """

    keep_tokens: int = 90
    per_layer: int = 40
    mask: Literal["none", "given"] = "given"
    person_share: float = 0.1
    metric: Literal["keys", "tokens"] = "keys"
    average: Average = "plain"
    proportional_attention: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("mask", ("none", "given")),
            ("metric", ("keys", "tokens")),
            ("average", ("plain", "size")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("keep_tokens", "per_layer"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if not 0 <= self.person_share <= 1:
            raise ValueError(f"person_share must be in [0, 1], got {self.person_share}")

    def schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """How many tokens each layer merges, from the first: (40, 40, 22) brings 192 to 90 in the paper.

        Raises:
            ValueError: `keep_tokens` is out of range, a layer would merge more than half of its tokens, or there are
                too few layers.
        """
        if not 1 <= self.keep_tokens <= num_tokens:
            raise ValueError(f"keep_tokens must be in [1, {num_tokens}], got {self.keep_tokens}")
        merges: list[int] = []
        left = num_tokens
        while left > self.keep_tokens:
            merges.append(min(self.per_layer, left - self.keep_tokens))
            if merges[-1] > left // 2:
                raise ValueError(
                    f"a layer can merge at most half of its {left} tokens, got {merges[-1]}: lower per_layer "
                    f"({self.per_layer}) or raise keep_tokens ({self.keep_tokens})"
                )
            left -= merges[-1]
        if len(merges) > num_layers:
            raise ValueError(
                f"merging {self.per_layer} tokens a layer takes {len(merges)} layers from {num_tokens} to "
                f"{self.keep_tokens} tokens, but there are {num_layers}: raise per_layer"
            )
        return tuple(merges)


def merge_tokens(
    tokens: Tensor,
    metric: Tensor,
    is_person: Tensor | None,
    num_merged: int,
    sizes: Tensor | None = None,
    average: Average = "plain",
    slots: Tensor | None = None,
) -> MergedTokens:
    """Merge the most similar pairs of tokens, background before persons; always exactly `num_merged` go.

    As in ToMe, tokens are split into A and B, by even and odd position, every token of A finds its most similar one in
    B, and the best `num_merged` pairs are averaged into B. With a person mask only pairs of background count. Where
    there are fewer of those in A than must go, A and B are re-balanced: background moves from B to A (at least one
    stays), so that NO person token is merged while two background tokens are left; only then do person tokens go, each
    into its own most similar partner. (-inf as a score, as the paper has it, would send them all to one token.)

    Nothing waits for the device, loops over images or has a shape that depends on the mask.

    Args:
        tokens: (B, N, C).
        metric: (B, N, K) whose cosine is the similarity.
        is_person: (B, N) bool of protected tokens; None protects none.
        num_merged: R, 0 to N // 2.
        sizes: (B, N) how many originals each token stands for; None: one each.
        average: "plain" mean of the tokens, or weighted by "size".
        slots: (B, N0) where each original is; None: the tokens are the originals.

    Returns:
        M = N - R tokens: those of A that stay, most similar first, then those of B in order (ToMe's order).

    Raises:
        ValueError: `num_merged` is out of range, or shapes do not fit.
    """
    batch, count, _ = tokens.shape
    if not 0 <= num_merged <= count // 2:
        raise ValueError(f"num_merged must be in [0, {count // 2}], half of the {count} tokens, got {num_merged}")
    for name, tensor in (("metric", metric), ("is_person", is_person), ("sizes", sizes)):
        if tensor is not None and tuple(tensor.shape[:2]) != (batch, count):
            raise ValueError(f"{name} must be ({batch}, {count}, ...) as the tokens are, got {tuple(tensor.shape)}")
    start = MergedTokens.start(tokens, is_person)
    sizes = start.sizes if sizes is None else sizes
    slots = start.slots if slots is None else slots
    if num_merged == 0:
        return MergedTokens(tokens, is_person, sizes, slots)

    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        order, target = _choose(metric.float(), is_person, num_merged)
        kept = order[:, num_merged:]
        gone, into = order[:, :num_merged], target.gather(1, order[:, :num_merged])
        # position of each old token among those that stay; a merged token is where its target is
        place = torch.empty_like(order).scatter_(
            1, kept, torch.arange(count - num_merged, device=order.device).expand(batch, -1)
        )
        place.scatter_(1, gone, place.gather(1, into))
        # (B, M, R), 1 where an old token goes: a matrix product instead of atomic additions, so it is deterministic
        goes = (
            place.gather(1, gone)[:, None] == torch.arange(count - num_merged, device=order.device)[:, None]
        ).float()
        gone_sizes, kept_sizes = sizes.gather(1, gone), sizes.gather(1, kept)
        new_sizes = kept_sizes + (goes @ gone_sizes[..., None])[..., 0]
        new_person = None
        if is_person is not None:
            people = (goes @ is_person.gather(1, gone).float()[..., None])[..., 0]
            new_person = is_person.gather(1, kept) | (people > 0)
        if average == "size":
            share, own = goes * (gone_sizes[:, None] / new_sizes[..., None]), kept_sizes / new_sizes
        else:
            own = 1 / (1 + goes.sum(-1))
            share = goes * own[..., None]
        new_slots = place.gather(1, slots)

    stay, leave = _rows(tokens, kept), _rows(tokens, gone)
    with torch.autocast(tokens.device.type, enabled=False):  # the residual stream keeps its precision
        merged = stay * own[..., None].to(tokens.dtype) + share.to(tokens.dtype) @ leave
    return MergedTokens(merged, new_person, new_sizes, new_slots)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, N, C), (B, M) -> (B, M, C). `gather`, which takes an index for each channel, is ten times slower on a CPU."""
    batch, count = tokens.shape[:2]
    flat = index + count * torch.arange(batch, device=index.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def _choose(metric: Tensor, is_person: Tensor | None, num_merged: int) -> tuple[Tensor, Tensor]:
    """Which tokens go, and where.

    Returns:
        order: (B, N): first the R tokens that go, best first, then those that stay in the order of the output.
        target: (B, N): the partner of every token of A, as an index into N (of no meaning for the others).
    """
    batch, count, _ = metric.shape
    metric = torch.nn.functional.normalize(metric, dim=-1)
    similarity = metric @ metric.mT
    position = torch.arange(count, device=metric.device)
    even = (position % 2 == 0).expand(batch, count)
    if is_person is None:
        in_a, background = even, torch.ones_like(even)
    else:
        background = ~is_person
        in_a = _split(similarity, is_person, even, num_merged)
        # background goes only into background; a person token into whatever is most like it
        similarity = similarity.masked_fill(is_person[:, None, :] & background[:, :, None], -2.0)
    score, target = similarity.masked_fill(in_a[:, None, :], -2.0).max(-1)
    rank = torch.where(background, score, score + _PERSON_OFFSET)
    rank = torch.where(in_a, rank, _KEPT_OFFSET - position)
    return rank.argsort(dim=1, descending=True, stable=True), target


def _split(similarity: Tensor, person: Tensor, even: Tensor, num_merged: int) -> Tensor:
    """Which tokens are in A, (B, N) bool: the even ones, re-balanced where these hold too little background.

    A holds at least `num_merged` tokens; background among them as far as there is, but for one, which stays in B for
    the others to go into.
    """
    background = ~person
    backgrounds = background.sum(1, keepdim=True)
    want_background = (
        (background & even).sum(1, keepdim=True).clamp_min(num_merged).minimum(backgrounds - 1).clamp_min(0)
    )
    still = (num_merged - want_background).clamp_min(0)
    # without any background one person token must stay in B instead
    most = (person.sum(1, keepdim=True) - (backgrounds == 0).long()).clamp_min(0)
    want_person = (person & even).sum(1, keepdim=True).maximum(still).minimum(most)
    # How much each token is like the one of its own kind that is most like it
    likeness = similarity.masked_fill(person[:, None, :] != person[:, :, None], -2.0)
    likeness.diagonal(dim1=1, dim2=2).fill_(-2.0)
    # Persons last; of each kind even tokens first, then those that are most like another one
    key = likeness.amax(-1) + 4.0 * even - 16.0 * person
    rank = key.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.where(person, rank < backgrounds + want_person, rank < want_background)
