"""Recorded motions: a folder of AMASS-format npz files (SMPL-H, SMPL-X or SMPL poses), or packs of many clips.

What is read (formats as read by WHAM's and TokenHMR's preprocessing; z up unless a file says `up_axis` "y"):

    poses (N, 72 | 156 | 165)   axis-angle: SMPL; SMPL-H = 3 + 63 + 90 hands; SMPL-X = 3 + 63 + jaw, eyes + 90 hands
    trans (N, 3)                metres
    mocap_framerate             or any other key containing "mocap_frame"
    clip (n,), start (n + 1,)   in a pack only: names, and the row at which each clip begins

Skipped, because they hold no motion: shape.npz and *_stagei.npz (body shapes of AMASS' subjects), and clips of fewer
than 25 frames at 30 fps. Everything else that cannot be read is an error.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fasthmr.conventions import PELVIS
from fasthmr.data.synth.motion import Motion, MotionError
from fasthmr.data.synth.quaternions import (
    Array,
    X,
    Y,
    about,
    from_rotvec,
    multiply,
    resample,
    resample_linear,
    rotate,
    to_rotvec,
)
from fasthmr.data.synth.skeleton import free_skeleton

Floats = NDArray[np.float32]

#: width of `poses` -> the 24 joints in it that are SMPL's. The hands are their index fingers' first joints, as in
#: SMPL-H -> SMPL conversions: 22 and 37 there; SMPL-X has jaw and eyes before them.
_JOINTS_OF_WIDTH = {
    72: (*range(22), 22, 23),
    156: (*range(22), 22, 37),
    165: (*range(22), 25, 40),
}
_MIN_SECONDS = 25 / 30
#: seconds before and after a window that help to find the floor: someone seen only in mid-air comes down somewhere.
_FLOOR_CONTEXT_S = 1.5
#: share of frames whose lowest foot may lie under the floor.
_FLOOR_QUANTILE = 0.05


@dataclass(frozen=True)
class _Recording:
    """One clip: rows `first` to `last` (exclusive) of a file, at `fps`."""

    name: str
    path: Path
    first: int
    last: int
    fps: float
    y_up: bool


class MotionFolder:
    """A `MotionSource` over recorded motions.

    Motions are turned y up, resampled by slerp to the wanted rate, set on the floor and centred at the origin. Windows
    come from within one clip; clips too short for the wanted window are left out, not padded.

    Args:
        path: a folder (searched recursively for npz files) or one npz file.

    Raises:
        MotionError: nothing there, or a file that is broken, lacks a key, or has wrong shapes; names file and key.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.is_dir():
            found = sorted(self.path.rglob("*.npz"))
            files = [p for p in found if p.stem != "shape" and not p.stem.endswith("_stagei")]
        elif self.path.is_file():
            found = files = [self.path]
        else:
            raise MotionError(
                f"no motions at {self.path}: give a folder of AMASS npz files, one npz file, or 'procedural'"
            )
        if not files:
            raise MotionError(f"{self.path} holds no motions: looked for *.npz in it and all folders below")
        root = self.path if self.path.is_dir() else self.path.parent
        recordings, digest = [], hashlib.sha256()
        for file in files:
            relative = file.relative_to(root)
            of_file, checksum = _index(file, relative.with_suffix("").as_posix())
            recordings += of_file
            digest.update(f"{relative.as_posix()} {checksum}\n".encode())
        self._recordings = [r for r in recordings if (r.last - r.first) / r.fps >= _MIN_SECONDS - 1e-9]
        self._too_short = len(recordings) - len(self._recordings)
        self._skipped_files = len(found) - len(files)
        self._content = digest.hexdigest()
        if not self._recordings:
            raise MotionError(f"{self.path}: all {len(recordings)} clips are shorter than 25 frames at 30 fps")
        self._rows = np.array([r.last - r.first for r in self._recordings])
        self._rates = np.array([r.fps for r in self._recordings])

    @property
    def name(self) -> str:
        """Name of the folder or file."""
        return self.path.stem

    def __len__(self) -> int:
        """Number of clips of at least 25 frames at 30 fps."""
        return len(self._recordings)

    def sample(self, rng: Generator, frames: int, fps: float) -> Motion:
        """A random window of a random clip, every window of every long enough clip being equally likely.

        Raises:
            MotionError: no clip is that long; names the longest.
        """
        starts = self._starts(frames, fps)
        if not starts.any():
            raise self._nothing_long_enough(frames, fps)
        chosen = rng.integers(starts.sum())
        which = int(np.searchsorted(np.cumsum(starts), chosen, side="right"))
        start = int(chosen - starts[:which].sum())
        return _cut(self._recordings[which], start, frames, fps, float(rng.uniform(-np.pi, np.pi)))

    def sequences(self, frames: int, fps: float) -> list[tuple[str, int]]:
        """The fixed windows of every clip, one after the other without overlap: clip name and first frame at `fps`.

        What is left at a clip's end and does not fill a window is in none.
        """
        counts = self._frames_at(fps) // frames
        return [(r.name, frames * i) for r, n in zip(self._recordings, counts, strict=True) for i in range(n)]

    def num_windows(self, frames: int, fps: float) -> int:
        """Number of `sequences`."""
        return int((self._frames_at(fps) // frames).sum())

    def window(self, index: int, frames: int, fps: float, rng: Generator) -> Motion:
        """The window `sequences(frames, fps)[index]`; `rng` only chooses the heading.

        Raises:
            MotionError: no clip is long enough for one window.
            IndexError: there are fewer windows.
        """
        ends = np.cumsum(self._frames_at(fps) // frames)
        if not ends[-1]:
            raise self._nothing_long_enough(frames, fps)
        if not 0 <= index < ends[-1]:
            raise IndexError(f"{self.path}: window {index} of {ends[-1]} windows of {frames} frames at {fps:g} fps")
        which = int(np.searchsorted(ends, index, side="right"))
        recording = self._recordings[which]
        first = frames * (index - int(ends[which - 1] if which else 0))
        return _cut(recording, first * recording.fps / fps, frames, fps, float(rng.uniform(-np.pi, np.pi)))

    def fingerprint(self) -> str:
        """Short hash of the files' names and contents (by their zip checksums) and of the skeleton they are set on."""
        rest = np.round(free_skeleton().rest, 4).tolist()
        return hashlib.sha256(repr(("recorded", 1, self._content, rest)).encode()).hexdigest()[:16]

    def describe(self, frames: int | None = None, fps: float = 30.0) -> dict[str, object]:
        """What the folder holds, as JSON values; with `frames`, also how much of it such windows can use."""
        seconds = self._rows / self._rates
        about_it: dict[str, object] = {
            "motion": str(self.path),
            "clips": len(self._recordings),
            "minutes": round(float(seconds.sum()) / 60, 2),
            "longest_s": round(float(seconds.max()), 2),
            "clips_under_25_frames": self._too_short,
            "files_without_motion": self._skipped_files,
        }
        if frames is not None:
            about_it["usable_clips"] = int((self._starts(frames, fps) > 0).sum())
            about_it["windows"] = self.num_windows(frames, fps)
        return about_it

    def _frames_at(self, fps: float) -> NDArray[np.int64]:
        """How many frames at `fps` fit between the first and the last row of each clip."""
        return np.floor((self._rows - 1) * fps / self._rates + 1e-6).astype(np.int64) + 1

    def _starts(self, frames: int, fps: float) -> NDArray[np.int64]:
        """How many rows of each clip a window of `frames` at `fps` can begin at."""
        span = (frames - 1) * self._rates / fps
        return np.maximum(0, np.floor(self._rows - 1 - span + 1e-6).astype(np.int64) + 1)

    def _nothing_long_enough(self, frames: int, fps: float) -> MotionError:
        lengths = self._frames_at(fps)
        longest = int(lengths.argmax())
        return MotionError(
            f"{self.path}: no clip is long enough for {frames} frames at {fps:g} fps; the longest, "
            f"{self._recordings[longest].name!r}, has {lengths[longest]}. Ask for fewer frames or add longer clips."
        )


def _index(path: Path, relative: str) -> tuple[list[_Recording], str]:
    """The clips in one file, without reading its motion, and a checksum of its content."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((m.filename, m.file_size, m.CRC) for m in archive.infolist())
            shapes = {key: _shape(archive, key) for key in ("poses", "trans") if f"{key}.npy" in archive.namelist()}
        with np.load(path, allow_pickle=False) as file:
            keys = sorted(file.files)
            rate_keys = [key for key in keys if "mocap_frame" in key]
            missing = [key for key in ("poses", "trans") if key not in shapes]
            if not rate_keys:
                missing.append("mocap_framerate")
            if missing:
                raise MotionError(
                    f"{path}: no {' and no '.join(missing)}; found {', '.join(keys) or 'nothing'}. "
                    "A motion file has poses, trans and mocap_framerate (or mocap_frame_rate)."
                )
            fps = float(file[rate_keys[0]])
            up = str(file["up_axis"]) if "up_axis" in keys else "z"
            names = [relative]
            bounds = np.array([0, shapes["poses"][0]])
            if "clip" in keys and "start" in keys:
                names = [f"{relative}/{name}" for name in file["clip"]]
                bounds = np.asarray(file["start"], dtype=np.int64)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise MotionError(f"{path} cannot be read as npz: {error}. Download it again or remove it.") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, MotionError):
            raise
        raise MotionError(f"{path}: {error}") from error
    frames = shapes["poses"][0]
    width = shapes["poses"][-1]
    if len(shapes["poses"]) != 2 or width not in _JOINTS_OF_WIDTH:
        known = ", ".join(f"(N, {w})" for w in _JOINTS_OF_WIDTH)
        raise MotionError(f"{path}: poses has shape {shapes['poses']}, expected one of {known}")
    if shapes["trans"] != (frames, 3):
        raise MotionError(f"{path}: trans has shape {shapes['trans']}, expected ({frames}, 3) as there are poses")
    if not (np.isfinite(fps) and fps > 0):
        raise MotionError(f"{path}: {rate_keys[0]} is {fps}, expected frames a second")
    if up not in ("y", "z"):
        raise MotionError(f"{path}: up_axis is {up!r}, expected 'y' or 'z'")
    if bounds.shape != (len(names) + 1,) or bounds[0] != 0 or bounds[-1] != frames or (np.diff(bounds) < 0).any():
        raise MotionError(f"{path}: start must rise from 0 to {frames} in {len(names) + 1} numbers, one more than clip")
    recordings = [
        _Recording(name, path, int(first), int(last), fps, up == "y")
        for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True)
    ]
    return recordings, repr(members)


def _shape(archive: zipfile.ZipFile, key: str) -> tuple[int, ...]:
    """Shape of an array in an npz, from its header alone: AMASS has thousands of files of many megabytes."""
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return tuple(read(file)[0])


@lru_cache(maxsize=4)
def _read(path: Path) -> tuple[Floats, Floats]:
    """SMPL's 24 joint rotations (N, 24, 3) and the translations (N, 3) of a file, as it has them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            poses, trans = file["poses"], file["trans"]
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError) as error:
        raise MotionError(f"{path} cannot be read: {error}") from error
    joints = poses.reshape(len(poses), -1, 3)[:, list(_JOINTS_OF_WIDTH[poses.shape[1]])].astype(np.float32)
    trans = trans.astype(np.float32)
    for key, values in (("poses", joints.reshape(len(joints), -1)), ("trans", trans)):
        broken = np.flatnonzero(~np.isfinite(values).all(1))
        if len(broken):
            raise MotionError(f"{path}: {key} is not finite in row {broken[0]} ({len(broken)} such rows)")
    joints.setflags(write=False)
    trans.setflags(write=False)
    return joints, trans


def _cut(recording: _Recording, start: float, frames: int, fps: float, yaw: float) -> Motion:
    """`frames` at `fps` from row `start` of a recording, y up, turned by `yaw`, on the floor, around the origin."""
    poses, trans = _read(recording.path)
    step = recording.fps / fps
    rows = start + step * np.arange(frames, dtype=np.float64)
    context = _FLOOR_CONTEXT_S * recording.fps
    end = min(recording.last - recording.first - 1, rows[-1] + context)
    around = np.arange(max(0.0, rows[0] - context), end, step, dtype=np.float64)

    floor = np.quantile(_lowest(*_resampled(recording, poses, trans, around)), _FLOOR_QUANTILE)
    local, pelvis = _resampled(recording, poses, trans, rows)
    turn = about(Y, yaw)
    local[:, PELVIS] = multiply(turn, local[:, PELVIS])
    pelvis = rotate(turn, pelvis - np.array((pelvis[:, 0].mean(), floor, pelvis[:, 2].mean())))
    return Motion(
        pose=to_rotvec(local).astype(np.float32),
        translation=(pelvis - free_skeleton().rest[PELVIS]).astype(np.float32),
        fps=fps,
        name=f"{recording.name}@{start / step:.0f}",
    )


def _resampled(recording: _Recording, poses: Floats, trans: Floats, rows: Array) -> tuple[Array, Array]:
    """Local rotations (N, 24, 4) and the pelvis (N, 3) up to a constant, y up, at fractional rows of a recording."""
    first = recording.first + int(np.floor(rows[0]))
    last = min(recording.first + int(np.ceil(rows[-1] + 1e-6)) + 1, recording.last)
    rows = rows - (first - recording.first)
    local = resample(from_rotvec(poses[first:last].astype(np.float64)), rows)
    # The pelvis is the recorded body's rest pelvis + trans. That rest pelvis is the same in every frame, and the turn
    # to y up maps it to another constant: setting the clip on the floor around the origin removes it, whatever body
    # was recorded. The rotation's own turn is about the pelvis, so nothing else moves.
    pelvis = resample_linear(trans[first:last].astype(np.float64), rows)
    if not recording.y_up:
        y_from_z = about(X, -np.pi / 2)  # [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
        local[:, PELVIS] = multiply(y_from_z, local[:, PELVIS])
        pelvis = rotate(y_from_z, pelvis)
    return local, pelvis


def _lowest(local: Array, pelvis: Array) -> Array:
    """Height (N,) of the lowest point of both feet."""
    return pelvis[:, 1] + free_skeleton().contact_points(local)[..., 1].min(1)
