"""Layers that train compiled learn the same, merge while they train, and resume with the same bits."""

from __future__ import annotations

import dataclasses
import shutil

import lightning as L
import pytest
import torch
from progressive_run import NET, train
from tiny_training import Seen

from callbacks.compile_layers import CompileLayers
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.merging import TokenMerging

#: without dropped branches, which draw other random numbers when they are compiled; one layer merges tokens
WITHOUT_DROPS = dataclasses.replace(NET, drop_path=0.0, token_merging=TokenMerging(keep_tokens=100, per_layer=92))


class Compiled(L.Callback):
    """Writes down how many layers are compiled at each step."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, *args: object) -> None:
        self.layers.append(sum(x._compiled_call_impl is not None for x in pl_module.net.backbone.layers))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the CPU needs a C++ compiler, and g++ is not installed")
def test_compiled_layers_learn_the_same_and_resume_bit_for_bit(tiny_shards, tmp_path):
    _, plain = train(tiny_shards, tmp_path / "plain", net=WITHOUT_DROPS)
    seen = Compiled()
    _, compiled = train(tiny_shards, tmp_path / "compiled", net=WITHOUT_DROPS, callbacks=[CompileLayers(), seen])
    assert seen.layers == [6] * 4 + [5] * 4 + [4] * 4, "two were merged meanwhile"
    assert compiled.net.merge_plan == plain.net.merge_plan
    one, other = (torch.cat([v.flatten() for v in m.net.state_dict().values()]) for m in (compiled, plain))
    # twelve steps of Adam move a weight by up to 1e-2, and it makes much of rounding where a gradient is all but zero
    assert (one - other).abs().mean() < 1e-5 and (one - other).abs().max() < 1e-3
    assert not torch.equal(one, other), "or nothing was compiled"
    assert all(m._compiled_call_impl is None for m in compiled.modules()), "what trained is usable without a compiler"

    _, resumed = train(
        tiny_shards, tmp_path / "resumed", resume=tmp_path / "compiled/step6.ckpt", net=WITHOUT_DROPS,
        callbacks=[CompileLayers()],
    )  # fmt: skip
    for name, value in compiled.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_has_no_such_layers_is_refused():
    with pytest.raises(ValueError, match=r"layers of an encoder, got Seen: take it out of trainer.callbacks"):
        CompileLayers().on_train_start(L.Trainer(logger=False), Seen())


def test_without_a_compiler_it_says_so_before_it_trains(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    module = MergedEncoderModule(NET)
    with pytest.raises(ValueError, match=r"there is no no-such-compiler: install it, .*CXX"):
        CompileLayers().on_train_start(L.Trainer(logger=False), module)
    assert all(m._compiled_call_impl is None for m in module.modules())
