"""Frames and masks from disk: videos, folders of pictures, npz. All can be read more than once, a frame at a time."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
#: compressed pictures and videos are not exactly black where they should be: from here on they count as the person
_LOSSY_THRESHOLD = 128
_LOSSY = (".jpg", ".jpeg", ".webp")


class VideoError(ValueError):
    """A video, picture or mask cannot be read; the message names the file."""


class Frames:
    """The frames of a video file, or of a folder of pictures in the order of the numbers in their names.

    Iterating yields (H, W, 3) uint8 RGB, each time from the start.

    Args:
        path: of the video or the folder.

    Raises:
        VideoError: there is no such thing, or nothing in it that OpenCV reads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise VideoError(f"there is no video or folder of pictures at {self.path}")
        self.files = pictures_in(self.path) if self.path.is_dir() else None
        self.fps: float | None = None
        if self.files is None:
            capture = _open(self.path)
            rate = float(capture.get(cv2.CAP_PROP_FPS))
            self.fps = rate if 0 < rate < 1000 else None
            self._told = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
            capture.release()

    @property
    def expected(self) -> int | None:
        """How many frames there are; of a video what its header says, which need not be so, or None."""
        return len(self.files) if self.files is not None else self._told or None

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.files is not None:
            return (cv2.cvtColor(_read(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for file in self.files)
        return _decoded(self.path)


class Masks:
    """Person masks: of a folder of pictures, an npz file, or a video. Iterating yields (H, W), from the start.

    Without `subject` they are bool. A picture that is stored exactly (PNG) shows the person wherever it is not black;
    JPEG pictures and videos where they are brighter than half, since compression blurs black. An npz holds `masks`
    (T, H, W). With `subject` masks are labels as they are stored, and cannot be lossy.

    Args:
        path: of the folder or file.
        subject: masks are instance labels, and this is the person's.

    Raises:
        VideoError: there is no such thing, it cannot be read, or labels are asked of what cannot hold them.
    """

    def __init__(self, path: str | Path, subject: int | None = None) -> None:
        self.path, self.subject = Path(path), subject
        if not self.path.exists():
            raise VideoError(f"there are no masks at {self.path}: give a folder of pictures, an npz, or a video")
        self._files: list[Path] | None = None
        self._array: np.ndarray | None = None
        if self.path.is_dir():
            self._files = pictures_in(self.path)
        elif self.path.suffix == ".npz":
            self._array = _masks_of_npz(self.path)
        else:
            _open(self.path).release()
        lossy = self._array is None and (self._files is None or any(f.suffix.lower() in _LOSSY for f in self._files))
        if subject is not None and lossy:
            raise VideoError(f"{self.path}: labels cannot be read from compressed pictures; give PNG files or an npz")

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._array is not None:
            yield from self._array if self.subject is not None else self._array != 0
        elif self._files is not None:
            yield from map(self._of_picture, self._files)
        else:
            for frame in _decoded(self.path):
                yield cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) >= _LOSSY_THRESHOLD

    def _of_picture(self, file: Path) -> np.ndarray:
        picture = _read(file, cv2.IMREAD_UNCHANGED)
        if picture.ndim == 3:
            channels = picture[..., :3]
            if self.subject is not None and (channels != channels[..., :1]).any():
                raise VideoError(f"{file} is coloured: labels are grey values, or use masks of one person")
            picture = channels.max(-1)
        if self.subject is not None:
            return picture
        return picture >= _LOSSY_THRESHOLD if file.suffix.lower() in _LOSSY else picture != 0


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder; frame_10 comes after frame_9.

    Raises:
        VideoError: there are none.
    """
    files = [f for f in folder.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith(".")]
    if not files:
        raise VideoError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    return sorted(files, key=lambda f: [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", f.name)])


def _open(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise VideoError(f"{path} cannot be read as a video: OpenCV does not know its format, or it is damaged")
    return capture


def _decoded(path: Path) -> Iterator[np.ndarray]:
    capture = _open(path)
    try:
        while True:
            going, frame = capture.read()
            if not going:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def _read(file: Path, mode: int) -> np.ndarray:
    picture = cv2.imread(str(file), mode)
    if picture is None:
        raise VideoError(f"{file} cannot be read as a picture: it is damaged")
    return picture


def _masks_of_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "masks" not in arrays.files:
                raise VideoError(f"{path} has no `masks`, only {', '.join(arrays.files) or 'nothing'}")
            masks: np.ndarray = arrays["masks"]
    except VideoError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:  # ValueError: no zip, or pickled objects
        raise VideoError(f"{path} cannot be read as npz: {error}") from error
    if masks.ndim != 3 or not (masks.dtype == np.bool_ or np.issubdtype(masks.dtype, np.integer)):
        raise VideoError(f"{path}: masks must be (T, H, W), bool or labels, got {masks.shape} {masks.dtype}")
    return masks
