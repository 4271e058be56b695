"""Signals that ask a command to stop: held until a step ends, at once where nothing is to be saved, deaf children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from slurm_lab import wait_until

from fasthmr import stopping

ROOT = Path(__file__).parents[1]

#: says that it listens, then what it was asked; with `held` it has something to save, with `slow` its step is long
PROGRAM = """
import subprocess, sys, time
from fasthmr import stopping
stopping.listen()
stopping.hold("held" in sys.argv)
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); print('child is alive')"],
                         stdin=subprocess.PIPE)
print("listening", child.pid, flush=True)
while stopping.asked() is None:
    time.sleep(0.01)
print("asked by", stopping.asked().name, flush=True)
time.sleep(2 if "slow" in sys.argv else 0)
child.communicate()
"""


def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen, int]:
    """The program, once it listens, and its child."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    return program, int(program.stdout.readline().split()[1])


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_what_has_something_to_save_is_asked_and_its_children_live_on(sent):
    program, child = start("held")
    for process in (child, program.pid):  # as SLURM does
        os.kill(process, sent)
    said, _ = program.communicate(timeout=60)
    assert said.splitlines() == [f"asked by {sent.name}", "child is alive"]
    assert program.returncode == 0


def test_what_has_nothing_to_save_leaves_at_once_and_has_its_job_requeued(tmp_path):
    fake_scontrol(tmp_path, "RUNNING")
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}
    for asks in ("0", "1"):
        program, _ = start(FASTHMR_REQUEUE=asks, **job)
        os.kill(program.pid, signal.SIGUSR1)
        _, said = program.communicate(timeout=60)
        assert program.returncode == stopping.EXIT_CODE and "SIGUSR1: there is nothing to save yet" in said
        assert (tmp_path / "called").exists() == (asks == "1")
    assert (tmp_path / "called").read_text() == "show job 17\nrequeue 17\n"


def test_a_step_that_outlasts_the_grace_costs_steps_but_not_the_job(tmp_path):
    fake_scontrol(tmp_path, "RUNNING")
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "FASTHMR_REQUEUE": "1"}
    for process, grace_s, requeued in (("0", "120", False), ("1", "0", False), ("0", "0", True)):
        program, _ = start("held", "slow", FASTHMR_GRACE_S=grace_s, SLURM_PROCID=process, **job)
        os.kill(program.pid, signal.SIGUSR1)
        program.communicate(timeout=60)
        assert (tmp_path / "called").exists() == requeued
    assert (tmp_path / "called").read_text() == "show job 17\nrequeue 17\n"


def test_a_signal_while_data_do_not_come_costs_steps_but_not_the_run(tmp_path):
    fake_scontrol(tmp_path, "RUNNING")
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17", "FASTHMR_REQUEUE": "1", "FASTHMR_GRACE_S": "21",
    }  # fmt: skip
    command = [sys.executable, "-m", "helpers.stalled", str(tmp_path)]
    asked, called, last = (tmp_path / name for name in ("asked", "called", "last.ckpt"))
    program = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: asked.exists() and asked.read_text() == "x" * 6, 60, "the sixth sample")
    wait_until((tmp_path / "step 5").exists, 60, "step 5")
    time.sleep(0.2)  # in which its callbacks end
    os.killpg(program.pid, signal.SIGUSR1)
    wait_until(lambda: called.exists() and "requeue 17" in called.read_text(), 60, "the requeue")
    assert program.poll() is None
    os.killpg(program.pid, signal.SIGKILL)  # as SLURM does with a job that is requeued
    _, said = program.communicate(timeout=60)
    assert "SIGUSR1: stopping after this step" in said and "goes on from its last checkpoint" in said
    assert torch.load(last, weights_only=True)["global_step"] == 4
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.stdout.splitlines()[-1] == "steps: 8 8.0", again.stderr


def test_a_cancelled_job_is_not_requeued(monkeypatch, caplog, tmp_path):
    fake_scontrol(tmp_path, "CANCELLED")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stopping.requeue()
    assert (tmp_path / "called").read_text() == "show job 17\n" and "job 17 was cancelled" in caplog.text


def fake_scontrol(folder: Path, state: str) -> None:
    """A `scontrol` that notes what it is asked, and says that every job is in this state."""
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\necho "JobId=17 JobState={state}"\n')
    program.chmod(0o755)


def test_a_job_that_cannot_be_requeued_is_named(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stopping.requeue()
    assert "job 17 could not be requeued" in caplog.text
