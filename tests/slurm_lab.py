"""A real SLURM of two nodes on one host: munge, controller and two node daemons, with ports and keys of their own.

Needs root and Debian's packages of APT_PACKAGES. Starts in a second; nothing of a SLURM that is there is touched.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

APT_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
#: a command of SLURM's that takes longer hangs
_ANSWER_S = 60

#: cred_expire: a requeued job waits until its credentials have expired, by default two minutes
_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
KillWait=60
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=60
PropagateResourceLimits=NONE
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no such SLURM here; None if there can."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    if missing := [p for p in programs if shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        return f"{', '.join(missing)} not found: apt-get install {' '.join(APT_PACKAGES)}"
    return None


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Look twice a second; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.5)


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start a SLURM in `folder`, and stop it; gives the environment in which its commands find it."""
    for name in ("state", "munge", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge").chmod(0o755)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    ports = _free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN"
        for node, port in zip(NODES, ports[1:], strict=True)
    )
    (folder / "slurm.conf").write_text(
        _CONF.format(host=host, port=ports[0], folder=folder, nodes=nodes, names=",".join(NODES))
    )
    path = f"{os.environ['PATH']}:/usr/sbin"
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [
        f"--key-file={key}", f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
    ]  # fmt: skip

    def run(*command: str) -> str:
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=_ANSWER_S
        ).stdout

    run("munged", "--force", *munge)
    try:
        wait_until((folder / "munge.pid").exists, 20, "munged")
        run("slurmctld", "-c")
        for node in NODES:
            run("slurmd", "-N", node, "-c")
        try:
            wait_until(
                lambda: run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(NODES)), 60, "idle nodes"
            )
        except AssertionError as error:
            logs = (f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("slurm*.log")))
            raise AssertionError("\n".join((str(error), *logs))) from error
        yield environment
    finally:
        with suppress(subprocess.CalledProcessError):
            run("scancel", "--user=root", "--signal=KILL", "--full")
            run("scancel", "--user=root")
        with suppress(subprocess.CalledProcessError):
            run("scontrol", "shutdown")  # the controller and the node daemons of this configuration
        time.sleep(1)
        for pid in folder.glob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), 15)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
