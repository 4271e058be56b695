"""A video file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np


@contextmanager
def written_video(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that adds a frame (H, W, 3) uint8 RGB; the file takes the name `path` when the block ends well.

    MPEG-4 Part 2, which every build of OpenCV writes and every player plays, though browsers do not; `ffmpeg -i IN
    OUT.mp4` makes H.264 of it. A last row or column of an odd size is lost. Until the block ends, and if it fails,
    `path` is untouched.

    Raises:
        OSError: it cannot be written; nothing half-written stays.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # OpenCV goes by the ending
    writer: cv2.VideoWriter | None = None

    def add(frame: np.ndarray) -> None:
        nonlocal writer
        if writer is None:
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(unfinished), codec, fps, (frame.shape[1], frame.shape[0]))
            if not writer.isOpened():
                raise OSError(f"{path} cannot be written as a video")
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    try:
        yield add
        if writer is not None:
            writer.release()
            unfinished.replace(path)
    finally:
        if writer is not None:
            writer.release()
        unfinished.unlink(missing_ok=True)
