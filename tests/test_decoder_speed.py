"""What `python -m fasthmr.benchmark decoder` times is what it says, and its tables add up."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from fasthmr import benchmark
from fasthmr.speed.decoder import decoder_of, sampling_calls, training_call

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "trained"), [("prior", False), ("decoder", True)])
def test_a_step_of_training_trains(kind, trained):
    """That of the prior trains a new one; that of the decoder its denoiser, and never the prior in it."""
    decoder = decoder_of("tiny")
    before = copy.deepcopy(decoder.state_dict())
    training_call(kind, decoder, 2, CPU)()
    changed = {name.partition(".")[0] for name, value in decoder.state_dict().items() if not value.equal(before[name])}
    assert changed == ({"denoiser"} if trained else set())


def test_sampling_is_of_all_windows(monkeypatch):
    decoder, seen = decoder_of("tiny"), []
    forward = type(decoder).forward
    monkeypatch.setattr(type(decoder), "forward", lambda self, x: seen.append(x.shape) or forward(self, x))
    for call in sampling_calls(decoder, 3, CPU).values():
        call()
    assert seen == [(3, decoder.window, decoder.feature_dim)]


def test_the_tables(capsys):
    assert (
        benchmark.main(["decoder", "--size", "tiny", "--windows", "2", "--training_windows", "1", "--rounds", "1"]) == 0
    )
    printed = capsys.readouterr().out
    rates = {
        name: float(rate)
        for name, rate in re.findall(r"(diffusion|inverse kinematics|both)\D+2 windows\D+(\d+)", printed)
    }
    assert 1 / rates["both"] == pytest.approx(1 / rates["diffusion"] + 1 / rates["inverse kinematics"], rel=0.05)
    trained = re.findall(r"(motion prior|decoder) +│ +([\d.]+) │ +(\d+) │ +([\d.]+)", printed)
    assert [name for name, *_ in trained] == ["motion prior", "decoder"]
    for _, windows, frames, memory in trained:
        assert float(frames) == pytest.approx(81 * float(windows), rel=0.1) and 0.1 < float(memory) < 8


def test_numbers_below_one_are_refused(capsys):
    assert benchmark.main(["decoder", "--size", "tiny", "--windows", "0"]) == 2
    assert "--windows must be 1 or more, got 0" in capsys.readouterr().err
