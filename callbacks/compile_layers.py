"""CompileLayers: an encoder's layers train by torch.compile, which fuses what lies between their matrix products."""

from __future__ import annotations

import os
import shutil

import lightning as L
import torch

from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.models.vit import Block


class CompileLayers(L.Callback):
    """Compiles the layers that train when training starts, and ends with the training.

    Layers are compiled one by one, and equal ones share a program: that takes seconds, not minutes, weights keep their
    names, and layers can be merged while training runs. Of layers that merge tokens the feed-forward network is
    compiled. The average of the weights, by which is validated, is not. Numbers differ from those without by rounding,
    and by other random numbers where `drop_path` is not 0.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compile.

        Raises:
            ValueError: the module is no encoder, or there is no C++ compiler, which the CPU needs.
        """
        if not isinstance(pl_module, MergedEncoderModule):
            raise ValueError(
                f"CompileLayers compiles the layers of an encoder, got {type(pl_module).__name__}: take it out of "
                "trainer.callbacks"
            )
        compiler = os.environ.get("CXX", "g++")
        if pl_module.device.type == "cpu" and shutil.which(compiler) is None:
            raise ValueError(
                f"CompileLayers needs a C++ compiler on the CPU, and there is no {compiler}: install it, name another "
                "in the environment variable CXX, or take CompileLayers out of trainer.callbacks"
            )
        layers = pl_module.net.backbone.layers
        # each layer's drop_path is a constant of its program, and so are the shapes of those that merge tokens
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(layers))
        for part in _parts(layers):
            part.compile(dynamic=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, MergedEncoderModule):
            for part in _parts(pl_module.net.backbone.layers):
                part._compiled_call_impl = None


def _parts(layers: list[Block]) -> list[torch.nn.Module]:
    """What is compiled: whole layers, and the feed-forward networks for layers that are not called as a whole."""
    return [part for layer in layers for part in (layer, layer.mlp)]
