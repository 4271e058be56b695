"""FSDP2: of a large encoder's weights, gradients and optimiser states each process holds a share instead of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from fasthmr.lit.encoder import MergedEncoderModule

#: value of `trainer.strategy`
FSDP2 = "fsdp2"


class FSDP2Strategy(DDPStrategy):
    """The processes of DDP, over which an encoder and its moving average are distributed instead of copied.

    The model is built, loaded and merged as under DDP, and distributed after that. Checkpoints hold whole tensors in
    DDP's own format: either goes on from the other's. Lightning's `ModelParallelStrategy` loads after it has
    distributed, when layers can no longer be merged as the checkpoint says, and needs another format.

    Layers are gathered for the forward pass and stay until the backward pass has used them, which saves a third of the
    communication: gradients, moments and averages, which are never whole, take most of the memory.
    """

    def __init__(self) -> None:
        super().__init__()

    def configure_ddp(self) -> None:
        """Distribute the model.

        Raises:
            ValueError: it is no encoder.
        """
        module = self._encoder()
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, src=0)  # as DDP does
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for net in module.nets:
            for block in net.backbone.layers:
                fully_shard(block, mesh=mesh, reshard_after_forward=False)
                register_fsdp_forward_method(block, "forward_merging")
        for rest in (*module.nets, module.token_joints):
            if rest is not None:
                fully_shard(rest, mesh=mesh, reshard_after_forward=False)

    def _encoder(self) -> MergedEncoderModule:
        module = self.lightning_module
        if not isinstance(module, MergedEncoderModule):
            raise ValueError(
                f"strategy {FSDP2} is for MergedEncoderModule, got {type(module).__name__}: set trainer.strategy to ddp"
            )
        return module

    # ---- validation -----------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Gather the weights that validate: processes have different numbers of batches, so none can wait in one."""
        # What is gathered stays, and is trained with later.
        with torch.inference_mode(False), torch.no_grad():
            for module in self._encoder().best_net.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()

    def on_validation_end(self) -> None:
        for module in self._encoder().best_net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU; nothing on other processes than the first. All must ask for them."""
        whole = {name: _whole(tensor) for name, tensor in self._encoder().state_dict().items()}
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As an optimiser under DDP would have it; nothing on other processes than the first. All must ask for it."""
        content: dict[str, Any] = super().optimizer_state(optimizer)
        whole = {i: {name: _whole(v) for name, v in state.items()} for i, state in content["state"].items()}
        return {**content, "state": whole} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take each process' share of whole states."""
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {
                i: {name: _share(value, parameters[i]) for name, value in state.items()}
                for i, state in content["state"].items()
            }
            optimizer.load_state_dict({**content, "state": shares})


StrategyRegistry.register(FSDP2, FSDP2Strategy, description=__doc__, override=True)


def require_supported(strategy: Strategy) -> None:
    """Refuse strategies that distribute a model in a way of their own: ours would not know how to average or save it.

    Raises:
        ValueError: naming the strategy.
    """
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} is not supported: set it to ddp, or to {FSDP2} for an encoder "
            "that does not fit into a device's memory"
        )


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if isinstance(value, Tensor) else value


def _share(value: Any, like: Tensor) -> Any:
    """This process' share of a tensor that is distributed as `like`; what has another shape is no such tensor."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
