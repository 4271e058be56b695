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
import tarfile
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import cv2
import torch
from tqdm import tqdm

from fasthmr.data.codec import encode_clip
from fasthmr.data.schema import SCHEMA_VERSION, Clip
from fasthmr.files import write_text, written_whole
from fasthmr.data.store import INDEX_SUFFIX, MANIFEST, ClipStore, Manifest, ShardError, ShardIndex, index_tar, verify_shards

__all__ = ["ClipSource", "ClipStore", "Manifest", "ShardError", "ensure_shards", "verify_shards", "write_shards"]

log = logging.getLogger(__name__)

JOB = "job.json"
LOCK = ".lock"


class ClipSource(Protocol):
    """Where clips come from. `make(i)` must give the same clip in every process, or a resumed set would be a mixture."""

    def __len__(self) -> int: ...

    def make(self, index: int) -> Clip: ...

    def describe(self) -> dict[str, Any]: ...


def ensure_shards(source: ClipSource, folder: str | Path, clips_per_shard: int = 16, workers: int = 1) -> Manifest:
    """The finished set of `source` in `folder`: as it is there, or made, or made from where its writer was stopped.

    Raises:
        ShardError: `folder` holds another set, or one that is being written by another process.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder)
        _require_same_job(_job(source, clips_per_shard), folder)
        return manifest
    return write_shards(source, folder, clips_per_shard, workers)


def write_shards(
    source: ClipSource, folder: str | Path, clips_per_shard: int = 16, workers: int = 1, progress: bool = True
) -> Manifest:
    """Write all clips of `source` as shards; shards that are complete already are kept.

    Args:
        source: the clips; pickled to the worker processes.
        folder: made if it does not exist.
        clips_per_shard: what a shard holds, and so what a killed writer loses at most.
        workers: processes; each writes whole shards, and the bytes do not depend on how many there are.
        progress: show a progress bar with rate and remaining time.

    Raises:
        ShardError: nothing to write, a folder that cannot be written or holds another set, a full disk.
    """
    folder = Path(folder)
    job = _job(source, clips_per_shard)
    if len(source) == 0:
        raise ShardError(f"there are 0 clips to write into {folder}: ask for at least one")
    with _exclusive(folder):
        _require_same_job(job, folder)
        _write(folder / JOB, json.dumps(job, indent=1, sort_keys=True))
        names = [f"shard-{i:06d}.tar" for i in range(-(-len(source) // clips_per_shard))]
        todo = [i for i, name in enumerate(names) if not _is_complete(folder / name)]
        if len(todo) < len(names):
            log.info("%s: %d of %d shards are there already", folder, len(names) - len(todo), len(names))
        ranges = [range(i * clips_per_shard, min(len(source), (i + 1) * clips_per_shard)) for i in todo]
        bar = tqdm(total=sum(map(len, ranges)), unit="clip", desc=f"making {folder}", disable=not progress)
        with bar:
            if workers <= 1:
                for i, clips in zip(todo, ranges, strict=True):
                    _write_shard(source, folder / names[i], clips, bar.update)
            elif todo:
                _write_in_processes(source, folder, [(names[i], r) for i, r in zip(todo, ranges, strict=True)], workers, bar)
        indices = {name: ShardIndex.read(folder / name) for name in names}
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            body=job["source"].get("body"),
            clips=sum(len(i.samples) for i in indices.values()),
            frames=sum(s.frames for i in indices.values() for s in i.samples),
            source=job["source"],
            shards={name: index.sha256 for name, index in indices.items()},
        )
        _write(folder / MANIFEST, json.dumps(vars(manifest), indent=1, sort_keys=True))
    return manifest


# ---- one shard --------------------------------------------------------------------------------------------------------


def _write_shard(source: ClipSource, path: Path, clips: range, on_clip: Any = lambda _: None) -> None:
    """Write one shard under a temporary name, give it its own, then write its index the same way."""
    try:
        with written_whole(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index in clips:
                clip = source.make(index)
                for extension, data in encode_clip(clip).items():
                    member = tarfile.TarInfo(f"{clip.key}.{extension}")  # no times, no owners: bytes depend on clips only
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                on_clip(1)
        write_text(path.with_name(path.name + INDEX_SUFFIX), index_tar(path).to_json())
    except OSError as error:
        raise ShardError(
            f"cannot write {path}: {error.strerror or error}; finished shards are kept, free some space and run again"
        ) from error


def _is_complete(path: Path) -> bool:
    if not path.exists() or not path.with_name(path.name + INDEX_SUFFIX).exists():
        return False
    return path.stat().st_size == ShardIndex.read(path).bytes


# ---- several processes --------------------------------------------------------------------------------------------------

_worker_source: ClipSource
_worker_counter: Any


def _start_worker(source: ClipSource, counter: Any) -> None:
    global _worker_source, _worker_counter
    _worker_source, _worker_counter = source, counter
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _work(path: Path, clips: range) -> None:
    def count(done: int) -> None:
        with _worker_counter.get_lock():
            _worker_counter.value += done

    _write_shard(_worker_source, path, clips, count)


def _write_in_processes(source: ClipSource, folder: Path, shards: list[tuple[str, range]], workers: int, bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (source, counter)) as pool:
        pending = {pool.submit(_work, folder / name, clips) for name, clips in shards}
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            bar.update(counter.value - bar.n)
            failed = [f for f in done if f.exception() is not None]
            if failed:
                pool.shutdown(wait=True, cancel_futures=True)
                failed[0].result()
        bar.update(counter.value - bar.n)


# ---- the set ------------------------------------------------------------------------------------------------------------


def _job(source: ClipSource, clips_per_shard: int) -> dict[str, Any]:
    # Through JSON, so that what is compared later is what was written.
    return json.loads(
        json.dumps({"schema_version": SCHEMA_VERSION, "clips_per_shard": clips_per_shard, "source": source.describe()})
    )


def _require_same_job(job: dict[str, Any], folder: Path) -> None:
    path = folder / JOB
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ShardError(f"{path} is damaged ({error}): remove {folder} and make the set again") from error
    ours, theirs = ({**j, **j.get("source", {})} for j in (job, before))
    changed = [f"{k}: {theirs.get(k)!r} -> {ours.get(k)!r}" for k in sorted({*ours, *theirs} - {"source"}) if ours.get(k) != theirs.get(k)]
    if changed:
        raise ShardError(
            f"{folder} holds shards of another job ({'; '.join(changed)}): choose another folder, or remove this one"
        )


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
            raise ShardError(f"another process is writing into {folder}: wait for it, or choose another folder") from error
        yield


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise ShardError(f"cannot write {path}: {error.strerror or error}; free some space and run again") from error
