"""A run that is killed or stopped in the midst of anything ends with the bits of one that was not, merges included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_fit import QUICK, START_TINY, TINY_NET, tiny_data

ROOT = Path(__file__).parents[1]
KILLS = 10


def train(kills: int, folder: Path, shards: Path, signals: Path | None = None) -> dict:
    """36 steps with merges at steps 5 and 17, validations and a checkpoint after every step; the last checkpoint."""
    progressive = {
        "calibration": str(shards), "budget_mm": 1000.0, "at_steps": [5, 17], "frames_per_clip": 2, "max_clips": 2,
        "target_layers": 4,
    }  # fmt: skip
    saving = {
        "dirpath": "${run_dir}/checkpoints", "filename": "step", "every_n_train_steps": 1, "save_last": True,
        "enable_version_counter": False,
    }  # fmt: skip
    callbacks = {
        "callbacks.progressive.ProgressiveMerging": progressive,
        "lightning.pytorch.callbacks.ModelCheckpoint": saving,
    }
    if signals is not None:
        callbacks = {"helpers.signal_during.SignalDuring": {"folder": str(signals)}, **callbacks}
    listed = [{"class_path": path, "init_args": arguments} for path, arguments in callbacks.items()]
    folder.mkdir()
    (folder / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
    run = folder / "run"
    arguments = [
        "-c", str(ROOT / "conf/progressive_tiny.yaml"), "-c", str(folder / "callbacks.yaml"), *TINY_NET, *START_TINY,
        "--model.init_args.net.vit_depth=6", *QUICK, *tiny_data(shards), "--trainer.limit_val_batches=1",
        "--trainer.check_val_every_n_epoch=4", "--trainer.max_epochs=12", f"--run_dir={run}", "--ckpt_path=auto",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.kill_often", str(kills), str(run), *arguments],
        env=environment, capture_output=True, text=True, cwd=folder, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"kills: {kills}, stops: {0 if signals is None else 3}"
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(tiny_shards, tmp_path_factory) -> dict:
    return train(0, tmp_path_factory.mktemp("unbroken") / "of", tiny_shards)


def test_ten_kills_change_no_bit(unbroken, tiny_shards, tmp_path):
    require_same(unbroken, train(KILLS, tmp_path / "killed", tiny_shards))


def test_a_signal_in_a_merge_a_validation_and_a_checkpoint(unbroken, tiny_shards, tmp_path):
    signals = tmp_path / "signals"
    require_same(unbroken, train(0, tmp_path / "stopped", tiny_shards, signals))
    assert sorted(file.name for file in signals.iterdir()) == ["checkpoint", "merge", "validation"]


def require_same(unbroken: dict, killed: dict) -> None:
    assert unbroken["global_step"] == killed["global_step"] == 36
    assert unbroken["state_dict"].keys() == killed["state_dict"].keys()
    assert all(torch.equal(value, killed["state_dict"][name]) for name, value in unbroken["state_dict"].items())
    moments, others = (c["optimizer_states"][0]["state"] for c in (unbroken, killed))
    assert all(torch.equal(v["exp_avg_sq"], others[k]["exp_avg_sq"]) for k, v in moments.items())
    assert len(unbroken["fasthmr"]["merge_plan"]) == len(killed["fasthmr"]["merge_plan"]) == 2
