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
import tarfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import cv2
import torch
from tqdm import tqdm

from fasthmr.data.codec import encode_clip
from fasthmr.data.index import MANIFEST, Manifest, ShardError, ShardIndex, index_path
from fasthmr.data.schema import SCHEMA_VERSION, Clip, ClipError
from fasthmr.data.store import ClipStore
from fasthmr.data.verify import verify_shards
from fasthmr.files import write_text, written_whole

__all__ = ["ClipSource", "ClipStore", "Manifest", "ShardError", "ensure_shards", "verify_shards", "write_shards"]

log = logging.getLogger(__name__)

JOB = "job.json"
LOCK = ".lock"


class ClipSource(Protocol):
    """Where clips come from.

    `make(i)` must give the same clip in every process, or a resumed set would be a mixture. `describe()` is JSON: all
    that the clips depend on, with the id of the labels' body, or None, as "body".
    """

    def __len__(self) -> int: ...

    def make(self, index: int) -> Clip: ...

    def describe(self) -> dict[str, Any]: ...


def ensure_shards(source: ClipSource, folder: str | Path, clips_per_shard: int = 16, workers: int = 1) -> Manifest:
    """The finished set of `source` in `folder`: as it is there, or made, or made from where its writer was stopped.

    Raises:
        ShardError: `folder` holds another set, or one that is being written by another process.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():  # then it does not matter how the clips are dealt out to shards
        manifest = Manifest.read(folder)
        _require_same(_through_json(source.describe()), manifest.source, folder)
        return manifest
    return write_shards(source, folder, clips_per_shard, workers)


def write_shards(
    source: ClipSource, folder: str | Path, clips_per_shard: int = 16, workers: int = 1, progress: bool = True
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
    folder = Path(folder)
    for name, value in (("clips", len(source)), ("clips_per_shard", clips_per_shard), ("workers", workers)):
        if value < 1:
            raise ShardError(f"there are {value} {name} to write {folder} with: it takes at least one")
    described = _through_json(source.describe())
    body = described.get("body")
    names = [f"shard-{i:06d}.tar" for i in range(-(-len(source) // clips_per_shard))]
    ranges = [range(i, min(len(source), i + clips_per_shard)) for i in range(0, len(source), clips_per_shard)]
    with _exclusive(folder):
        _claim(folder, {"schema_version": SCHEMA_VERSION, "clips_per_shard": clips_per_shard, "source": described})
        for left_by_killed_writer in folder.glob(".shard-*.tmp"):
            left_by_killed_writer.unlink()
        todo = [(folder / name, r) for name, r in zip(names, ranges, strict=True) if not _is_complete(folder / name)]
        if len(todo) < len(names):
            log.info("%s: %d of %d shards are there already", folder, len(names) - len(todo), len(names))
        total = sum(len(clips) for _, clips in todo)
        with tqdm(total=total, unit="clip", desc=f"making {folder}", disable=not progress or not todo) as bar:
            if workers == 1:
                for path, clips in todo:
                    _write_shard(source, body, path, clips, bar.update)
            elif todo:
                _write_in_processes(source, body, todo, workers, bar)
        indices = {name: ShardIndex.read(folder / name) for name in names}
        keys = Counter(sample.key for index in indices.values() for sample in index.samples)
        if len(keys) < keys.total():
            raise ShardError(f"the source made several clips of the same key: {keys.most_common(1)[0][0]!r}")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            body=body,
            clips=len(keys),
            frames=sum(s.frames for i in indices.values() for s in i.samples),
            source=described,
            shards={name: index.sha256 for name, index in indices.items()},
        )
        _write_json(folder / MANIFEST, vars(manifest))
    return manifest


# ---- one shard -------------------------------------------------------------------------------------------------


def _write_shard(
    source: ClipSource, body: str | None, path: Path, clips: range, on_clip: Callable[[int], object]
) -> None:
    """Write one shard under a temporary name, give it its own, then write its index the same way."""
    try:
        with written_whole(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index in clips:
                clip = _make(source, body, index)
                for extension, data in encode_clip(clip).items():
                    # TarInfo's defaults are no time and no owner: the bytes depend on the clip only.
                    member = tarfile.TarInfo(f"{clip.key}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                on_clip(1)
        write_text(index_path(path), ShardIndex.of(path).to_json())
    except OSError as error:
        raise ShardError(
            f"cannot write {path}: {error.strerror or error}; finished shards are kept, free some space and run again"
        ) from error


def _make(source: ClipSource, body: str | None, index: int) -> Clip:
    try:
        clip = source.make(index)
    except OSError as error:  # not to be taken for trouble with the shard
        raise ShardError(f"clip {index} cannot be made: {error}") from error
    if clip.body not in (None, body):
        raise ClipError(f"clip {clip.key}: its labels belong to body {clip.body!r}, those of the set to {body!r}")
    return clip


def _is_complete(path: Path) -> bool:
    return path.exists() and index_path(path).exists() and path.stat().st_size == ShardIndex.read(path).bytes


# ---- several processes -----------------------------------------------------------------------------------------

_worker_source: ClipSource
_worker_counter: Any


def _start_worker(source: ClipSource, counter: Any) -> None:
    global _worker_source, _worker_counter
    _worker_source, _worker_counter = source, counter
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A pool's worker would wait for ever for the next task of a writer that was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(body: str | None, path: Path, clips: range) -> None:
    def count(done: int) -> None:
        with _worker_counter.get_lock():
            _worker_counter.value += done

    _write_shard(_worker_source, body, path, clips, count)


def _write_in_processes(
    source: ClipSource, body: str | None, shards: list[tuple[Path, range]], workers: int, bar: tqdm
) -> None:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(min(workers, len(shards)), context, _start_worker, (source, counter)) as pool:
        try:
            with _one_thread_per_child():
                pending = {pool.submit(_work, body, path, clips) for path, clips in shards}
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
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise ShardError(f"cannot write into {folder}: {error.strerror or error}; choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"another process is writing into {folder}: wait for it, or choose another folder"
            ) from error
        yield


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(content, indent=1, sort_keys=True))
    except OSError as error:
        raise ShardError(f"cannot write {path}: {error.strerror or error}; free some space and run again") from error
