"""Layers that are compiled while they train learn the same, merge meanwhile, and resume with the same bits."""

from __future__ import annotations

import dataclasses
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from progressive_run import NET, train
from tiny_training import Seen

from callbacks.compile_layers import CompileLayers
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.merging import TokenMerging

#: without dropped branches, which draw other random numbers when they are compiled; one layer merges tokens
WITHOUT_DROPS = dataclasses.replace(NET, drop_path=0.0, token_merging=TokenMerging(keep_tokens=100, per_layer=92))

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the CPU needs a C++ compiler, and g++ is not installed"
)


class Compiled(L.Callback):
    """Writes down how many layers are compiled at each step, and that those that validate are not."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, *args: object) -> None:
        self.layers.append(sum(x._compiled_call_impl is not None for x in pl_module.net.backbone.layers))

    def on_validation_batch_end(self, trainer, pl_module, *args: object) -> None:
        assert all(x._compiled_call_impl is None for x in pl_module.modules())


def weights(module: MergedEncoderModule) -> torch.Tensor:
    return torch.cat([value.flatten() for value in module.net.state_dict().values()])


@needs_compiler
def test_compiled_layers_learn_the_same_and_resume_bit_for_bit(tiny_shards, tmp_path):
    _, plain = train(tiny_shards, tmp_path / "plain", net=WITHOUT_DROPS)
    seen = Compiled()
    _, compiled = train(tiny_shards, tmp_path / "compiled", net=WITHOUT_DROPS, callbacks=[CompileLayers(), seen])
    assert seen.layers == [6] * 4 + [5] * 4 + [4] * 4, "two were merged meanwhile"
    assert compiled.net.merge_plan == plain.net.merge_plan
    # twelve steps of Adam move a weight by up to 1e-2, and it makes much of rounding where a gradient is all but zero
    differences = (weights(compiled) - weights(plain)).abs()
    assert differences.mean() < 1e-5 and differences.max() < 1e-3
    assert differences.any(), "or nothing was compiled"

    _, resumed = train(
        tiny_shards, tmp_path / "resumed", resume=tmp_path / "compiled/step6.ckpt", net=WITHOUT_DROPS,
        callbacks=[CompileLayers()],
    )  # fmt: skip
    assert torch.equal(weights(resumed), weights(compiled))


@needs_compiler
def test_what_merges_tokens_and_what_does_not_is_compiled(monkeypatch):
    module, called = MergedEncoderModule(WITHOUT_DROPS), []
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *x: called.append(call.__self__) or call(*x))
    compiling = CompileLayers()
    compiling.on_train_start(L.Trainer(logger=False), module)
    module.net(torch.zeros(1, 3, 256, 256), torch.zeros(1, 256, 256, dtype=torch.bool))
    first, *others = module.net.backbone.layers
    assert called[0] is first.mlp and first not in called
    assert all(layer in called for layer in others)


@needs_compiler
def test_nothing_stays_compiled_when_training_fails(tiny_shards, tmp_path, monkeypatch):
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    failed = []

    class Failing(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args: object) -> None:
            failed.append(pl_module)
            assert pl_module.net.backbone.layers[0]._compiled_call_impl is not None
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        train(tiny_shards, tmp_path, callbacks=[CompileLayers(), Failing()])
    assert all(part._compiled_call_impl is None for part in failed[0].modules())
    assert torch._dynamo.config.recompile_limit == limit


@needs_compiler
def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match=r"layers of an encoder, got Seen: take it out of trainer.callbacks"):
        CompileLayers().setup(L.Trainer(logger=False), Seen(), "fit")
    trainer = L.Trainer(logger=False)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match=r"not under FSDPStrategy: take it out"):
        CompileLayers().setup(trainer, MergedEncoderModule(NET), "fit")


def test_without_a_compiler_it_says_so_before_anything_is_done(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"there is no no-such-compiler: install it, .*CXX"):
        CompileLayers()
