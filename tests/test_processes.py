"""Which process this is, by what srun, torchrun and Lightning leave in the environment."""

from __future__ import annotations

import os

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from fasthmr.cli import UsageError
from fasthmr.processes import Process, environment, stage_of_its_own

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SBATCH = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
}  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """Gives this process an environment."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def start(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    ("values", "process", "size"),
    [
        ({}, Process(), 1),
        (TORCHRUN, Process(5, 4, 2, "torchrun"), 8),
        (SRUN, Process(5, 4, 2, "srun"), 8),
        (SBATCH | TORCHRUN, Process(5, 4, 2, "torchrun"), 8),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, Process(1, 1, 1, "lightning"), 1),
        ({"NODE_RANK": "1"}, Process(1), 1),
    ],
)
def test_what_the_environment_says(values, process, size, started):
    started(values)
    assert Process.this() == process and Process.this().size == size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (SBATCH, "has 8 tasks, and this is none of them: start the command with srun"),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, "'interactive', and each of its 8 tasks would train alone: rename"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS_PER_NODE"}, "give it --ntasks-per-node"),
    ],
)
def test_jobs_whose_tasks_would_not_find_each_other_are_refused(values, message, started):
    started(values)
    with pytest.raises(UsageError, match=message):
        Process.this()


def test_lightnings_own_requeueing_is_off_and_a_single_process_does_not_look_for_others(started):
    assert environment(alone=True) == [] == environment(alone=False)
    started(SRUN)
    (slurm,) = environment(alone=False)
    assert isinstance(slurm, SLURMEnvironment) and not slurm.auto_requeue
    (alone,) = environment(alone=True)
    assert isinstance(alone, LightningEnvironment)


def test_a_stage_leaves_nothing_of_what_lightning_set(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with stage_of_its_own():
        os.environ |= {"MASTER_ADDR": "second", "LOCAL_RANK": "0"}
    assert os.environ["MASTER_ADDR"] == "first" and "LOCAL_RANK" not in os.environ
