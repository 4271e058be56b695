"""Runs of a study: trained by the real command and config files; finished ones stay, interrupted ones go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fasthmr.files import write_text

LAST_CHECKPOINT = "checkpoints/last.ckpt"


class StudyError(Exception):
    """The study cannot go on; the message says what, got, do."""


def train(config: Path, overlay: Mapping[str, Any], run_dir: Path, made_from: Mapping[str, Any]) -> dict[str, float]:
    """Train by a config file, one thread, a checkpoint an epoch; returns the metrics of the last validation.

    A run that is finished is not repeated, and an interrupted one goes on.

    Args:
        config: the config file.
        overlay: what lies on top of it, without `run_dir`; its callbacks are all there are, but for the checkpoints.
        run_dir: the run's folder.
        made_from: plain data that the result follows from, besides the config file.

    Raises:
        StudyError: the folder holds a run of something else, or training failed.
    """
    _require_same(run_dir, {"config": digest(config.read_text()), **made_from})
    done = run_dir / "done.json"
    if not done.exists():
        file = run_dir / "overlay.yaml"
        saving = {
            "dirpath": str(run_dir / "checkpoints"), "filename": "newest", "enable_version_counter": False,
            "every_n_epochs": 1, "save_on_train_epoch_end": True, "save_last": True,
        }  # fmt: skip
        checkpoints = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
        callbacks = [*overlay["trainer"].get("callbacks", []), checkpoints]
        trainer = {**overlay["trainer"], "callbacks": callbacks, "enable_progress_bar": False}
        write_text(file, yaml.safe_dump({**overlay, "run_dir": str(run_dir), "trainer": trainer}))
        if run_command(["-c", str(config), "-c", str(file), "--ckpt_path", "auto"], run_dir / "log.txt") != 0:
            raise StudyError(f"{run_dir.name} failed: see {run_dir / 'log.txt'}")
    metrics: dict[str, float] = json.loads(done.read_text())["metrics"]
    if not metrics:
        raise StudyError(f"{run_dir.name} was killed after its last validation and lacks its metrics: remove {run_dir}")
    return metrics


def run_command(arguments: Sequence[str], log: Path) -> int:
    """`python -m fasthmr.fit ARGUMENTS` in a process of one thread; its exit code."""
    with log.open("a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fasthmr.fit", *arguments]
        return subprocess.run(command, env=environment, stdout=file, stderr=file).returncode


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second study out of the same folder, which is made if it is missing.

    Raises:
        StudyError: there is one.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another study is running in {out}: wait for it, or choose another --out") from None
        yield


def digest(values: Any) -> str:
    """16 hex digits of a hash of plain data."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table; floats with one digit after the point."""
    print(f"\n**{title}**\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.1f}' if isinstance(v, float) else str(v) for v in row)} |", flush=True)


def _require_same(run_dir: Path, made_from: Mapping[str, Any]) -> None:
    """Write down what a run is made from, or compare it with what an earlier one in the same folder was made from."""
    file = run_dir / "made_from.json"
    made_from = json.loads(json.dumps(made_from))
    if file.exists():
        before = json.loads(file.read_text())
        keys = dict.fromkeys([*before, *made_from])
        changed = [f"{k}: {before.get(k)} -> {made_from.get(k)}" for k in keys if before.get(k) != made_from.get(k)]
        if changed:
            raise StudyError(f"{run_dir} was made from something else ({'; '.join(changed)}): choose another --out")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(made_from, indent=1))
