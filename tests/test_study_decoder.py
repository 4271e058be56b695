"""docs/study_decoder.py makes every table, on nets and clips of seconds, and repeats nothing that is done."""

from __future__ import annotations

import dataclasses
import json
import os
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import study_decoder
import study_runs
import torch
from tiny_decoder import ENCODER, make_clips

from fasthmr.body import load_body
from fasthmr.checkpoint import save_encoder
from fasthmr.fit import fit
from fasthmr.models.hmr import HMR

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def forked_command(arguments: Sequence[str], log: Path) -> int:
    """`study_runs.run_command` without the seconds that a new interpreter takes to import everything."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                fit(list(arguments))
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)  # what pytest does at an exit is the parent's to do


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name, lengths in (("train", (12, 15)), ("val", (12,))):
        make_clips(folder / name, lengths)
    torch.manual_seed(0)
    save_encoder(folder / "encoder.ckpt", HMR(dataclasses.replace(ENCODER, vit_depth=5)), load_body().id)
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    out = ["--out", str(folder / "out"), "--quick", "--sizes", "3x32", "--jobs", "1"]
    return [str(folder / "encoder.ckpt"), "--features_data", str(folder), *out, *more]


def rows_of(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"]


def test_every_table_and_nothing_twice(folder, monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    monkeypatch.setattr(study_runs, "run_command", forked_command)
    assert study_decoder.main(arguments(folder)) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert printed.count("**") == 2 * 8
    assert len(rows) == 8 * 2 + (1 + 1) + 3 + 4 + 2 + 4 + 4 + 2 + 6
    named = {row[0]: row for row in rows}
    assert [named[name][1] for name in ("noise", "v", "v and noise")] == ["998", "999", "999"]
    assert [named[name][1] for name in ("joints and twists", "6D rotations")] == ["133", "144"]
    # What is measured anew, with the settings of the training's own validation, is what that measured.
    trained = named["3 x 32"][3:]
    assert trained == named["joints and twists"][4:] == named["1"][1:] == named["naive"][1:]
    diffused = {tuple(row[:2]): row[2:] for row in rows if len(row) == 6 and row[0] in study_decoder.DIFFUSED.values()}
    assert diffused["corrections to the encoder's", "80% of windows"] == trained
    assert diffused["corrections to the encoder's", "as any other"] == named["v and noise"][2:]
    evenly = folder / "out/decoder_both_corrections_last0_merged_of_prior_3x32_joints_twists_seed0/config.yaml"
    assert "last_step_share: 0.0" in evenly.read_text()
    assert diffused["poses", "80% of windows"] != trained
    assert named["decoder, detail filtered by 3 frames"][1:] == trained != named["decoder, detail stays lost"][1:]
    accelerations = [float(named[f"filtered, deviation of {d} frames"][3]) for d in (1, 2, 3)]
    assert accelerations == sorted(accelerations, reverse=True)
    for other in (named["10"][1:], named["adaptive"][1:], named["noise"][2:], named["6D rotations"][4:]):
        assert other != trained
    alone = named["encoder alone, per frame"]
    assert ["merged tokens", "encoder alone", *alone[3:]] in rows and alone[-1] == "1.00"
    run = "decoder_both_corrections_last0.8_merged_of_prior_3x32_joints_twists_seed0"
    done = json.loads((folder / "out" / run / "done.json").read_text())
    assert trained[1] == f"{done['metrics']['val/mpjpe_mm']:.1f}"

    monkeypatch.setattr(study_runs, "run_command", lambda *_: pytest.fail("a finished run was repeated"))
    assert study_decoder.main(arguments(folder)) == 0
    assert rows_of(capsys.readouterr().out) == rows
    assert study_decoder.main(arguments(folder, "--epochs", "3")) == 2
    assert "was made from something else (epochs: 2 -> 3): choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sizes", "9"], "--sizes must be LATENTSxWIDTH, such as 9x192, got '9'"),
        (["--sizes", "3x31", "--out", "{}/odd"], "the width of latents must be a multiple of 2, the heads, got 31"),
        (["--epochs", "0"], "--epochs must be 1 or more, got 0"),
    ],
)
def test_mistakes(folder, more, message, monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    monkeypatch.setattr(study_decoder.Study, "compute_features", lambda self: None)
    assert study_decoder.main(arguments(folder, *(text.format(folder) for text in more))) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_fails_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study_runs, "run_command", lambda *_: 1)
    with pytest.raises(study_runs.StudyError, match=r"a_run failed: see .*a_run/log\.txt"):
        study_runs.train(DOCS.parent / "conf/prior_tiny.yaml", {"trainer": {}}, tmp_path / "a_run", {})
