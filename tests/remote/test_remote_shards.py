"""Sets of shards over http(s) and from commands: what goes wrong and is mended, and training on them."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
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
    late,
    serving,
    status,
    trickling,
)
from jsonargparse import ArgumentParser
from test_schema import assert_same
from tiny_training import make_set

from datamodules.clips import ClipDataModule
from datamodules.features import FeatureDataModule
from fasthmr.data.remote import ShardCache
from fasthmr.data.shards import ClipStore, ShardError
from fasthmr.data.synth.source import SynthConfig

TARS = [f"shard-{i:06d}.tar" for i in range(3)]  # of three, three and one clip


def tars_in(cache: ShardCache) -> list[str]:
    return sorted(tar.name for tar in cache.root.glob("*/*.tar"))


def unfinished_in(cache: ShardCache) -> list[Path]:
    return list(cache.root.glob("*/.*.tar.[0-9]*.tmp"))


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


@pytest.mark.parametrize("name", ["manifest.json", f"{TARS[0]}.idx", TARS[0]])
def test_a_server_that_trickles_is_asked_again(
    server: FaultyServer, cache: ShardCache, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults[name] = [trickling(0.1)]  # never silent for longer than is allowed
    assert len(list(ClipStore(f"{server.url}/set", replace(cache, timeout_s=0.5)))) == 7
    assert re.search(rf"set/{name} failed: only \d+ bytes in [\d.]+ s \(after 0 bytes\)", caplog.text)


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


def test_a_remote_set_is_mixed_with_a_near_one(server: FaultyServer, cache: ShardCache, tmp_path: Path) -> None:
    sets = {"far": f"{server.url}/set", "near": str(make_set(tmp_path / "near", 2))}
    module = ClipDataModule(
        sets, sets["far"], weights={"far": 1, "near": 1}, batch_size=4, frames_per_clip=2, val_frames=3, workers=0,
        shard_cache=cache,
    )  # fmt: skip
    module.setup()
    assert [len(set(batch.keys)) > 1 for batch in module.train_dataloader()] == [True, True]


def test_nothing_is_made_elsewhere() -> None:
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


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("FASTHMR_SHARD_CACHE", raising=False)
    assert ShardCache().root == Path("/home/me/.cache/fasthmr/shards")
    monkeypatch.setenv("FASTHMR_SHARD_CACHE", "~/scratch")  # for every command
    assert ShardCache().root == Path("/home/me/scratch")
    given = ShardCache("/given")
    assert given.root == Path("/given")
    assert FeatureDataModule("train", "val", "encoder.ckpt", shard_cache=given).shard_cache == given


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
    location /trickling/ {{ alias {2}/; limit_rate 1k; }}
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
        with pytest.raises(
            ShardError, match=rf"2 of 2 to fetch {url}/trickling/shard-000000.tar failed: only \d+ bytes"
        ):
            ClipStore(f"{url}/trickling", ShardCache(f"{cache.folder}/trickling", attempts=2, timeout_s=1.5))[0]
        for number in range(2):  # the second is too soon after the first: 503 until two seconds have passed
            ClipStore(f"{url}/busy", ShardCache(f"{cache.folder}/busy{number}", attempts=12))
        assert "failed: 503 Service Temporarily Unavailable; the next in" in caplog.text
        # What nginx passes on is cut short, then stands still for longer than it waits itself.
        shard = next(folder.glob("*.tar")).name
        behind.faults[shard] += [cut, late(1.5)]
        assert len(list(ClipStore(f"{url}/behind", ShardCache(f"{cache.folder}/behind", attempts=4)))) == 7
        assert behind.asked.count(shard) == 3
