"""AdamW with two decay groups, warm-up and cosine: the optimiser that every module here uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimiser.

    Args:
        lr: peak learning rate.
        weight_decay: AdamW's decoupled decay, on matrices only (vectors are norms, biases and tokens).
        betas: AdamW's moment coefficients.
        warmup_steps: optimiser steps of linear warm-up from 0.
        final_lr_fraction: the cosine ends at this fraction of `lr`.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 100
    final_lr_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr must be positive, got {self.lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be 0 or more, got {self.warmup_steps}")


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Split trainable parameters into a decayed and an undecayed group.

    There are always exactly two groups, whatever the depth: merging layers during training must not change the number
    of groups, or optimiser states and schedulers of a checkpoint would not load.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Learning-rate factor of each step: linear from 0 to 1, then a cosine down to `final_lr_fraction`."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine

    return factor


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over `module`'s trainable parameters and its schedule, to be stepped once per optimiser step."""
    optimizer = torch.optim.AdamW(decay_groups(module, config.weight_decay), lr=config.lr, betas=config.betas)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config, total_steps))
