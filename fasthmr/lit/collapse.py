"""Merging layers of a model that is being trained: networks, optimiser states and the DDP wrapper together."""

from __future__ import annotations

import gc
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.merging import LayerMergePlan, MergeEvent

#: what becomes of the Adam moments of a merged layer. Its weights are mostly the LATER layer's (of two layers exactly:
#: FastHMR, Eq. 4), so the moments of the layer whose tensors survive, the earlier one, would not belong to them.
Moments = Literal["later", "reset"]


def require_mergeable(strategy: Strategy) -> None:
    """Refuse strategies under which layers cannot be merged while training.

    Raises:
        ValueError: naming the strategy.
    """
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ValueError(
            f"layers can be merged during training on one device and under DDP, not under {type(strategy).__name__}: "
            "set trainer.strategy to auto or ddp, or merge afterwards with `python -m fasthmr.merge`"
        )


def collapse_while_training(
    trainer: L.Trainer, module: MergedEncoderModule, plan: LayerMergePlan, moments: Moments = "later"
) -> None:
    """Bring a running model from its merge plan to `plan`, between two optimiser steps, on all ranks at once.

    The network and its moving average are merged the same way. Surviving parameters keep their identity, so the
    optimiser, its scheduler and everything that refers to them go on; those of removed layers leave the optimiser. A
    DDP wrapper is rebuilt: the old one would wait for gradients of layers that are gone.

    Args:
        trainer: at `on_train_batch_start`, with no gradients waiting to be accumulated.
        module: the model.
        plan: continues the model's own.
        moments: what the merged layers' Adam moments become: those of the later layer, or nothing.

    Raises:
        ValueError: the plan does not continue the model's, or the strategy cannot do it; nothing was changed.
    """
    strategy = trainer.strategy
    require_mergeable(strategy)
    events = plan.after(module.net.merge_plan)
    module.net.backbone.tokens_merged(len(plan.layers))
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)
        for event in events:
            _move_moments(optimizer, module, event, moments)
    if wrapped:
        strategy.model = module
        gc.collect()  # the old wrapper's hooks sit on the surviving parameters until it is gone
    for net in module.nets:
        net.merge_layers(plan)
    alive = {id(p) for p in module.trained_parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in alive]
        for parameter in [p for p in optimizer.state if id(p) not in alive]:
            del optimizer.state[parameter]
    if wrapped:
        assert isinstance(strategy, DDPStrategy)
        strategy.configure_ddp()
    _check(trainer, module, wrapped)


def _move_moments(
    optimizer: torch.optim.Optimizer, module: MergedEncoderModule, event: MergeEvent, moments: Moments
) -> None:
    blocks = module.net.backbone.blocks
    later = dict(blocks[str(event.drop[-1])].named_parameters())
    for name, parameter in blocks[str(event.keep)].named_parameters():
        state = optimizer.state.pop(later[name], None)
        optimizer.state.pop(parameter, None)
        if moments == "later" and state is not None:
            optimizer.state[parameter] = state


def _check(trainer: L.Trainer, module: MergedEncoderModule, wrapped: bool) -> None:
    """Mistakes here would train on without an error: ranks would drift apart, checkpoints could not be resumed."""
    assert isinstance(trainer.strategy.model, DistributedDataParallel) == wrapped
    optimised = [id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]]
    assert sorted(optimised) == sorted(id(p) for p in module.trained_parameters())
    checksum = _checksum(module)
    everywhere = trainer.strategy.reduce(checksum.clone(), reduce_op="mean")
    assert torch.allclose(torch.as_tensor(everywhere), checksum, rtol=1e-12, atol=0), "ranks hold different weights"


def _checksum(module: MergedEncoderModule) -> Tensor:
    return torch.stack([p.detach().double().abs().sum() for p in module.trained_parameters()]).sum()
