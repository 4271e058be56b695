"""Which of a job's processes this is, known before there is a trainer: of SLURM's srun, torchrun or Lightning."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from torch import distributed

from fasthmr.cli import UsageError

#: what Lightning sets for the processes that it starts
_LIGHTNINGS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
#: names of SLURM jobs in which Lightning does not look for other processes
_INTERACTIVE = ("bash", "interactive")


@dataclass(frozen=True)
class Process:
    """This process.

    Args:
        rank: its number among all of the job; 0 is the first.
        per_node: processes on each node, as far as they were there before training; else 1.
        nodes: nodes of the job, as far as that is known; else 1.
        started_by: "srun", "torchrun", "lightning" (for the stage of training that is running), or "" if it is one
            process that a user started.
    """

    rank: int = 0
    per_node: int = 1
    nodes: int = 1
    started_by: str = ""

    @property
    def size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.per_node

    @classmethod
    def this(cls) -> Process:
        """What the environment says.

        Raises:
            UsageError: SLURM gave several tasks in a way that would have each of them train alone.
        """
        env = os.environ
        if int(env.get("SLURM_NTASKS", 1)) > 1 and "TORCHELASTIC_RUN_ID" not in env:
            _require_sound_slurm_job()
        if "TORCHELASTIC_RUN_ID" in env:
            per_node = int(env["LOCAL_WORLD_SIZE"])
            return cls(int(env["RANK"]), per_node, int(env["WORLD_SIZE"]) // per_node, "torchrun")
        if "SLURM_STEP_ID" in env and env.get("SLURM_JOB_NAME") not in _INTERACTIVE:
            nodes = int(env["SLURM_STEP_NUM_NODES"])
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]) // nodes, nodes, "srun")
        node, local = (int(env.get(name, 0)) for name in ("NODE_RANK", "LOCAL_RANK"))
        # Where a user starts one process on each node, only the first of all has rank 0.
        return cls(rank=node + local, started_by="lightning" if local else "")


def _require_sound_slurm_job() -> None:
    tasks, name = os.environ["SLURM_NTASKS"], os.environ.get("SLURM_JOB_NAME")
    if name in _INTERACTIVE:
        raise UsageError(
            f"the SLURM job is called {name!r}, and each of its {tasks} tasks would train alone: rename it"
        )
    if "SLURM_STEP_ID" not in os.environ:
        raise UsageError(f"the SLURM job has {tasks} tasks, and this is none of them: start the command with srun")
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UsageError("the SLURM job does not say how many tasks a node has: give it --ntasks-per-node")


def require_gpus(accelerator: str, devices: int | str | list[int]) -> None:
    """Refuse to train where GPUs were asked for and are not there: Lightning would take the CPU, or name no number.

    Args:
        accelerator: the trainer's; "cpu" asks for none, "auto" for as many as SLURM says that this node has.
        devices: the trainer's.

    Raises:
        UsageError: names how many were asked for, and found.
    """
    named = max(devices) + 1 if isinstance(devices, list) else int(devices) if str(devices).isdigit() else None
    if accelerator in ("gpu", "cuda"):
        asked = named or 1
        by = f"trainer.accelerator: {accelerator} with trainer.devices: {devices} asks"
    elif accelerator == "auto" and "SLURM_STEP_ID" in os.environ:
        granted = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
        asked = granted if named is None else min(granted, named)
        by = f"SLURM job {os.environ.get('SLURM_JOB_ID')} asks"
    else:
        return
    found = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    if found < asked:
        raise UsageError(
            f"{by} for {asked} GPU(s) on each node, torch {torch.__version__} finds {found} on {socket.gethostname()}: "
            "ask for fewer, set trainer.accelerator: cpu, or see that each process sees all GPUs of its node "
            "(nvidia-smi; a torch for CPUs finds none)"
        )


def environment(alone: bool) -> list[ClusterEnvironment]:
    """Lightning's plugin for where this process runs, if it would not find the right one itself.

    Args:
        alone: it trains alone, whatever other processes there are.
    """
    started_by = Process.this().started_by
    if alone and started_by:
        return [LightningEnvironment()]
    # Lightning's own requeueing saves in the middle of a step, and leaves runs hanging: see fasthmr.stopping.
    return [SLURMEnvironment(auto_requeue=False)] if started_by == "srun" else []


@contextmanager
def stage_of_its_own() -> Iterator[None]:
    """A stage of training that leaves no trace of its process group: the next one may run on other processes.

    One that fails ends the command, and leaves the group alone: its other processes may be in the middle of something.
    """
    before = {name: os.environ.get(name) for name in _LIGHTNINGS}
    yield
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
