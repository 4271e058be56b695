"""One run folder, one run: a lock that says who holds it, and that dies with its holder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fasthmr.cli import UsageError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` within the block; made if it does not exist.

    The system frees the lock when its process ends, however it ends, and shared file systems do so over all nodes. Some
    are mounted so that they do not (Lustre's `localflock`): then a SLURM job that the file names is asked after, too.

    Raises:
        UsageError: another run holds it; says which process of which host and job.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a+") as file:
        holder = _holder(file)
        try:
            # A POSIX lock, unlike flock's, is not handed on to loader processes, which outlive a killed run a little.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(run_dir, holder) from error
        if holder.get("job") not in (None, os.environ.get("SLURM_JOB_ID")) and _is_running(holder["job"]):
            raise _refusal(run_dir, holder)
        if holder:
            log.warning("%s was left by %s, which has ended", run_dir / LOCK_FILE, _told(holder))
        _write(file, {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")})
        try:
            yield
        finally:
            _write(file, {})
            _remove_empty(made)


def _holder(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        content: dict[str, Any] = json.loads(file.read() or "{}")
    except ValueError:  # its holder died while it wrote
        return {}
    return content


def _write(file: IO[str], holder: dict[str, Any]) -> None:
    # In place: a new file would have a lock of its own.
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()


def _remove_empty(made: list[Path]) -> None:
    """Remove the folders that were made for a lock, innermost first, if nothing else came into them."""
    if made and [file.name for file in made[0].iterdir()] == [LOCK_FILE]:
        (made[0] / LOCK_FILE).unlink()
    for folder in made:
        if any(folder.iterdir()):
            return
        folder.rmdir()


def _told(holder: dict[str, Any]) -> str:
    job = f" of SLURM job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}{job}"


def _refusal(run_dir: Path, holder: dict[str, Any]) -> UsageError:
    return UsageError(
        f"{run_dir} is being written by another run ({_told(holder)}): wait for it, stop it, or choose another folder "
        "with --run_dir, or for a recipe another --name"
    )


def _is_running(job: str) -> bool:
    """Whether SLURM says that a job runs; a job or a SLURM that is not known any more does not."""
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-j", job, "-t", "running,suspended", "-o", "%i"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(answer.stdout.strip())
