"""Merging layers: several blocks of the same shape become one (FastHMR, Eq. 4)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fasthmr.merging.plan import LayerMergePlan, MergeEvent


@torch.no_grad()
def merge_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """theta_0 + sum_k (theta_k - theta_0), of tensors of equal shape, the first layer's first (FastHMR, Eq. 4).

    Equal to sum(theta) - (n - 1) theta_0, and summed from the last layer on: of two layers exactly the later one
    remains. Computed in float32 at least.
    """
    first, *between, last = tensors
    high = torch.promote_types(first.dtype, torch.float32)
    base = first.to(high)
    total = last.to(high, copy=True)
    for other in between:
        total += other.to(high) - base
    return total.to(first.dtype)


@torch.no_grad()
def merge_into(keep: nn.Module, drop: Sequence[nn.Module]) -> None:
    """Give every parameter and floating-point buffer of `keep` its merged value, in place: the tensors stay the same
    objects, so an optimiser keeps them.

    Raises:
        ValueError: the blocks differ in the names or shapes of their tensors; nothing was changed.
    """
    states = [block.state_dict(keep_vars=True) for block in (keep, *drop)]
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in states]
    for other in shapes[1:]:
        if other != shapes[0]:
            odd = sorted(name for name in {*other, *shapes[0]} if other.get(name) != shapes[0].get(name))
            raise ValueError(f"only blocks of the same structure can be merged; these differ in {odd[:5]}")
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            tensor.copy_(merge_tensors([state[name] for state in states]))


def merge_blocks(blocks: Iterable[nn.Module] | nn.ModuleDict, plan: LayerMergePlan) -> nn.ModuleList:
    """The blocks that remain after a plan, front to back.

    Args:
        blocks: all original layers in order.
        plan: what to merge; the empty plan gives back the same blocks.

    Returns:
        Merged blocks are new; the others are the very objects that were passed, which are never changed.

    Raises:
        ValueError: the plan is for another number of layers, or blocks differ in structure.
    """
    layers = list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)
    if len(layers) != plan.depth:
        raise ValueError(f"the plan is for {plan.depth} layers, got {len(layers)} blocks")
    merged = dict(enumerate(layers))
    fresh: set[int] = set()
    for event in plan.events:
        if event.keep not in fresh:
            merged[event.keep] = copy.deepcopy(merged[event.keep])
            fresh.add(event.keep)
        merge_into(merged[event.keep], [merged.pop(layer) for layer in event.drop])
    return nn.ModuleList(merged[layer] for layer in plan.layers)


def collapse(blocks: nn.ModuleDict, event: MergeEvent) -> None:
    """Apply one event to a running model, in place: `blocks` is keyed by original layer numbers, survivors keep their
    keys and their parameters' identity, dropped layers are removed.

    Raises:
        ValueError: blocks differ in structure; nothing was changed.
    """
    merge_into(blocks[str(event.keep)], [blocks[str(layer)] for layer in event.drop])
    for layer in event.drop:
        del blocks[str(layer)]
