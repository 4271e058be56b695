"""Smoothing over time by a Gaussian, around missing frames."""

from __future__ import annotations

import torch
from torch import Tensor


def smoothed(values: Tensor, deviation: float, valid: Tensor | None = None) -> Tensor:
    """Each frame's mean over its neighbours, (B, T, C), weighted by a Gaussian; frames that are missing become 0.

    Args:
        values: (B, T, C) any numbers whose mean means something; where frames are missing they must be finite.
        deviation: of the Gaussian, frames, above 0.
        valid: (B, T) bool, False where a frame is missing; None: all are there.
    """
    time = torch.arange(values.shape[1], dtype=torch.float32, device=values.device)
    weight = torch.exp(-0.5 * ((time[:, None] - time) / deviation) ** 2).expand(len(values), -1, -1)
    if valid is not None:
        weight = weight * (valid[:, None] & valid[..., None])
    return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) @ values.float()
