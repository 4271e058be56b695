"""Which layers to merge next while a model is fine-tuned: one event at a time, inside an error limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fasthmr.merging.plan import LayerMergePlan


@dataclass(frozen=True)
class Choice:
    """A plan of one event and what it costs: `error_mm` of the model under it."""

    plan: LayerMergePlan
    error_mm: float


def windows(num_layers: int, size: int) -> list[LayerMergePlan]:
    """All plans that merge one window of `size` neighbours, from the last layers to the first."""
    empty = LayerMergePlan(num_layers)
    return [empty.merged(low, low + size - 1) for low in range(num_layers - size, -1, -1)]


def least_error_window(
    num_layers: int, error: Callable[[LayerMergePlan], float], limit_mm: float, max_removed: int
) -> Choice:
    """The window whose merging leaves the least error: `policy: eclm`.

    Windows that remove `max_removed` layers are tried first, from the last layers to the first as in ECLM; if none is
    below the limit, smaller ones.

    Args:
        num_layers: of the model, at least 2.
        error: error of the model under a plan, mm.
        limit_mm: what the error must stay below.
        max_removed: how many layers a window may remove, at least 1.

    Returns:
        The choice. If no window is below the limit, the one that comes nearest to it: compare its `error_mm`.
    """
    tried: list[Choice] = []
    for removed in range(min(max_removed, num_layers - 1), 0, -1):
        size = [Choice(plan, error(plan)) for plan in windows(num_layers, removed + 1)]
        tried.append(min(size, key=lambda choice: choice.error_mm))
        if tried[-1].error_mm < limit_mm:
            return tried[-1]
    return min(tried, key=lambda choice: choice.error_mm)


def most_similar_window(similarity: Tensor, max_removed: int) -> LayerMergePlan | None:
    """The window whose first and last layer have the most similar outputs: `policy: cka`.

    Args:
        similarity: (L, L) of the layers' outputs, see `linear_cka`.
        max_removed: how many layers the window removes, fewer where there are not so many.

    Returns:
        A plan of one event, or None for a single layer.
    """
    num_layers = len(similarity)
    removed = min(max_removed, num_layers - 1)
    if removed < 1:
        return None
    low = max(range(num_layers - removed), key=lambda layer: float(similarity[layer, layer + removed]))
    return LayerMergePlan(num_layers).merged(low, low + removed)
