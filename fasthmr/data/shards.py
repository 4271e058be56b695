"""Writing shards: whole or not at all, resumed where a killed writer stopped, the same bytes whoever writes them.

A set is a directory:

    job.json                 what is being made; written first, so that only the same job can be resumed
    shard-000000.tar         samples, readable by WebDataset
    shard-000000.tar.idx     offsets, counts and SHA-256 of the shard; it exists if and only if the shard is complete
    manifest.json            written last: counts, body, schema version, checksums of all shards
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import torch
from tqdm import tqdm

from fasthmr.data.codec import encode_clip
from fasthmr.data.index import MANIFEST, Manifest, ShardError, ShardIndex, allowed_bodies, index_path
from fasthmr.data.schema import SCHEMA_VERSION, Clip, ClipError
from fasthmr.data.store import ClipStore
from fasthmr.data.verify import verify_shards
from fasthmr.files import write_text, written_whole

__all__ = [
    "ClipSource",
    "ClipStore",
    "Dropped",
    "Manifest",
    "ShardError",
    "ensure_shards",
    "is_complete",
    "require_writable",
    "verify_shards",
    "write_part",
    "write_shards",
]

log = logging.getLogger(__name__)

JOB = "job.json"
LOCK = ".lock"
#: a file that is only tried
_PROBE = ".probe"
#: how long to wait for another process that makes the same set, and between two looks at it; seconds
WAIT_S, _LOOK_S = 12 * 3600.0, 0.5


@dataclass(frozen=True)
class Dropped:
    """A clip that could not be made; `why` names it and what was wrong."""

    why: str


class ClipSource(Protocol):
    """Where clips come from.

    `make(i)` must give the same clip in every process, or a resumed set would be a mixture. `describe()` is JSON: all
    that the clips depend on, with the id of the labels' body, or None, as "body"; where labels are of gendered bodies,
    their ids by gender as "bodies". A list is what became of one that had to be cut.
    """

    def __len__(self) -> int: ...

    def make(self, index: int) -> Clip | Dropped | list[Clip | Dropped]: ...

    def describe(self) -> dict[str, Any]: ...


def ensure_shards(source: ClipSource, folder: str | Path, clips_per_shard: int = 16, workers: int = 1) -> Manifest:
    """The finished set of `source` in `folder`: as it is there, or made, or made from where its writer was stopped.

    While another process is making it, e.g. one on the other node of a job, this one waits for it.

    Raises:
        ShardError: `folder` holds another set, or one that another process has been writing for too long.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():  # then it does not matter how the clips are dealt out to shards
        manifest = Manifest.read(folder)
        _require_same(_through_json(source.describe()), manifest.source, folder)
        return manifest
    made = write_part(source, folder, 1, 1, clips_per_shard, workers, wait_s=WAIT_S)
    assert made is not None  # there is no other part to wait for
    return made


def require_writable(folder: Path) -> None:
    """Refuse a folder that shards cannot be written into, before time is spent on making any.

    Raises:
        ShardError: the folder cannot be made or written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _PROBE, "0" * 8192)
        (folder / _PROBE).unlink(missing_ok=True)  # other parts of a set try, too
    except OSError as error:
        raise ShardError(f"cannot write into {folder}: {error.strerror or error}; choose another folder") from error


def write_shards(
    source: ClipSource,
    folder: str | Path,
    clips_per_shard: int = 16,
    workers: int = 1,
    progress: bool = True,
) -> Manifest:
    """Write all clips of `source` as shards; shards that are complete already are kept.

    Args:
        source: the clips; pickled to the worker processes.
        folder: made if it does not exist.
        clips_per_shard: what a shard holds, and so what each process of a killed writer loses at most.
        workers: processes; each writes whole shards, and the bytes do not depend on how many there are.
        progress: show a progress bar with rate and remaining time.

    Raises:
        ShardError: nothing to write, a folder that cannot be written or holds another set, a full disk.
        ClipError: the source made a clip that breaks the schema.
    """
    manifest = write_part(source, folder, 1, 1, clips_per_shard, workers, progress)
    assert manifest is not None  # there is no other part to wait for
    return manifest


def write_part(
    source: ClipSource,
    folder: str | Path,
    part: int,
    parts: int,
    clips_per_shard: int = 16,
    workers: int = 1,
    progress: bool = True,
    wait_s: float = 0.0,
) -> Manifest | None:
    """Write one job's part of the shards, the others writing theirs into the same folder; None while some are missing.

    The set is the same as if one job had written it. Whichever job comes last writes the manifest.

    Args:
        source, folder, clips_per_shard, workers, progress: as of `write_shards`.
        part: which of `parts`, from 1: every `parts`-th shard.
        parts: how many there are.
        wait_s: how long to wait for a process that is writing the whole set.

    Raises:
        ShardError: as `write_shards`; or there is no such part.
        ClipError: the source made a clip that breaks the schema.
    """
    if not 1 <= part <= parts:
        raise ShardError(f"part must be one of 1 to {parts}, got {part}")
    folder = Path(folder)
    for name, value in (("clips", len(source)), ("clips_per_shard", clips_per_shard), ("workers", workers)):
        if value < 1:
            raise ShardError(f"there are {value} {name} to write {folder} with: it takes at least one")
    described = _through_json(source.describe())
    bodies = allowed_bodies(described)
    names = [f"shard-{i:06d}.tar" for i in range(-(-len(source) // clips_per_shard))]
    ranges = [range(i, min(len(source), i + clips_per_shard)) for i in range(0, len(source), clips_per_shard)]
    with _exclusive(folder, wait_s, shared=parts > 1):
        _claim(folder, {"schema_version": SCHEMA_VERSION, "clips_per_shard": clips_per_shard, "source": described})
        ours = list(zip(names, ranges, strict=True))[part - 1 :: parts]
        for name, _ in ours:
            for left_by_killed_writer in folder.glob(f".{name}*.tmp"):
                left_by_killed_writer.unlink()
        todo = [(folder / name, r) for name, r in ours if not is_complete(folder / name)]
        if len(todo) < len(ours):
            log.info("%s: %d of %d shards are there already", folder, len(ours) - len(todo), len(ours))
        total = sum(len(clips) for _, clips in todo)
        with tqdm(total=total, unit="clip", desc=f"making {folder}", disable=not progress or not todo) as bar:
            if workers == 1:
                for path, clips in todo:
                    _write_shard(source, bodies, path, clips, bar.update)
            elif todo:
                _write_in_processes(source, bodies, todo, workers, bar)
        if not all(is_complete(folder / name) for name in names):
            return None
        indices = {name: ShardIndex.read(folder / name) for name in names}
        keys = Counter(sample.key for index in indices.values() for sample in index.samples)
        if len(keys) < keys.total():
            raise ShardError(f"the source made several clips of the same key: {keys.most_common(1)[0][0]!r}")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            body=described.get("body"),
            clips=len(keys),
            frames=sum(s.frames for i in indices.values() for s in i.samples),
            source=described,
            shards={name: index.sha256 for name, index in indices.items()},
        )
        _write_json(folder / MANIFEST, vars(manifest))
    return manifest


# ---- one shard -------------------------------------------------------------------------------------------------


def _write_shard(
    source: ClipSource, bodies: list[str], path: Path, clips: range, on_clip: Callable[[int], object]
) -> None:
    """Write one shard under a temporary name, give it its own, then write its index the same way."""
    dropped: list[str] = []
    try:
        with written_whole(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index in clips:
                for clip in _make(source, bodies, index):
                    if isinstance(clip, Dropped):
                        dropped.append(clip.why)
                        continue
                    for extension, data in encode_clip(clip).items():
                        # TarInfo's defaults are no time and no owner: the bytes depend on the clip only.
                        member = tarfile.TarInfo(f"{clip.key}.{extension}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
                on_clip(1)
        write_text(index_path(path), replace(ShardIndex.of(path), dropped=dropped).to_json())
    except OSError as error:
        raise ShardError(
            f"cannot write {path}: {error.strerror or error}; finished shards are kept, free some space and run again"
        ) from error


def _make(source: ClipSource, bodies: list[str], index: int) -> list[Clip | Dropped]:
    try:
        made = source.make(index)
    except OSError as error:  # not to be taken for trouble with the shard
        raise ShardError(f"clip {index} cannot be made: {error}") from error
    clips = made if isinstance(made, list) else [made]
    for clip in clips:
        if isinstance(clip, Clip) and clip.body is not None and clip.body not in bodies:
            told = " or ".join(map(repr, bodies)) or "none"
            raise ClipError(f"clip {clip.key}: its labels belong to body {clip.body!r}, those of the set to {told}")
    return clips


def is_complete(path: Path) -> bool:
    """Whether a shard is there as a whole, so that no writer makes it anew.

    Raises:
        ShardError: its index is damaged.
    """
    return path.exists() and index_path(path).exists() and path.stat().st_size == ShardIndex.read(path).bytes


# ---- several processes -----------------------------------------------------------------------------------------

_worker_source: ClipSource
_worker_counter: Any


def _start_worker(source: ClipSource, counter: Any) -> None:
    global _worker_source, _worker_counter
    _worker_source, _worker_counter = source, counter
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    # Blocked where a run listens for it (fasthmr.stopping): the pool must be able to end its processes.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A pool's worker would wait for ever for the next task of a writer that was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(bodies: list[str], path: Path, clips: range) -> None:
    def count(done: int) -> None:
        with _worker_counter.get_lock():
            _worker_counter.value += done

    _write_shard(_worker_source, bodies, path, clips, count)


def _write_in_processes(
    source: ClipSource, bodies: list[str], shards: list[tuple[Path, range]], workers: int, bar: tqdm
) -> None:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(min(workers, len(shards)), context, _start_worker, (source, counter)) as pool:
        try:
            with _one_thread_per_child():
                pending = {pool.submit(_work, bodies, path, clips) for path, clips in shards}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise ShardError(
                "a worker process was killed, probably for want of memory; finished shards are kept, "
                f"run again with less than {workers} workers"
            ) from error
        finally:  # after an error or Ctrl-C, end with the shards that are being written
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_per_child() -> Iterator[None]:
    """Processes started in this block run BLAS and OpenMP on one thread, which libraries read when they are loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


# ---- the set ---------------------------------------------------------------------------------------------------


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Write what is being made into the folder; if that was done before, it must have been the same job."""
    path = folder / JOB
    if path.exists():
        try:
            before = json.loads(path.read_text())
            before = before | before.pop("source")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path} is damaged ({error}): remove {folder} and make the set again") from error
        _require_same(job | job["source"], before, folder)
    elif any(folder.glob("shard-*")):
        raise ShardError(
            f"{folder} has shards but no {JOB} that says of what: choose another folder, or remove this one"
        )
    else:
        _write_json(path, job)


def _require_same(ours: dict[str, Any], theirs: dict[str, Any], folder: Path) -> None:
    def told(value: object) -> str:
        return textwrap.shorten(repr(value), 60, placeholder="...")

    names = sorted({*ours, *theirs} - {"source"})
    changed = [f"{n}: {told(theirs.get(n))} -> {told(ours.get(n))}" for n in names if ours.get(n) != theirs.get(n)]
    if changed:
        raise ShardError(
            f"{folder} holds shards of another job ({'; '.join(changed)}): choose another folder, or remove this one"
        )


def _through_json(described: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the file will have: lists instead of tuples, and so on."""
    return json.loads(json.dumps(described))


@contextmanager
def _exclusive(folder: Path, wait_s: float = 0.0, shared: bool = False) -> Iterator[None]:
    """Hold the folder's lock, with others if `shared`; the system frees it when the process ends, however it ends."""
    require_writable(folder)
    try:
        lock = (folder / LOCK).open("w")
    except OSError as error:  # another user's
        raise ShardError(f"cannot write {folder / LOCK}: {error.strerror or error}; choose another folder") from error
    began = time.monotonic()
    told = False
    with lock:
        while True:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() - began >= wait_s:
                    raise ShardError(
                        f"another process is writing into {folder}: wait for it, or choose another folder"
                    ) from error
            if not told:
                log.info("another process is writing into %s; waiting for it up to %.0f min", folder, wait_s / 60)
                told = True
            time.sleep(_LOOK_S)
        yield


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(content, indent=1, sort_keys=True))
    except OSError as error:
        raise ShardError(f"cannot write {path}: {error.strerror or error}; free some space and run again") from error
