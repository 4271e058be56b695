"""Trains again and again, each time killed at a random moment.

`python -m helpers.kill_often KILLS PROCESSES RUN ARGUMENTS...`

Each process of a training is a fork of this one, so that it need not import everything anew, and finds the others as
torchrun's do. A training goes on from the last checkpoint. One of its processes is killed between its start and shortly
after its second checkpoint, and the others a little later. At last it may come to its end; when a signal stops it,
another one goes on. Prints how many kills and stops there were, and the seed of the moments.
"""

import math
import os
import random
import secrets
import signal
import socket
import sys
import time
from pathlib import Path

from fasthmr import stopping
from fasthmr.fit import main


def train(processes: int, arguments: list[str]) -> list[int]:
    """Start one; its process numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            if processes > 1:
                os.environ |= {
                    "TORCHELASTIC_RUN_ID": "killed", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes),
                }  # fmt: skip
            _become_fit(arguments)
        children.append(child)
    return children


def _become_fit(arguments: list[str]) -> None:
    sys.argv = ["fit", *arguments]
    code = 1
    stopping.listen()
    try:
        code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(children: list[int]) -> bool:
    """Whether one of them has ended; the others do so at once."""
    for child in children:
        done, status = os.waitpid(child, os.WNOHANG)
        if done and status:
            sys.exit(f"a training failed by itself: {status}")
        if done:
            codes([other for other in children if other != child])
            return True
    return False


def codes(children: list[int]) -> set[int]:
    """How they end."""
    return {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}


def wait_for_checkpoint(children: list[int], file: Path, moment: float) -> bool:
    """Until there is another one, or to the moment; False if training ends before."""
    before = file.stat().st_ino if file.exists() else None
    while time.monotonic() < moment and (not file.exists() or file.stat().st_ino == before):
        if ended(children):
            return False
        time.sleep(0.001)
    return True


def lives(chance: random.Random, kills: int, processes: int, run: Path, arguments: list[str]) -> int:
    """Kill and start until a training ends by itself, or is not to be killed any more; kills that there were."""
    for done in range(kills):
        children = train(processes, arguments)
        # In turn soon after its first or second checkpoint, and at any moment before.
        moment = time.monotonic() + chance.uniform(0, 2) if done % 2 else math.inf
        for _ in range(chance.randrange(1, 3)):
            if not wait_for_checkpoint(children, run / "checkpoints/last.ckpt", moment):
                return done
        if moment == math.inf:
            time.sleep(chance.uniform(0, 0.05))
        if ended(children):
            return done
        for child in chance.sample(children, len(children)):
            os.kill(child, signal.SIGKILL)
            time.sleep(chance.uniform(0, 0.1))
        codes(children)
    return kills


def stops(processes: int, arguments: list[str]) -> int:
    """Train to the end; how often it was stopped on the way."""
    for count in range(10):
        left = codes(train(processes, arguments))
        if left == {0}:
            return count
        if left != {stopping.EXIT_CODE}:
            sys.exit(f"a training failed: {left}")
    sys.exit("it was stopped again and again")


if __name__ == "__main__":
    kills, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    seed = secrets.randbelow(1000)
    print(f"seed: {seed}", flush=True)
    killed = lives(random.Random(seed), kills, processes, folder, sys.argv[4:])
    print(f"kills: {killed}, stops: {stops(processes, sys.argv[4:])}")
