"""Precision: bfloat16 where there are instructions for it, unless something else is asked for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_fit import QUICK, TINY_NET, tiny_data

from fasthmr.fit import FitCLI, fit
from fasthmr.precision import autocast, chosen_precision, has_bf16

#: what `torch.cpu.get_capabilities` says of some CPUs
LAPTOP = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}
SERVERS = ({"avx2": True, "avx512_bf16": True}, {"amx_bf16": True}, {"neon": True, "bf16": True})


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """Let torch see another CPU, and no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda capabilities: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize("server", SERVERS)
def test_auto_takes_bf16_where_there_are_instructions_for_it(on_cpu, server):
    on_cpu(server)
    assert has_bf16("cpu") and chosen_precision("auto", "cpu") == "bf16"
    on_cpu(LAPTOP)
    assert not has_bf16("cpu") and chosen_precision("auto", "cpu") == "32"


def test_of_a_gpu_what_torch_says_of_it_without_emulation(monkeypatch):
    """Torch tells of the current one: here the second of two can."""
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == "cuda:1" and not including_emulation
    )
    assert has_bf16("cuda:1") and not has_bf16("cuda:0")


def test_of_a_cpu_what_onednn_says_where_torch_is_older(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_bf16("cpu") == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_what_is_asked_for_is_done(on_cpu):
    on_cpu(LAPTOP)
    assert chosen_precision("bf16", "cpu") == "bf16"
    on_cpu(SERVERS[0])
    assert chosen_precision("32", "cpu") == "32"
    with pytest.raises(ValueError, match="precision must be one of auto, bf16, 32, got '16'"):
        chosen_precision("16", "cpu")


def test_a_product_under_autocast_has_it(on_cpu):
    on_cpu(LAPTOP)
    a = torch.ones(2, 2)
    for choice, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16), ("32", torch.float32)):
        with autocast(choice, "cpu"):
            assert (a @ a).dtype == dtype


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(("capabilities", "expected"), [(LAPTOP, "32-true"), (SERVERS[0], "bf16-mixed")])
def test_training_does_so_unless_its_config_says_otherwise(on_cpu, capabilities, expected):
    on_cpu(capabilities)
    config = ["-c", "conf/encoder_tiny.yaml"]
    assert FitCLI(config).config.trainer.precision == expected
    assert FitCLI([*config, "--trainer.precision=bf16-mixed"]).config.trainer.precision == "bf16-mixed"
    assert FitCLI(["-c", "conf/train_hmr2.yaml"]).config.trainer.precision == "bf16-mixed"


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(("precision", "warned"), [("bf16-mixed", True), ("32-true", False)])
def test_bfloat16_without_instructions_for_it_is_remarked_on(on_cpu, tiny_shards, tmp_path, caplog, precision, warned):
    on_cpu(LAPTOP)
    keys = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), f"--run_dir={tmp_path}", "--trainer.max_epochs=1"]
    fit(["-c", "conf/encoder_tiny.yaml", *keys, f"--trainer.precision={precision}"])
    remarks = [record.getMessage() for record in caplog.records if record.name == "fit"]
    assert any("no instructions for bfloat16" in remark for remark in remarks) == warned
