"""Trains again and again, each time killed at a random moment: `python -m helpers.kill_often KILLS RUN ARGUMENTS...`.

Each training is a fork of this process, so that it need not import everything anew, and goes on from the last
checkpoint. It is killed between its start and shortly after its third checkpoint. At last it may come to its end; when
a signal stops it, another one goes on. Prints how many kills and stops there were.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from fasthmr import stopping
from fasthmr.fit import main


def train(arguments: list[str]) -> int:
    """Start one; its process number."""
    child = os.fork()
    if child:
        return child
    sys.argv = ["fit", *arguments]
    code = 1
    stopping.listen()
    try:
        code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    if done and status:
        sys.exit(f"a training failed by itself: {status}")
    return bool(done)


def wait_for_checkpoint(child: int, file: Path) -> bool:
    """Until there is another one; False if training ends before."""
    before = file.stat().st_ino if file.exists() else None
    while not file.exists() or file.stat().st_ino == before:
        if ended(child):
            return False
        time.sleep(0.001)
    return True


def lives(kills: int, run: Path, arguments: list[str]) -> int:
    """Kill and start until a training ends by itself, or is not to be killed any more; kills that there were."""
    chance = random.Random(0)
    for done in range(kills):
        child = train(arguments)
        checkpoints = chance.randrange(4)
        if not all(wait_for_checkpoint(child, run / "checkpoints/last.ckpt") for _ in range(checkpoints)):
            return done
        time.sleep(chance.uniform(0, 0.1 if checkpoints else 2))
        if ended(child):
            return done
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return kills


def stops(arguments: list[str]) -> int:
    """Train to the end; how often it was stopped on the way."""
    for count in range(10):
        _, status = os.waitpid(train(arguments), 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return count
        if code != stopping.EXIT_CODE:
            sys.exit(f"a training failed: {code}")
    sys.exit("it was stopped again and again")


if __name__ == "__main__":
    killed = lives(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    print(f"kills: {killed}, stops: {stops(sys.argv[3:])}")
