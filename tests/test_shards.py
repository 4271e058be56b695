"""Writing sets of shards: whole or not at all, resumable, and the same bytes however they were written."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds
from shard_sources import BODY, DrawnSource, FailingSource
from test_schema import assert_same

from fasthmr import files
from fasthmr.data.codec import decode_sample
from fasthmr.data.shards import ClipStore, ShardError, ensure_shards, write_shards

SOURCE = DrawnSource()


def write(source: DrawnSource, folder: Path, workers: int = 1) -> None:
    write_shards(source, folder, clips_per_shard=2, workers=workers, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips in four shards, written without interruption by one process."""
    folder = tmp_path_factory.mktemp("sets") / "drawn"
    write(SOURCE, folder)
    return folder


# ---- what is written is what is read --------------------------------------------------------------------------------


def test_clips_are_read_as_they_were_made(folder: Path) -> None:
    store = ClipStore(folder)
    assert len(store) == 7
    for index in (6, 0, 3):
        assert_same(store[index], SOURCE.make(index))
    assert [clip.key for clip in store] == [f"drawn-{i:03d}" for i in range(7)]
    assert next(iter(store.lengths())) == ("drawn-000", 3)


def test_the_manifest_tells_what_the_set_is(folder: Path) -> None:
    manifest = ClipStore(folder).manifest
    assert (manifest.clips, manifest.frames, manifest.body) == (7, 21, BODY)
    assert manifest.source == SOURCE.describe()
    assert list(manifest.shards) == [f"shard-{i:06d}.tar" for i in range(4)]


def test_webdataset_streams_the_same_clips(folder: Path) -> None:
    shards = [str(tar) for tar in sorted(folder.glob("*.tar"))]
    samples = wds.DataPipeline(wds.SimpleShardList(shards), wds.tarfile_to_samples(handler=wds.reraise_exception))
    for streamed, stored in zip(samples, ClipStore(folder), strict=True):
        assert_same(decode_sample(streamed), stored)


def read_key(store: ClipStore, index: int) -> str:
    return store[index].key


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_serves_other_processes(folder: Path, method: str) -> None:
    store = ClipStore(folder)
    assert store[0].key == "drawn-000"  # before the others start
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.starmap(read_key, [(store, i) for i in range(7)]) == [f"drawn-{i:03d}" for i in range(7)]
    assert len(pickle.dumps(store)) < 10_000


def test_the_bytes_depend_on_the_clips_only(folder: Path, tmp_path: Path) -> None:
    write(SOURCE, tmp_path / "again", workers=3)
    assert contents(tmp_path / "again") == contents(folder)
    with tarfile.open(folder / "shard-000000.tar") as archive:
        assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in archive)


# ---- resuming -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_writer_resumes_and_nothing_tells(folder: Path, tmp_path: Path, workers: int) -> None:
    cut = tmp_path / "cut"
    command = [sys.executable, "tests/shard_sources.py", str(cut), "--workers", str(workers), "--delay", "0.3"]
    writer = subprocess.Popen(command, cwd=Path(__file__).parent.parent, env={**os.environ, "PYTHONPATH": "."})
    wait_until(lambda: list(cut.glob("*.idx")) and list(cut.glob(".*.tmp")))
    workers_pids = children(writer.pid)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    wait_until(lambda: not any(map(is_alive, workers_pids)))  # or they would wait for ever for something to do

    with pytest.raises(ShardError, match="is not finished"):
        ClipStore(cut)
    finished = {index.stem: (cut / index.stem).stat() for index in cut.glob("*.idx")}
    assert 0 < len(finished) < 4
    write(SOURCE, cut)
    assert contents(cut) == contents(folder)
    for name, before in finished.items():
        after = (cut / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "a finished shard was redone"


def test_a_lost_shard_is_restored(folder: Path, tmp_path: Path) -> None:
    write(SOURCE, tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard .*shard-000001.tar is missing"):
        ClipStore(tmp_path)
    write(SOURCE, tmp_path)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("finished", [True, False])
def test_another_source_does_not_continue_a_set(tmp_path: Path, finished: bool) -> None:
    write(SOURCE, tmp_path)
    if not finished:
        (tmp_path / "manifest.json").unlink()
    before = contents(tmp_path)
    for start in (write_shards, ensure_shards):
        with pytest.raises(ShardError, match=r"holds shards of another job \(frames: 3 -> 4; seed: 0 -> 1\)"):
            start(DrawnSource(frames=4, seed=1), tmp_path, clips_per_shard=2)
    assert contents(tmp_path) == before


def test_shards_of_unknown_origin_are_not_adopted(tmp_path: Path) -> None:
    write(SOURCE, tmp_path)
    (tmp_path / "job.json").unlink()
    with pytest.raises(ShardError, match=r"has shards but no job.json"):
        write(SOURCE, tmp_path)


def test_a_finished_set_is_not_made_again(tmp_path: Path) -> None:
    made = ensure_shards(SOURCE, tmp_path, clips_per_shard=3)
    before = contents(tmp_path)
    kept = ensure_shards(SOURCE, tmp_path, clips_per_shard=5)  # how it was dealt out to shards makes no difference
    assert kept == made
    assert contents(tmp_path) == before


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def assert_nothing_half_written(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    assert not {n for n in names if n.endswith(".tmp")}
    assert {n for n in names if n.endswith(".tar")} == {n.removesuffix(".idx") for n in names if n.endswith(".idx")}
    assert "manifest.json" not in names


@pytest.mark.parametrize(
    ("workers", "how", "message"),
    [
        (1, "raise", "the third figure does not stand"),
        (2, "raise", "the third figure does not stand"),
        (1, "file", "clip 3 cannot be made: .*No such file or directory: 'walk.npz'"),
        (1, "same key", "several clips of the same key: 'drawn-000'"),
        (1, "other body", "clip stranger: its labels belong to body 'giant@7', those of the set to 'stick@0'"),
    ],
)
def test_a_source_that_fails_leaves_whole_shards_only(tmp_path: Path, workers: int, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(FailingSource(how=how), tmp_path, workers)
    assert_nothing_half_written(tmp_path)


def test_a_worker_that_is_killed_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="a worker process was killed, probably for want of memory"):
        write(FailingSource(how="killed"), tmp_path, workers=2)
    write(SOURCE, tmp_path)  # it only takes a new start
    assert contents(tmp_path) == contents(folder)


def test_a_full_disk_keeps_what_is_finished(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = []

    def full(self: tarfile.TarFile, *args: object) -> None:
        added.append(args)
        if len(added) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        unpatched(self, *args)

    unpatched = tarfile.TarFile.addfile
    with (
        monkeypatch.context() as patch,
        pytest.raises(ShardError, match="No space left on device; finished shards are kept"),
    ):
        patch.setattr(tarfile.TarFile, "addfile", full)
        write(SOURCE, tmp_path)
    assert_nothing_half_written(tmp_path)
    assert (tmp_path / "shard-000000.tar").exists()
    write(SOURCE, tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # a real one, with buffers in between
    try:
        with pytest.raises(ShardError, match=r"cannot write .*shard-000000.tar: File too large"):
            write(SOURCE, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_nothing_half_written(tmp_path)


def test_an_index_that_cannot_be_written_leaves_the_shard_unfinished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        if ".idx" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(ShardError, match="No space left on device"):
        patch.setattr(files.os, "fsync", full)
        write(SOURCE, tmp_path)
    assert not list(tmp_path.glob("*.idx"))
    assert not list(tmp_path.glob(".*.tmp"))
    write(SOURCE, tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for inside in ("file", "file/set"):
        with pytest.raises(ShardError, match=r"cannot write into .*file.*: .*; choose another folder"):
            write(SOURCE, tmp_path / inside)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, *args: object, **kwargs: object) -> None:  # chmod does not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(ShardError, match=r"cannot write into .*set: Permission denied; choose another folder"):
        write(SOURCE, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("source", "clips_per_shard", "workers", "message"),
    [
        (DrawnSource(clips=0), 2, 1, "there are 0 clips"),
        (SOURCE, 0, 1, "there are 0 clips_per_shard"),
        (SOURCE, 2, 0, "there are 0 workers"),
    ],
)
def test_nothing_to_write(
    tmp_path: Path, source: DrawnSource, clips_per_shard: int, workers: int, message: str
) -> None:
    with pytest.raises(ShardError, match=message):
        write_shards(source, tmp_path / "set", clips_per_shard, workers)
    assert not (tmp_path / "set").exists()


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="another process is writing into"):
            write(SOURCE, tmp_path)
    write(SOURCE, tmp_path)


def test_ctrl_c_ends_soon_and_the_next_start_goes_on(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tests/shard_sources.py", str(tmp_path), "--workers", "2", "--delay", "0.5"]
    root = Path(__file__).parent.parent
    writer = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": "."},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        # A shell that runs these tests in the background has told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: list(tmp_path.glob("*.idx")) and list(tmp_path.glob(".*.tmp")))
    os.killpg(writer.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    assert writer.wait(timeout=20) != 0
    assert not (tmp_path / "manifest.json").exists()
    write(SOURCE, tmp_path)
    assert contents(tmp_path) == contents(folder)
