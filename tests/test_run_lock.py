"""One run folder, one run: the second is refused by name, and what a dead one left does not count."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fasthmr.cli import UsageError
from fasthmr.run_lock import LOCK_FILE, locked

HOLD = "import sys, time; from pathlib import Path; from fasthmr.run_lock import locked\nwith locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"  # noqa: E501


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "SLURM_JOB_ID": "17"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_refused_until_the_first_has_died(holder, tmp_path, caplog):
    with (
        pytest.raises(UsageError, match=rf"another run \(process {holder.pid} on .* of SLURM job 17\): wait for it"),
        locked(tmp_path / "run"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"was left by process {holder.pid}" in caplog.text


def test_where_locks_do_not_reach_other_nodes_slurm_is_asked(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text(json.dumps({"host": "n7", "pid": 1, "job": "17"}))
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    squeue.write_text("#!/bin/sh\necho 17\n")
    squeue.chmod(0o755)
    with pytest.raises(UsageError, match="process 1 on n7 of SLURM job 17"), locked(tmp_path / "run"):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # this very job, started again
    with locked(tmp_path / "run"):
        pass
    monkeypatch.delenv("SLURM_JOB_ID")
    squeue.write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "run" / LOCK_FILE).write_text("{half")
    with locked(tmp_path / "run"):
        pass


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with locked(tmp_path / "runs/a/b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs/a/b"):
        (tmp_path / "runs/a/b/config.yaml").touch()
    assert (tmp_path / "runs/a/b/config.yaml").exists()
