"""Sets of shards over http(s) and from commands: what is cached, what goes wrong and is mended, what is refused."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.faulty_server import (
    Fault,
    FaultyServer,
    changed,
    cut,
    cut_unseen,
    hung_up,
    instead,
    late,
    serving,
    status,
)
from jsonargparse import ArgumentParser
from test_schema import assert_same
from tiny_training import make_set

from datamodules.clips import ClipDataModule
from datamodules.samples import TrainSampling
from datamodules.stream import StreamedSamples, StreamLoader
from fasthmr import stopping
from fasthmr.data import remote
from fasthmr.data.index import ShardIndex
from fasthmr.data.remote import RemoteSet, ShardCache
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ClipStore, ShardError
from fasthmr.data.store import fetch_shards
from fasthmr.data.transforms import Augmentation

TARS = [f"shard-{i:06d}.tar" for i in range(3)]  # of three, three and one clip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("made") / "set", 7)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The set that is served, to damage."""
    return Path(shutil.copytree(made, tmp_path / "served" / "set"))


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with serving(folder.parent) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"), attempts=3, timeout_s=20)


def tars_in(cache: ShardCache) -> list[str]:
    return sorted(tar.name for tar in cache.root.glob("*/*.tar"))


def unfinished_in(cache: ShardCache) -> list[Path]:
    return list(cache.root.glob("*/.*.tar.[0-9]*.tmp"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- where sets are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["{url}/set", "{url}/set/?signature=a%2Fb", "pipe:cat {folder}/{{name}}"])
def test_a_remote_set_has_the_clips_of_the_folder(
    made: Path, server: FaultyServer, folder: Path, cache: ShardCache, source: str
) -> None:
    store = ClipStore(source.format(url=server.url, folder=folder), cache)
    assert tars_in(cache) == [], "shards come when they are needed"
    for ours, theirs in zip(store, ClipStore(made), strict=True):
        assert_same(ours, theirs)
    assert tars_in(cache) == TARS
    assert len(server.asked) == len(set(server.asked)), "nothing is asked for twice"


def test_what_is_cached_is_not_fetched_again(server: FaultyServer, cache: ShardCache) -> None:
    list(ClipStore(f"{server.url}/set", cache))
    before = len(server.asked)
    list(ClipStore(f"{server.url}/set", cache))
    assert server.asked[before:] == ["set/manifest.json"]


def test_another_set_at_the_same_url_is_another_set(server: FaultyServer, folder: Path, cache: ShardCache) -> None:
    list(ClipStore(f"{server.url}/set", cache))
    shutil.rmtree(folder)
    make_set(folder, 2, frames=5)
    assert [len(clip) for clip in ClipStore(f"{server.url}/set", cache)] == [5, 5]


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


# ---- what goes wrong and is mended ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [status(503), status(429), cut, cut_unseen, changed, hung_up],
    ids=["503", "429", "cut", "cut unseen", "changed", "hung up"],
)
def test_a_passing_fault_is_mended(
    server: FaultyServer, cache: ShardCache, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults[TARS[1]] = [fault]
    with caplog.at_level("WARNING"):
        assert len(list(ClipStore(f"{server.url}/set", cache))) == 7
    assert Counter(server.asked)[f"set/{TARS[1]}"] == 2
    assert f"attempt 1 of 3 to fetch {server.url}/set/{TARS[1]} failed" in caplog.text
    assert unfinished_in(cache) == []


def test_a_server_that_is_late_is_asked_again(
    server: FaultyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults[TARS[1]] = [late(5)]
    assert len(list(ClipStore(f"{server.url}/set", replace(cache, timeout_s=0.5)))) == 7
    assert f"{server.url}/set/{TARS[1]} failed: timed out (after " in caplog.text


@pytest.mark.parametrize("name", ["manifest.json", f"{TARS[0]}.idx"])
@pytest.mark.parametrize("fault", [status(500), cut, cut_unseen], ids=["500", "cut", "cut unseen"])
def test_passing_faults_of_the_small_files_are_mended(
    server: FaultyServer, cache: ShardCache, name: str, fault: Fault
) -> None:
    server.faults[name] = [fault]
    assert len(ClipStore(f"{server.url}/set", cache)) == 7


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(503), "503 Service Unavailable"),
        (late(5), r"timed out \(after \d+ bytes\)"),
        (cut, r"ended after \d+ of \d+ bytes"),
        (changed, r"its checksum is \w{16}\.\.\., the manifest says \w{16}\.\.\."),
    ],
    ids=["503", "late", "cut", "changed"],
)
def test_it_gives_up_with_place_attempts_and_last_reason(
    server: FaultyServer, cache: ShardCache, fault: Fault, reason: str
) -> None:
    server.faults[TARS[0]] = [fault] * 3
    store = ClipStore(f"{server.url}/set?signature=secret", replace(cache, timeout_s=0.5))
    with pytest.raises(ShardError, match=rf"attempt 3 of 3 to fetch {server.url}/set/{TARS[0]} failed: .*{reason}"):
        store[0]
    assert Counter(server.asked)[f"set/{TARS[0]}"] == 3
    assert tars_in(cache) == [] and unfinished_in(cache) == []
    assert len(store[0]) == 4, "the server is well again"


def test_a_server_that_is_not_there(cache: ShardCache) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ShardError, match=rf"3 of 3 to fetch http://127.0.0.1:{port}/set/manifest.json failed: .*refus"):
        ClipStore(f"http://127.0.0.1:{port}/set", cache)


def test_a_set_that_is_not_there_is_asked_for_once(server: FaultyServer, cache: ShardCache) -> None:
    with pytest.raises(ShardError, match=r"cannot fetch http://\S+/nowhere/manifest.json: 404 Not Found"):
        ClipStore(f"{server.url}/nowhere", cache)
    assert server.asked == ["nowhere/manifest.json"]


def test_a_cache_that_cannot_be_written(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ShardError, match=r"cannot write into the cache .*file: .*choose another with shard_cache.folder"
    ):
        ClipStore(f"{server.url}/set", ShardCache(str(tmp_path / "file")))


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


# ---- what is not trusted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../escape.tar", "/etc/x.tar", "-rf.tar", "$(touch x).tar", "a;b.tar", "file:///etc/passwd", "a\n.tar", ""]
)
@pytest.mark.parametrize("source", ["{url}/set", "pipe:sh -c 'cat {folder}/{{name}}'"])
def test_names_of_a_manifest_do_not_get_out(
    server: FaultyServer, folder: Path, cache: ShardCache, name: str, source: str
) -> None:
    change_json(folder / "manifest.json", shards={name: "0" * 64})
    before = sorted(cache.root.parent.rglob("*"))
    with pytest.raises(ShardError, match=r"manifest.json( -)?'? is damaged \(no shard is called"):
        ClipStore(source.format(url=server.url, folder=folder), cache)
    assert sorted(cache.root.parent.rglob("*")) == before, "not even the manifest was kept"
    assert server.asked in ([], ["set/manifest.json"])


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/manifest.json", "pipe:ls"])
def test_a_server_cannot_lead_elsewhere_than_to_another_server(
    server: FaultyServer, cache: ShardCache, to: str
) -> None:
    server.faults["manifest.json"] = [status(302, Location=to)]
    with pytest.raises(ShardError, match=r"manifest.json: 302 "):
        ClipStore(f"{server.url}/set", cache)
    assert len(server.asked) == 1


def test_a_server_may_lead_to_another_but_not_away_from_https(server: FaultyServer, cache: ShardCache) -> None:
    server.faults["manifest.json"] = [status(307, Location=f"{server.url}/set/manifest.json?other")]
    assert len(ClipStore(f"{server.url}/set", cache)) == 7
    request = urllib.request.Request("https://here/manifest.json")
    with pytest.raises(urllib.error.HTTPError, match="leads from https to http, refused"):
        remote._SafeRedirects().redirect_request(request, None, 302, "Found", {}, "http://there/manifest.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": 10**15}, "shard-000001.tar has 1e.06 GB, more than the cache may hold"),
        ({"bytes": -1}, "has a member outside of the shard"),
        ({"bytes": 1e6}, "its numbers are no integers"),
        ({"sha256": "0" * 64}, "belongs to another shard than the manifest's shard-000001.tar"),
        ({"samples": {}}, None),
        ({"samples": [{"key": "a", "frames": 1, "files": {"meta.json": [10**9, 9]}}]}, "member outside of the shard"),
        ({"samples": [{"key": "a", "frames": "many", "files": {}}]}, "its numbers are no integers"),
    ],
)
def test_indices_that_do_not_belong_to_their_shards(
    server: FaultyServer, folder: Path, cache: ShardCache, changes: dict[str, object], message: str | None
) -> None:
    change_json(folder / f"{TARS[1]}.idx", **changes)
    if message is None:
        assert len(ClipStore(f"{server.url}/set", cache)) == 4
        return
    with pytest.raises(ShardError, match=message):
        ClipStore(f"{server.url}/set", cache)
    assert not list(cache.root.glob(f"*/{TARS[1]}*"))


def test_files_that_do_not_end_are_refused(
    server: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClipStore(f"{server.url}/set", cache)
    server.faults[TARS[0]] = [instead(bytes(store.sizes[0] + 1))]
    with pytest.raises(ShardError, match=rf"{TARS[0]} is longer than {store.sizes[0]} bytes, which is refused"):
        store[0]
    assert tars_in(cache) == [] and unfinished_in(cache) == []
    monkeypatch.setattr(remote, "_MAX_TEXT", 100)
    with pytest.raises(ShardError, match=r"manifest.json is longer than 100 bytes"):
        ClipStore(f"{server.url}/set", cache)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"<html>"])
def test_a_manifest_that_is_none(server: FaultyServer, cache: ShardCache, content: bytes) -> None:
    server.faults["manifest.json"] = [instead(content)] * 3
    with pytest.raises(ShardError, match=r"3 of 3 to fetch .* failed: it is no JSON"):
        ClipStore(f"{server.url}/set", cache)


@pytest.mark.parametrize("url", ["http:///set", "https://me:word@host/set", "http://host/a b", "https://host/\n"])
def test_urls_that_are_none(cache: ShardCache, url: str) -> None:
    with pytest.raises(ShardError, match="a URL must be https://HOST/PATH"):
        RemoteSet(url, cache)


@pytest.mark.parametrize("url", ["s3://bucket/set", "file:///set", "ftp://host/set"])
def test_other_schemes_are_told_about_commands(cache: ShardCache, url: str) -> None:
    with pytest.raises(ShardError, match=r"for S3 write 'pipe:aws s3 cp s3://BUCKET/SET/\{name\} -'"):
        ClipStore(url, cache)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_commands_are_run_without_a_shell(folder: Path, cache: ShardCache, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"3 of 3 to fetch pipe:cat .* failed: exit code 1: cat: .*No such file"):
        ClipStore(f"pipe:cat {folder}/{{name}} ; touch {tmp_path}/ran", cache)
    assert not (tmp_path / "ran").exists()


def test_a_command_that_fails_is_run_again(folder: Path, cache: ShardCache, tmp_path: Path) -> None:
    script = tmp_path / "flaky.sh"
    script.write_text(
        'head -c 1000 "$1/$2"; [ -e "$0.$2" ] || { : > "$0.$2"; echo lost >&2; exit 7; }; tail -c +1001 "$1/$2"'
    )
    assert len(list(ClipStore(f"pipe:sh {script} {folder} {{name}}", cache))) == 7


def test_a_command_that_hangs_is_ended_with_its_children(cache: ShardCache, tmp_path: Path) -> None:
    hasty = replace(cache, attempts=1, timeout_s=0.7)
    with pytest.raises(ShardError, match=r"printed nothing for 0.7 s; giving up"):
        ClipStore(f"pipe:sh -c 'sleep 60 & echo $! > {tmp_path}/pid; wait' {{name}}", hasty)
    sleeper = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    time.sleep(0.05)
    assert not sleeper.exists() or sleeper.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:aws s3 cp s3://bucket/set -", r"must be a command with \{name\}"),
        ("pipe:{name}", r"must be a command with \{name\}"),
        ("pipe:cat '{name}", "is no command: No closing quotation"),
        ("pipe:no-such-client {name}", "cannot run 'no-such-client': No such file"),
    ],
)
def test_commands_that_are_none(cache: ShardCache, source: str, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        ClipStore(source, cache)


# ---- training -------------------------------------------------------------------------------------------------------


def data_module(train: str | Path, cache: ShardCache, **settings: object) -> ClipDataModule:
    module = ClipDataModule(
        train, train, batch_size=2, frames_per_clip=2, val_frames=3, shard_cache=cache,
        **{"workers": 0, "shuffle_buffer": 3, **settings},
    )  # fmt: skip
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_validation_read_remote_sets(
    server: FaultyServer, folder: Path, cache: ShardCache, streaming: bool, workers: int
) -> None:
    ours = data_module(f"{server.url}/set", cache, streaming=streaming, workers=workers)
    theirs = data_module(folder, cache, streaming=streaming)
    if workers == 0 or not streaming:
        for a, b in zip(ours.train_dataloader(), theirs.train_dataloader(), strict=True):
            assert a.keys == b.keys and a.images.equal(b.images)
    else:
        assert len(list(ours.train_dataloader())) == 3
    assert [key for batch in ours.val_dataloader() for key in batch.keys] == [f"clip{i:03d}" for i in range(7)]
    assert [Counter(server.asked)[f"set/{tar}"] for tar in TARS] == [1, 1, 1]


def test_streaming_goes_through_a_cache_that_holds_a_part(made: Path, server: FaultyServer, cache: ShardCache) -> None:
    small = ShardCache(cache.folder, gigabytes=1.5 * (made / TARS[0]).stat().st_size / 1e9)
    store = ClipStore(f"{server.url}/set", small, in_sequence=True)
    batches = list(stream(store, batches=20))
    assert len({key for batch in batches for key in batch.keys}) == 7


def test_a_remote_set_is_mixed_with_a_near_one(server: FaultyServer, cache: ShardCache, tmp_path: Path) -> None:
    sets = {"far": f"{server.url}/set", "near": str(make_set(tmp_path / "near", 2))}
    module = ClipDataModule(
        sets, sets["far"], weights={"far": 1, "near": 1}, batch_size=4, frames_per_clip=2, val_frames=3, workers=0,
        shard_cache=cache,
    )  # fmt: skip
    module.setup()
    assert [len(set(batch.keys)) > 1 for batch in module.train_dataloader()] == [True, True]


def test_nothing_is_made_elsewhere() -> None:
    from fasthmr.data.synth.source import SynthConfig

    with pytest.raises(ValueError, match="val is not a folder, so nothing can be made there: set make_val to null"):
        ClipDataModule("train", "https://host/set", make_val=SynthConfig(clips=1, frames=4))


def test_a_config_names_url_and_cache() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ClipDataModule, "data")
    options = ["--data.train=https://host/set", "--data.val=pipe:aws s3 cp s3://b/{name} -"]
    parsed = parser.parse_args([*options, "--data.shard_cache.gigabytes=2", "--data.shard_cache.folder=$TMPDIR/x"])
    module = parser.instantiate(parsed).data
    assert module.train_dirs == {"train": "https://host/set"} and module.val_dir == "pipe:aws s3 cp s3://b/{name} -"
    assert module.shard_cache == ShardCache("$TMPDIR/x", gigabytes=2.0)
    with pytest.raises(ValueError, match=r"shard_cache\.attempts must be positive, got 0"):
        ShardCache(attempts=0)
    with pytest.raises(ShardError, match="names a variable that is not set"):
        _ = ShardCache("$NO_SUCH_VARIABLE/shards").root


# ---- streams: few and uneven shards, damaged clips ------------------------------------------------------------------


def stream(store: ClipStore, batches: int = 4, **settings: object) -> StreamLoader:
    sampling = TrainSampling(2, Augmentation.off())
    return StreamLoader(store, sampling, 2, batches, 3, seed=1, batches_done=lambda: 0, **settings)


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_dealt_out_shards_go_to_one_worker_each(made: Path, shares: int) -> None:
    samples = StreamedSamples(
        ClipStore(made), TrainSampling(2, Augmentation.off()), 2, 4, 3, [1, 0], 0, 1, resample=False, max_damaged=0
    )
    dealt = [list(itertools.islice(samples._dealt(share, shares), 30 // shares)) for share in range(shares)]
    order = list(itertools.chain(*zip(*dealt, strict=True)))
    passes = [order[i : i + 3] for i in range(0, 30, 3)]
    assert all(sorted(shown) == [0, 1, 2] for shown in passes)
    assert len(set(map(tuple, passes))) > 3, "each in another order"


def test_a_dealt_out_pass_shows_every_clip_once(made: Path) -> None:
    loader = StreamLoader(
        ClipStore(made), TrainSampling(2, Augmentation.off()), 1, 7, 1, seed=1, batches_done=lambda: 0, resample=False
    )
    assert sorted(key for batch in loader for key in batch.keys) == [f"clip{i:03d}" for i in range(7)]


def test_fewer_shards_than_workers_are_refused_or_drawn(made: Path) -> None:
    with pytest.raises(ValueError, match=r"3 shards cannot be dealt out to 4 loader processes \(2 ranks\): .*resample"):
        stream(ClipStore(made), world_size=2, workers=2, resample=False)
    assert len(list(stream(ClipStore(made), rank=3, world_size=8))) == 4


@pytest.mark.parametrize("resample", [True, False])
def test_ranks_have_equally_many_batches_of_uneven_shards(made: Path, resample: bool) -> None:
    ranks = [list(stream(ClipStore(made), rank=r, world_size=3, resample=resample)) for r in range(3)]
    assert [len(batches) for batches in ranks] == [4, 4, 4]
    assert ranks[0][0].keys != ranks[1][0].keys or ranks[1][0].keys != ranks[2][0].keys


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_no_validation_clip_is_shown_twice(
    server: FaultyServer, cache: ShardCache, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    module = data_module(f"{server.url}/set", cache)
    for rank in range(world_size):
        monkeypatch.setattr(module, "_process", lambda rank=rank: (rank, world_size))
        shown += [key for batch in module.val_dataloader() for key in batch.keys]
    assert sorted(shown) == [f"clip{i:03d}" for i in range(7)]


def damage(folder: Path, tar: str, *numbers: int) -> None:
    content = bytearray((folder / tar).read_bytes())
    for sample in (ShardIndex.read(folder / tar).samples[n] for n in numbers):
        at, size = sample.files["labels.npz"]
        content[at : at + size] = bytes(size)
    (folder / tar).write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_clips_are_named_counted_and_skipped(
    folder: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder, TARS[0], 1)
    with caplog.at_level("WARNING"):
        batches = list(stream(ClipStore(folder), batches=16, workers=workers, max_damaged=50))
    assert [len(batch.keys) for batch in batches] == [2] * 16
    assert {key for batch in batches for key in batch.keys} == {f"clip{i:03d}" for i in range(7)} - {"clip001"}
    assert (
        f"rank 0 skips a damaged clip, 1 of 50: {folder / TARS[0]}: clip clip001: its labels are damaged" in caplog.text
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [0, 3])
def test_more_damaged_clips_than_allowed_are_an_error(folder: Path, workers: int, limit: int) -> None:
    for tar, numbers in zip(TARS, ([0, 1, 2], [0, 1, 2], [0]), strict=True):
        damage(folder, tar, *numbers)
    with pytest.raises(ClipError, match=rf"shard-00000\d.tar: clip clip00\d: .*\({limit + 1} damaged .* is {limit}\)"):
        list(stream(ClipStore(folder), workers=workers, max_damaged=limit))


def test_workers_together_may_not_skip_more_than_the_rank(folder: Path) -> None:
    damage(folder, TARS[0], 0, 1)
    damage(folder, TARS[1], 0, 1)
    with pytest.raises(ClipError, match=r"\(21 damaged in this epoch, max_damaged is 20\)"):
        list(stream(ClipStore(folder), batches=40, workers=2, max_damaged=20))


# ---- a real server --------------------------------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; pid {0}/pid; error_log {0}/error.log;
events {{}}
http {{
  access_log {0}/access.log; client_body_temp_path {0}/t; proxy_temp_path {0}/t; fastcgi_temp_path {0}/t;
  uwsgi_temp_path {0}/t; scgi_temp_path {0}/t;
  limit_req_zone $uri zone=strict:1m rate=30r/m;
  server {{
    listen 127.0.0.1:{1}; root {2};
    location /busy/ {{ alias {2}/; limit_req zone=strict; limit_req_status 503; }}
    location /slow/ {{ alias {2}/; limit_rate 200k; }}
    location /down/ {{ return 503; }}
    location /behind/ {{ proxy_pass {3}/; proxy_buffering off; proxy_read_timeout 1s; }}
  }}
}}
"""


@contextmanager
def nginx(lab: Path, folder: Path, behind: str) -> Iterator[str]:
    """Serves the files of `folder` in several ways, and those of another server; its URL."""
    lab.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (lab / "nginx.conf").write_text(NGINX.format(lab, port, folder, behind))
    server = subprocess.Popen(["nginx", "-e", str(lab / "error.log"), "-c", str(lab / "nginx.conf"), "-p", str(lab)])
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert server.poll() is None and time.monotonic() < deadline, (lab / "error.log").read_text()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx (apt-get install nginx-light)")
def test_a_real_nginx(folder: Path, cache: ShardCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(folder) as behind, nginx(tmp_path / "nginx", folder, behind.url) as url:
        for place in ("", "/slow"):
            assert len(list(ClipStore(f"{url}{place}", ShardCache(f"{cache.folder}{place}")))) == 7
        with pytest.raises(ShardError, match=rf"3 of 3 to fetch {url}/down/manifest.json failed: 503"):
            ClipStore(f"{url}/down", cache)
        for number in range(2):  # the second is too soon after the first: 503 until two seconds have passed
            ClipStore(f"{url}/busy", ShardCache(f"{cache.folder}/busy{number}", attempts=12))
        assert "failed: 503 Service Temporarily Unavailable; the next in" in caplog.text
        # What nginx passes on is cut short, then stands still for longer than it waits itself.
        shard = next(folder.glob("*.tar")).name
        behind.faults[shard] += [cut, late(1.5)]
        assert len(list(ClipStore(f"{url}/behind", ShardCache(f"{cache.folder}/behind", attempts=4)))) == 7
        assert behind.asked.count(shard) == 3
