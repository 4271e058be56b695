"""CompileLayers: while they train, an encoder's layers are compiled by torch.compile, which fuses small operations."""

from __future__ import annotations

import os
import shutil

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from fasthmr.lit.encoder import MergedEncoderModule


class CompileLayers(L.Callback):
    """Compiles the layers that train, for the time of training; validation runs without.

    Layers are compiled one by one, and equal ones share a program: that takes seconds, not minutes, weights keep their
    names, and layers can be merged while training runs. Of layers that merge tokens the feed-forward network is
    compiled. Numbers differ from those without by rounding, and by other random numbers where `drop_path` is not 0; as
    with another device, a run may go on with it that began without.

    Raises:
        ValueError: there is neither a GPU nor a C++ compiler.
    """

    def __init__(self) -> None:
        compiler = os.environ.get("CXX", "g++")
        if not torch.cuda.is_available() and shutil.which(compiler) is None:
            raise ValueError(
                f"CompileLayers needs a C++ compiler on the CPU, and there is no {compiler}: install it, name another "
                "in the environment variable CXX, or take CompileLayers out of trainer.callbacks"
            )
        self._compiled: list[torch.nn.Module] = []
        self._limit = torch._dynamo.config.recompile_limit

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be compiled.

        Raises:
            ValueError: the module is no encoder, or its layers are distributed.
        """
        if not isinstance(pl_module, MergedEncoderModule):
            raise ValueError(
                f"CompileLayers compiles the layers of an encoder, got {type(pl_module).__name__}: take it out of "
                "trainer.callbacks"
            )
        if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise ValueError(
                "CompileLayers compiles layers on one device and under DDP, not under "
                f"{type(trainer.strategy).__name__}: take it out of trainer.callbacks"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._compile(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._undo()  # where there is no average of the weights, what is validated is what trains

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._compile(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._undo()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._undo()

    def _compile(self, pl_module: L.LightningModule) -> None:
        """From now on; programs that were made before are used again."""
        assert isinstance(pl_module, MergedEncoderModule)
        layers = pl_module.net.backbone.layers
        # a layer's drop_path is a constant of its program, and so are the shapes of those that merge tokens
        torch._dynamo.config.recompile_limit = max(self._limit, 2 * len(layers))
        # those that merge tokens are not called as a whole
        self._compiled = [part for layer in layers for part in (layer, layer.mlp)]
        for part in self._compiled:
            part.compile(dynamic=False)

    def _undo(self) -> None:
        for part in self._compiled:
            part._compiled_call_impl = None
        self._compiled = []
        torch._dynamo.config.recompile_limit = self._limit
