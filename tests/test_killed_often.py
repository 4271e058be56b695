"""A run that is killed or stopped in the midst of anything ends with the bits, and the curves, of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fit import QUICK, START_TINY, TINY_NET, tiny_data

ROOT = Path(__file__).parents[1]
TWO_PROCESSES = [
    "--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=1", "--trainer.max_epochs=8",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """What a training left: its last checkpoint, and by tag what TensorBoard shows, (step, value)."""

    checkpoint: dict
    curves: dict[str, list[tuple]]


def train(kills: int, folder: Path, shards: Path, *more: str, signals: Path | None = None) -> Ended:
    """36 steps with merges at steps 5 and 17, a validation after every 12 and a checkpoint after every one."""
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
        "lightning.pytorch.callbacks.LearningRateMonitor": {},
        "callbacks.throughput.Throughput": {"every_n_steps": 5},
        "callbacks.pictures.Pictures": {"samples": 1},
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
        "--trainer.check_val_every_n_epoch=4", "--trainer.max_epochs=12", "--trainer.log_every_n_steps=1",
        f"--run_dir={run}", "--ckpt_path=auto", *more,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    processes = "2" if "--trainer.devices=2" in more else "1"
    done = subprocess.run(
        [sys.executable, "-m", "helpers.kill_often", str(kills), processes, str(run), *arguments],
        env=environment, capture_output=True, text=True, cwd=folder, timeout=600,
    )  # fmt: skip
    print(done.stdout)  # the seed
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"kills: {kills}, stops: {0 if signals is None else 3}"
    return Ended(torch.load(run / "checkpoints/last.ckpt", weights_only=True), curves(run))


def curves(run: Path) -> dict[str, list[tuple]]:
    """What depends on the clock has no values."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {
        tag: [(e.step, None if tag.startswith(("throughput/", "processes/")) else e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    images = {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in events.Tags()["images"]}
    return scalars | images


@pytest.fixture(scope="module")
def unbroken(tiny_shards, tmp_path_factory) -> Ended:
    return train(0, tmp_path_factory.mktemp("unbroken") / "of", tiny_shards)


def test_the_curves_of_a_run_have_every_step_once(unbroken):
    steps = {tag: [step for step, _ in shown] for tag, shown in unbroken.curves.items()}
    assert steps["train/loss_total"] == steps["train/grad_norm"] == steps["lr-AdamW/pg1"] == list(range(36))
    assert steps["val/mpjpe_mm"] == [11, 23, 35] and steps["samples/0"] == [12, 24, 36]
    assert steps["throughput/frames_per_s"] == [5, 10, 17, 22, 29, 34], "windows begin anew after validations"
    assert steps["merge/layers"] == steps["merge/plan"] == [0, 5, 17]


def test_five_kills_change_no_bit_and_no_curve(unbroken, tiny_shards, tmp_path):
    require_same(unbroken, train(5, tmp_path / "killed", tiny_shards))


def test_a_signal_in_a_merge_a_validation_and_a_checkpoint(unbroken, tiny_shards, tmp_path):
    signals = tmp_path / "signals"
    require_same(unbroken, train(0, tmp_path / "stopped", tiny_shards, signals=signals))
    assert sorted(file.name for file in signals.iterdir()) == ["checkpoint", "merge", "validation"]


def test_kills_of_either_of_two_processes_change_nothing(tiny_shards, tmp_path):
    unbroken = train(0, tmp_path / "unbroken", tiny_shards, *TWO_PROCESSES)
    assert [step for step, _ in unbroken.curves["processes/waits_most"]] == [5, 10, 17, 22]
    require_same(unbroken, train(3, tmp_path / "killed", tiny_shards, *TWO_PROCESSES))


def require_same(unbroken: Ended, killed: Ended) -> None:
    one, other = unbroken.checkpoint, killed.checkpoint
    assert one["global_step"] == other["global_step"] >= 24
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    moments, others = (c["optimizer_states"][0]["state"] for c in (one, other))
    assert all(torch.equal(v["exp_avg_sq"], others[k]["exp_avg_sq"]) for k, v in moments.items())
    assert len(one["fasthmr"]["merge_plan"]) == len(other["fasthmr"]["merge_plan"]) == 2
    assert unbroken.curves.keys() == killed.curves.keys()
    for tag, shown in unbroken.curves.items():
        assert killed.curves[tag] == shown, tag
