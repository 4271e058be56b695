"""ECLM: the search for layers that can be merged within an error budget (FastHMR, Alg. 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fasthmr.merging.plan import LayerMergePlan


@dataclass(frozen=True)
class SearchStep:
    """One evaluation of the search.

    Attributes:
        plan: what was tried; the empty plan is the base.
        error_mm: its error.
        base_mm: error of the original model.
        accepted: whether it stays within the budget.
        committed: the plan as committed after this step (windows that may still grow are not in it).
    """

    plan: LayerMergePlan
    error_mm: float
    base_mm: float
    accepted: bool
    committed: LayerMergePlan


def search_layer_merges(
    num_layers: int,
    error: Callable[[LayerMergePlan], float],
    tau: float,
    commit_last_window: bool = True,
    on_step: Callable[[SearchStep], None] | None = None,
    min_layers: int = 1,
) -> LayerMergePlan:
    """Walk from the last layer to the first, and merge neighbours as long as the error grows by less than `tau`.

    A window of layers grows towards the front while merging all of it is accepted; when one more is refused, what was
    accepted before is committed and the next window begins there. It takes exactly `num_layers` evaluations, the base
    one included, or fewer if it ends at `min_layers`. Knows nothing of models and data.

    Args:
        num_layers: layers of the model.
        error: error of the model under a plan, mm, e.g. MPJPE on calibration frames.
        tau: budget over the original model's error, mm; the comparison is strict.
        commit_last_window: commit a window that is still open when the walk ends. False is Alg. 1 as printed, which
            forgets it.
        on_step: called after each evaluation.
        min_layers: at least so many layers stay. A plan that leaves fewer is refused without being evaluated; all
            other plans are tried as ever.

    Returns:
        The committed merges.

    Raises:
        ValueError: `tau` is negative or no number, `num_layers` is below 1, `min_layers` is not from 1 to
            `num_layers`, or an error is not finite.
    """
    if not tau >= 0 or math.isinf(tau):
        raise ValueError(f"tau must be 0 mm or more, got {tau}")
    if num_layers < 1:
        raise ValueError(f"num_layers must be 1 or more, got {num_layers}")
    if not 1 <= min_layers <= num_layers:
        raise ValueError(f"min_layers must be in [1, {num_layers}], got {min_layers}")

    def evaluate(plan: LayerMergePlan) -> float:
        value = error(plan)
        if not math.isfinite(value):
            raise ValueError(f"the error of the plan [{plan}] is {value}: has the calibration set labels?")
        return value

    def report(plan: LayerMergePlan, value: float, accepted: bool) -> None:
        if on_step is not None:
            on_step(SearchStep(plan, value, base, accepted, committed))

    committed = LayerMergePlan(num_layers)
    base = evaluate(committed)
    report(committed, base, True)
    high, low = num_layers - 1, num_layers - 2
    # Layers up to `high` are still original ones, so positions in the merged model are original layer numbers.
    while low >= 0:
        tried = committed.merged(low, high)
        if len(tried.layers) < min_layers:
            # With what was accepted exactly `min_layers` are left, so every plan still to come is refused as well.
            return committed.merged(low + 1, high) if low + 1 != high else committed
        value = evaluate(tried)
        accepted = value - base < tau
        if not accepted:
            if low + 1 != high:
                committed = committed.merged(low + 1, high)
            high = low
        low -= 1
        report(tried, value, accepted)
    if commit_last_window and high > 0:
        committed = committed.merged(0, high)
    return committed
