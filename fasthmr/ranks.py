"""Several processes that share a job: who this one is, which device it works on, and what the others know."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

T = TypeVar("T")


def chosen_device(name: str | None) -> torch.device:
    """The device that `--device` names, the best there is for None; of several processes on GPUs, each has its own.

    Raises:
        ValueError: it is none that torch knows here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    number = _local_rank() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: GPU {number} is not there, torch finds {torch.cuda.device_count()}: use --device cpu "
            "or fewer processes"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def join(device: torch.device) -> tuple[int, int]:
    """(rank, world size), joining the others if torchrun or SLURM's srun started several processes."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend)
        elif SLURMEnvironment.detect() and (slurm := SLURMEnvironment()).world_size() > 1:
            address = f"tcp://{slurm.main_address}:{slurm.main_port}"
            dist.init_process_group(
                backend, init_method=address, rank=slurm.global_rank(), world_size=slurm.world_size()
            )
    return rank(), dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_first_rank(value: T) -> T:
    """The first rank's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(value: T) -> list[T]:
    """The values of all ranks in order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _local_rank() -> int:
    if "LOCAL_RANK" not in os.environ and SLURMEnvironment.detect():
        return SLURMEnvironment().local_rank()
    return int(os.environ.get("LOCAL_RANK", "0"))
