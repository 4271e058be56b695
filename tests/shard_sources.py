"""Sources of drawn clips for the tests of shards, and damage to them; as a script, a writer that can be killed.

python tests/shard_sources.py DIR [--workers N] [--delay SECONDS]
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_clips import drawn_clip

from fasthmr.data.index import ShardIndex
from fasthmr.data.schema import Clip
from fasthmr.data.shards import write_shards

BODY = "stick@0"


@dataclass(frozen=True)
class DrawnSource:
    """Stick figures; `delay_s` is how long each takes, which is no part of what they are."""

    clips: int = 7
    frames: int = 3
    seed: int = 0
    body: str | None = BODY
    delay_s: float = 0.0

    def __len__(self) -> int:
        return self.clips

    def make(self, index: int) -> Clip:
        time.sleep(self.delay_s)
        return drawn_clip(f"drawn-{index:03d}", self.frames, body=self.body, seed=1000 * self.seed + index)

    def describe(self) -> dict[str, Any]:
        return {"kind": "drawn", "clips": self.clips, "frames": self.frames, "seed": self.seed, "body": self.body}


@dataclass(frozen=True)
class FailingSource(DrawnSource):
    """Does something bad instead of making clip `at`."""

    at: int = 3
    how: str = "raise"

    def make(self, index: int) -> Clip:
        if index == self.at:
            match self.how:
                case "raise":
                    raise ValueError("the third figure does not stand")
                case "file":
                    raise FileNotFoundError(2, "No such file or directory", "walk.npz")
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "same key":
                    return super().make(0)
                case "other body":
                    return drawn_clip("stranger", self.frames, body="giant@7")
        return super().make(index)


def damage(folder: Path, tar: str, *numbers: int) -> None:
    """Overwrite the labels of clips in a shard with zeros."""
    content = bytearray((folder / tar).read_bytes())
    for sample in (ShardIndex.read(folder / tar).samples[n] for n in numbers):
        at, size = sample.files["labels.npz"]
        content[at : at + size] = bytes(size)
    (folder / tar).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.0)
    options = parser.parse_args()
    source = DrawnSource(delay_s=options.delay)
    write_shards(source, options.folder, clips_per_shard=2, workers=options.workers, progress=False)


if __name__ == "__main__":
    main()
