"""Exponential moving average of a network's weights while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged(net: nn.Module, decay: float) -> AveragedModel:
    """Moving average of `net` with a short memory at the start, so that the random first weights are forgotten.

    Args:
        net: what trains; call `update_parameters(net)` after each of its optimiser steps.
        decay: share of the old average that an update keeps, in the long run.

    Raises:
        ValueError: the decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1) or null, got {decay}")

    def update(average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(tuple(average), tuple(current), weight)

    model = AveragedModel(net, multi_avg_fn=update)
    model.requires_grad_(False)
    return model.eval()
