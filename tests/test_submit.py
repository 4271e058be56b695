"""slurm/submit.py: one job a stage, each after the one before, with the options that are for it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from fasthmr.cli import UsageError

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "conf/pretrain_tiny.yaml")


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """The script's function, with an sbatch that only writes down what it is given; returns that, a line a job."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nwc -l < {tmp_path}/called\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    spec = importlib.util.spec_from_file_location("submit", ROOT / "slurm/submit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> list[str]:
        module.submit(list(arguments))
        return (tmp_path / "called").read_text().splitlines()

    return run


def test_every_stage_waits_for_the_one_before(submit):
    options = ["--sbatch=--nodes=2 --time=10", "--sbatch.full=--nodes=4"]
    first, second, third, fourth = submit("-c", RECIPE, "--name=mine", *options, "--trainer.max_epochs=3")
    arguments = f"{ROOT}/slurm/fit.sbatch -c {RECIPE} --name=mine --trainer.max_epochs=3"
    assert first == f"--parsable --job-name=mine-merged --nodes=2 --time=10 {arguments} --stage merged"
    assert second == (
        "--parsable --job-name=mine-full --nodes=2 --time=10 --nodes=4 --dependency=afterok:1 "
        f"--kill-on-invalid-dep=yes {arguments} --stage full"
    )
    for job, stage in ((third, "more"), (fourth, "many")):
        assert "--dependency=afterok:" in job and job.endswith(f"{arguments} --stage {stage}")


def test_one_stage_alone(submit):
    (job,) = submit("-c", RECIPE, "--stage", "full")
    assert job.endswith(f"-c {RECIPE} --stage full") and "dependency" not in job


def test_mistakes_are_named_before_anything_is_submitted(submit, tmp_path):
    for arguments, message in (
        (["-c", str(ROOT / "conf/encoder_tiny.yaml")], "this is for recipes"),
        (["-c", RECIPE, "--sbatch.ful=--nodes=2"], "--sbatch.ful: the recipe's stages are merged, full, more, many"),
    ):
        with pytest.raises(UsageError, match=message):
            submit(*arguments)
    assert not (tmp_path / "called").exists()
