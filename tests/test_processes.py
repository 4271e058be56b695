"""Which process this is, by what srun, torchrun and Lightning leave in the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from fasthmr.cli import UsageError
from fasthmr.fit import fit
from fasthmr.processes import Process, environment, require_gpus, stage_of_its_own

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SBATCH = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_NNODES": "2",
}  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """Gives this process an environment."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning changes it

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


@pytest.mark.parametrize(
    ("values", "keys", "message"),
    [
        (SRUN, ["--trainer.devices=2"], r"`devices=2` .* SLURM `--ntasks-per-node=4` does not match. .* `devices=4`"),
        (SRUN, ["--trainer.num_nodes=3"], r"`num_nodes=3` .* SLURM `--nodes=2` does not match"),
        (TORCHRUN, ["--trainer.devices=3"], r"`devices=3` and `num_nodes=2` .* does not match the world size \(8\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_numbers_of_processes_than_the_job_has_are_refused(values, keys, message, started, tmp_path):
    started(values)
    config = Path(__file__).parents[1] / "conf/encoder_tiny.yaml"
    with pytest.raises(ValueError, match=message):
        fit(["-c", str(config), "--trainer.accelerator=cpu", *keys, f"--run_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    ("accelerator", "devices", "asked"),
    [
        ("gpu", 4, 4),
        ("cuda", "3", 3),
        ("gpu", [0, 2], 3),
        ("auto", "auto", 4),
        ("cpu", 4, 0),
        ("auto", 4, 4),
        ("auto", 1, 1),
    ],
)
def test_fewer_gpus_than_asked_for_are_an_error(accelerator, devices, asked, started, monkeypatch):
    started(SRUN | {"SLURM_GPUS_ON_NODE": "4"})
    for found in range(5):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        if found < asked:
            with pytest.raises(
                UsageError, match=rf"asks for {asked} GPU\(s\) on each node, torch .* finds {found} on "
            ):
                require_gpus(accelerator, devices)
        else:
            require_gpus(accelerator, devices)


def test_without_a_job_auto_takes_what_there_is(started, monkeypatch):
    started({})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    require_gpus("auto", 4)
    with pytest.raises(UsageError, match="asks for 1 GPU"):
        require_gpus("gpu", "auto")


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
