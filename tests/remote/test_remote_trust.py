"""What servers and commands send is not trusted: names, sizes, redirects, files that never end."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.faulty_server import FaultyServer, instead, status

from fasthmr.data import remote
from fasthmr.data.remote import RemoteSet, ShardCache
from fasthmr.data.shards import ClipStore, ShardError

TARS = [f"shard-{i:06d}.tar" for i in range(3)]  # of three, three and one clip


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- what servers send --------------------------------------------------------------------------------------------


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
        ({"samples": [{"key": "a", "frames": 10**30, "files": {}}]}, "a clip of impossible length"),
        ({"samples": [{"key": "\ud800", "frames": 1, "files": {}}]}, "a key that is no text"),
        ({"samples": [{"key": 7, "frames": 1, "files": {}}]}, "is damaged"),
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
    assert not list(cache.root.glob(f"*/*{TARS[0]}")) and not list(cache.root.glob("*/*.tmp"))
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


def test_a_command_that_trickles_is_ended_before_it_is_tried_again(
    folder: Path, cache: ShardCache, tmp_path: Path
) -> None:
    script = tmp_path / "slow.sh"
    script.write_text(
        f"kill -0 $(cat {tmp_path}/pid) && touch {tmp_path}/alive; echo $$ > {tmp_path}/pid\n"
        "while sleep 0.1; do printf x; done"
    )
    with pytest.raises(ShardError, match=r"attempt 2 of 2 .* only \d+ bytes in .* giving up"):
        ClipStore(f"pipe:sh {script} {{name}}", replace(cache, attempts=2, timeout_s=0.5))
    assert not (tmp_path / "alive").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


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
