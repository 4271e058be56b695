"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` when the block ends well; until then, or if it fails, `path` is untouched.

    It is written beside `path` (a rename must not cross disks) and flushed to the disk before the rename, so that
    neither a kill nor a power cut leaves half of it under its name.

    Raises:
        OSError: it cannot be written; nothing half-written stays.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an (H,W,3) uint8 RGB picture whole or not at all."""
    with written_whole(path) as file:
        file.write(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
