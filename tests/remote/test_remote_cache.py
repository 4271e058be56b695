"""The cache of remote sets: shared by processes, smaller than a set, on disks that are full or cannot be written."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.faulty_server import FaultyServer, late, serving
from tiny_training import make_set

from datamodules.clips import ClipDataModule
from datamodules.samples import TrainSampling
from datamodules.stream import StreamLoader
from fasthmr import stopping
from fasthmr.data.remote import ShardCache
from fasthmr.data.shards import ClipStore, ShardError
from fasthmr.data.store import fetch_shards
from fasthmr.data.synth.source import SynthConfig
from fasthmr.data.transforms import Augmentation

TARS = [f"shard-{i:06d}.tar" for i in range(3)]  # of three, three and one clip


def tars_in(cache: ShardCache) -> list[str]:
    return sorted(tar.name for tar in cache.root.glob("*/*.tar"))


def unfinished_in(cache: ShardCache) -> list[Path]:
    return list(cache.root.glob("*/.*.tar.[0-9]*.tmp"))


# ---- shared by processes --------------------------------------------------------------------------------------------


def fetch_all(url: str, cache: ShardCache) -> None:
    fetch_shards([ClipStore(url, cache)])


def test_processes_of_a_node_fetch_a_shard_once(server: FaultyServer, cache: ShardCache) -> None:
    ClipStore(f"{server.url}/set", cache)
    for tar in TARS:
        server.faults[tar] = [late(0.2)]  # so that all of them want it meanwhile
    processes = [
        multiprocessing.get_context("fork").Process(target=fetch_all, args=(f"{server.url}/set", cache))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [Counter(server.asked)[f"set/{tar}"] for tar in TARS] == [1, 1, 1]


def fetch_and_listen(url: str, cache: ShardCache) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    stopping.listen()
    ClipStore(url, cache)[0]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1], ids=lambda by: by.name)
def test_a_process_that_ends_in_a_download_leaves_nothing_that_counts(
    server: FaultyServer, cache: ShardCache, by: signal.Signals
) -> None:
    server.faults[TARS[0]] = [late(60)]
    process = multiprocessing.get_context("fork").Process(target=fetch_and_listen, args=(f"{server.url}/set", cache))
    process.start()
    deadline = time.monotonic() + 30
    while f"set/{TARS[0]}" not in server.asked:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    (left,) = unfinished_in(cache)
    assert process.pid is not None
    os.kill(process.pid, by)
    process.join(30)
    assert process.exitcode == (-signal.SIGKILL if by == signal.SIGKILL else stopping.EXIT_CODE)
    assert tars_in(cache) == [] and unfinished_in(cache) == [left]
    assert len(list(ClipStore(f"{server.url}/set", cache))) == 7, "the next run goes on"
    assert unfinished_in(cache) == [], "and tidies up"


# ---- a cache that is smaller than the set ---------------------------------------------------------------------------


def limited(cache: ShardCache, store: ClipStore, shards: float) -> ShardCache:
    return replace(cache, gigabytes=shards * sum(store.sizes) / len(store.sizes) / 1e9)


@pytest.fixture
def five(tmp_path: Path) -> Iterator[FaultyServer]:
    make_set(tmp_path / "served" / "five", 5, clips_per_shard=1)
    with serving(tmp_path / "served") as server:
        yield server


def test_what_was_not_used_for_longest_makes_room(five: FaultyServer, cache: ShardCache) -> None:
    url = f"{five.url}/five"
    store = ClipStore(url, limited(cache, ClipStore(url, cache), 3.1), in_sequence=True)
    names = [tar.name for tar in store.shards]
    for number in (0, 1, 2, 0, 3, 4):
        assert store.remote is not None
        os.close(store.remote.open(names[number], store.sizes[number]))
        time.sleep(0.02)  # times of files are not finer everywhere
    assert tars_in(cache) == [names[0], names[3], names[4]]
    assert [Counter(five.asked)[f"five/{name}"] for name in names] == [1] * 5


def test_a_shard_that_is_open_can_be_read_when_it_is_removed(five: FaultyServer, cache: ShardCache) -> None:
    url = f"{five.url}/five"
    store = ClipStore(url, limited(cache, ClipStore(url, cache), 1.1), in_sequence=True)
    reading = store.read_shard(0)
    for number in (1, 2):
        list(store.read_shard(number))
    assert tars_in(cache) == [store.shards[2].name]
    (members,) = reading
    assert members["__key__"] == "clip000"


def test_a_set_that_does_not_fit_is_not_read_at_random(five: FaultyServer, cache: ShardCache) -> None:
    url = f"{five.url}/five"
    small = limited(cache, ClipStore(url, cache), 4)
    with pytest.raises(ShardError, match=r"GB of shards are to be read at random, and the cache .* may hold .* GB"):
        ClipStore(url, small)
    with pytest.raises(ShardError, match="are to be read at random"):  # each would fit, together they do not
        fetch_shards([ClipStore(url, limited(cache, ClipStore(url, cache), 6))] * 2)
    with pytest.raises(ShardError, match=r"shard-000000.tar has .* GB, more than the cache may hold"):
        ClipStore(url, ShardCache(f"{cache.folder}-2", gigabytes=1e-6), in_sequence=True)


def test_shards_that_are_fetched_at_the_same_time_must_fit(five: FaultyServer, cache: ShardCache) -> None:
    url = f"{five.url}/five"
    store = ClipStore(url, limited(cache, ClipStore(url, cache), 1.5), in_sequence=True)
    five.faults[store.shards[0].name] = [late(10)]
    assert store.remote is not None
    store.remote.fetch_ahead(store.shards[0].name, store.sizes[0])
    while not unfinished_in(cache):
        time.sleep(0.01)
    with pytest.raises(ShardError, match="too little for the shards that are being fetched at the same time"):
        list(store.read_shard(1))


def test_streaming_goes_through_a_cache_that_holds_a_part(made: Path, server: FaultyServer, cache: ShardCache) -> None:
    small = ShardCache(cache.folder, gigabytes=1.5 * (made / TARS[0]).stat().st_size / 1e9)
    store = ClipStore(f"{server.url}/set", small, in_sequence=True)
    batches = StreamLoader(store, TrainSampling(2, Augmentation.off()), 2, 20, 3, seed=1, batches_done=lambda: 0)
    assert len({key for batch in batches for key in batch.keys}) == 7


# ---- bad disks ------------------------------------------------------------------------------------------------------

Disk = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a disk in memory, or again with other options; its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a disk needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)  # fails if a file is still open


def fill(disk: Path, leaving: int) -> None:
    """Write a file `other` that leaves so many bytes."""
    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - leaving))


def test_a_file_where_the_cache_should_be(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ShardError, match=r"cannot write into the cache .*file: .*choose another with shard_cache.folder"
    ):
        ClipStore(f"{server.url}/set", ShardCache(str(tmp_path / "file")))


def test_a_cache_on_a_disk_that_is_read_only(server: FaultyServer, disk: Disk) -> None:
    cache = ShardCache(str(disk("size=50M")))
    store = ClipStore(f"{server.url}/set", cache)
    assert len(list(store)) == 7
    disk("remount", "ro")
    for read in (lambda: store[0], lambda: ClipStore(f"{server.url}/set", cache)):  # though all is there
        with pytest.raises(ShardError, match=r"cannot write into the cache .*disk: Read-only file system; .*choose"):
            read()


@pytest.mark.parametrize("in_sequence", [True, False])
def test_a_cache_on_a_disk_that_is_too_small(server: FaultyServer, disk: Disk, in_sequence: bool) -> None:
    place, cache = f"{server.url}/set", ShardCache(str(disk("size=50M")))
    fill(cache.root, leaving=100_000)
    with pytest.raises(
        ShardError, match=r"may hold 100 GB, but with the free space on its disk it comes to .* GB: free some space"
    ):
        ClipStore(place, cache, in_sequence)
    (cache.root / "other").unlink()
    assert len(list(ClipStore(place, cache, in_sequence))) == 7
    fill(cache.root, leaving=8192)
    assert len(list(ClipStore(place, cache, in_sequence))) == 7, "what is there needs no room"


def test_on_a_full_disk_other_sets_make_room(server: FaultyServer, folder: Path, disk: Disk) -> None:
    make_set(folder.parent / "other", 8)
    cache = ShardCache(str(disk("size=50M")))
    fetch_all(f"{server.url}/other", cache)
    fill(cache.root, leaving=100_000)
    assert len(list(ClipStore(f"{server.url}/set", cache))) == 7


def test_a_disk_that_fills_up_meanwhile(server: FaultyServer, disk: Disk) -> None:
    cache = ShardCache(str(disk("size=50M")))
    store = ClipStore(f"{server.url}/set", cache)
    fill(cache.root, leaving=8192)
    with pytest.raises(ShardError, match=r"its disk has .* GB free, too little for the shards .* or free some space"):
        store[0]
    assert tars_in(cache) == [] and unfinished_in(cache) == []
    (cache.root / "other").unlink()
    assert len(store[0]) == 4


@pytest.mark.parametrize(
    ("options", "why"), [(["ro"], "Read-only file system"), (["size=4k"], "No space left on device")]
)
def test_a_folder_for_clips_that_cannot_be_written_is_named_before_any_is_made(
    disk: Disk, tmp_path: Path, options: list[str], why: str
) -> None:
    config = SynthConfig(clips=1, frames=4)
    val = disk(*options) / "val"
    module = ClipDataModule(tmp_path / "train", val, make_train=config, make_val=config, workers=0)
    with pytest.raises(
        ShardError, match=rf"cannot write into {val}: {why}; .*\(--data_dir, or data.init_args.val, says which\)"
    ):
        module.prepare_data()
    assert list((tmp_path / "train").iterdir()) == []
