"""Signals that ask a run to stop: SIGUSR1 and SIGTERM, heard from the first line of a command on.

A cluster tells a job with a signal that its time is nearly up. It sends it to every process of the job, at any moment:
in the middle of a step, while a checkpoint is written, while Python still imports. So nothing is done where it arrives.
Both signals are blocked, in this process and in all that it starts (a loader's process must not die of one), and a
thread waits for them:

- While training is held (`hold`), it only notes what was asked. `callbacks.interrupt` looks at the end of each step.
- Otherwise, e.g. while clips are made or the model is loaded, there is nothing to save that is not saved: it has the
  job requeued and ends the process at once.

A job asks to be requeued with FASTHMR_REQUEUE=1 in its environment, and says with FASTHMR_GRACE_S how long after
SIGUSR1 SLURM will end it. A step or a validation that takes longer would be its end: SLURM requeues no job whose time
was up. So it is requeued shortly before, and goes on from its last checkpoint. This file imports nothing slow: it comes
first.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

log = logging.getLogger(__name__)

#: exit code of a run that a signal stopped: the same command goes on (sysexits.h: EX_TEMPFAIL, "try again later")
EXIT_CODE = 75
SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})
#: seconds that other processes leave the first one to have the job requeued
_PATIENCE_S = 60
#: seconds before the end of the grace when a job is requeued that has not stopped by then
_MARGIN_S = 20

_lock = threading.Lock()
_asked: signal.Signals | None = None
_held = False


class Stopped(BaseException):
    """A run has stopped as a signal asked, with a checkpoint to go on from. No error, so no `except Exception` has it.

    Args:
        by: the signal.
    """

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(f"stopped by {by.name}")
        self.by = by


def listen() -> None:
    """Hear the signals from now on. Call it once, in the main thread, before other threads and processes start."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_hear, name="signals", daemon=True).start()


def asked() -> signal.Signals | None:
    """The signal that asked this process to stop, if one has."""
    return _asked


def ask(by: signal.Signals | None) -> None:
    """Ask this process to stop at the end of its step; None: take that back."""
    global _asked
    _asked = by


def hold(held: bool) -> None:
    """Say whether there is progress to save before this process may end."""
    global _held
    with _lock:  # not while the other thread is leaving
        _held = held


def leave_if_asked() -> None:
    """End the process if it was asked to stop when it was held, and had ended its training by itself before."""
    if _asked in SIGNALS:
        _leave()


def _hear() -> None:
    while True:
        by = signal.Signals(signal.sigwait(SIGNALS))
        with _lock:
            if not _held:
                log.warning("%s: there is nothing to save yet, leaving at once", by.name)
                _leave()
            if _asked is None:
                log.warning("%s: stopping after this step, with a checkpoint", by.name)
                ask(by)
                if by is signal.SIGUSR1 and requeue_wanted() and _is_first():
                    _requeue_in_time()


def _leave() -> None:
    if requeue_wanted():
        if not _is_first():
            # SLURM ends a job step as soon as one of its processes has failed; and should the first one be held up, it
            # is requeued all the same.
            time.sleep(_PATIENCE_S)
        requeue()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(EXIT_CODE)


def _is_first() -> bool:
    return int(os.environ.get("SLURM_PROCID", 0)) == 0


def _requeue_in_time() -> None:
    """Have the job requeued before its time is up, should this process still be there by then."""

    def requeue_late() -> None:
        log.warning("the step has not ended in time: the job goes on from its last checkpoint")
        requeue()

    timer = threading.Timer(max(0.0, float(os.environ.get("FASTHMR_GRACE_S", 120)) - _MARGIN_S), requeue_late)
    timer.daemon = True
    timer.start()


def requeue_wanted() -> bool:
    """Whether this is a SLURM job that asks to be requeued."""
    return os.environ.get("FASTHMR_REQUEUE") == "1" and "SLURM_JOB_ID" in os.environ


def requeue() -> None:
    """Have SLURM requeue this job; call it on one process. Failure is logged: the checkpoint is there all the same.

    A job that is not running any more, because somebody cancelled it, is left alone.
    """
    job = os.environ["SLURM_JOB_ID"]  # of its own for each task of a job array, too
    try:
        if "JobState=RUNNING" not in _scontrol("show", "job", job):
            log.warning("job %s was cancelled, and is not requeued", job)
            return
        _scontrol("requeue", job)
        log.warning("job %s is requeued", job)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        log.warning("job %s could not be requeued (%s): submit it again, it will go on", job, str(told).strip())


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=_PATIENCE_S)
    return done.stdout
