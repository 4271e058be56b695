"""From which checkpoint a run goes on, its own before a given one and never from half of one, and with which config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from fasthmr.checkpoint_files import write_checkpoint
from fasthmr.cli import UsageError
from fasthmr.fit import FitCLI
from fasthmr.resume import checkpoint_to_resume, require_resumable

ROOT = Path(__file__).parents[1]


def checkpoint(path: Path, step: int) -> Path:
    write_checkpoint(path, {"global_step": step, "state_dict": {"w": torch.ones(1000)}})
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of the steps 4 (the best), 6 and 8 (the last)."""
    for name, step in (("best", 4), ("step", 6), ("last", 8)):
        checkpoint(tmp_path / f"run/checkpoints/{name}.ckpt", step)
    return tmp_path / "run"


def test_a_new_run_starts_anew_or_from_what_it_was_given(tmp_path):
    given = checkpoint(tmp_path / "given.ckpt", 3)
    assert checkpoint_to_resume(tmp_path / "run", None) is None
    assert checkpoint_to_resume(tmp_path / "run", "auto") is None
    assert checkpoint_to_resume(tmp_path / "run", str(given)) == given
    for ckpt_path, message in (("last", "there is no checkpoint at"), ("missing", "there is no file missing")):
        with pytest.raises(UsageError, match=message):
            checkpoint_to_resume(tmp_path / "run", ckpt_path)


def test_a_run_goes_on_only_if_asked(run, tmp_path):
    for ckpt_path in ("last", "auto"):
        assert checkpoint_to_resume(run, ckpt_path) == run / "checkpoints/last.ckpt"
    assert checkpoint_to_resume(run, f"{run}/checkpoints/best.ckpt") == run / "checkpoints/best.ckpt"
    for ckpt_path in (None, str(checkpoint(tmp_path / "given.ckpt", 3))):
        with pytest.raises(UsageError, match="already holds a run"):
            checkpoint_to_resume(run, ckpt_path)


def test_a_job_that_slurm_starts_again_goes_on_from_its_own_whatever_it_was_given(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    given = checkpoint(tmp_path / "given.ckpt", 30)
    for ckpt_path in (None, "last", "auto", str(given)):
        assert checkpoint_to_resume(run, ckpt_path) == run / "checkpoints/last.ckpt"
        # Stopped before its first checkpoint:
        assert checkpoint_to_resume(tmp_path / "new", ckpt_path) == (given if ckpt_path == str(given) else None)


@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty"])
def test_half_a_checkpoint_is_named_and_the_one_before_is_used(damage, run, caplog):
    last = run / "checkpoints/last.ckpt"
    content = last.read_bytes()
    hole = len(content) // 2
    damaged = {"cut": content[:hole], "zeroed": content[:hole] + bytes(500) + content[hole + 500 :], "empty": b""}
    last.write_bytes(damaged[damage])
    (run / "checkpoints/best.ckpt").touch()  # newer by the clock, but not by its step
    assert checkpoint_to_resume(run, "last") == run / "checkpoints/step.ckpt"
    assert str(last) in caplog.text and "going on from" in caplog.text and "of step 6" in caplog.text
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="no other checkpoint is whole: remove"):
        checkpoint_to_resume(run, "last")


# ---- with which config -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*:", "ignore:LightningCLI's args parameter")
def test_a_key_that_is_younger_than_the_run_had_its_default_then(run):
    cli = FitCLI(["-c", str(ROOT / "conf/progressive_tiny.yaml")])
    then, now = yaml.safe_load(cli.resolved), yaml.safe_load(cli.resolved)
    for key in ("resample", "weights", "max_damaged", "shard_cache"):
        del then["data"]["init_args"][key]
    for key in ("mask_people", "teacher", "teacher_steps"):
        del then["model"]["init_args"][key]
    del then["model"]["init_args"]["net"]["architecture"], then["model"]["init_args"]["loss"]["feature"]
    merging, *_ = then["trainer"]["callbacks"]
    del merging["init_args"]["moments"]
    then["trainer"]["callbacks"].append({"class_path": "watches.and.is.gone"})

    def resume() -> None:
        (run / "config.yaml").write_text(yaml.safe_dump(then))
        require_resumable(run / "checkpoints/last.ckpt", now, cli.completed)

    resume()
    for section, key, was, value in (
        (now["data"]["init_args"], "data.init_args.resample", True, False),
        (now["model"]["init_args"]["loss"], "model.init_args.loss.feature", 0.0, 1.0),
        (now["trainer"]["callbacks"][0]["init_args"], "trainer.callbacks.moments", "later", "zero"),
    ):
        name = key.rpartition(".")[2]
        default, section[name] = section[name], value
        with pytest.raises(UsageError, match=rf"another config \({key}: {was} -> {value}\)"):
            resume()
        section[name] = default

    then["trainer"] |= {"callbacks": merging, "logger": {"class_path": "is.gone.too"}}
    resume()
    then["model"]["init_args"]["net"]["old_size"] = 3
    with pytest.raises(UsageError, match=r"config.yaml is of another version of this project.*'old_size'"):
        resume()
    for damaged in ("", "trainer: null", "trainer: [", "[]"):
        (run / "config.yaml").write_text(damaged)
        with pytest.raises(UsageError, match="is of another version of this project, or damaged"):
            require_resumable(run / "checkpoints/last.ckpt", now, cli.completed)
