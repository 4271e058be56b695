"""Several jobs that make one set: in parts, or one while the others wait for it."""

from __future__ import annotations

import fcntl
import logging
import threading
from pathlib import Path

import pytest
from shard_sources import DrawnSource

from fasthmr.data import shards
from fasthmr.data.shards import LOCK, ShardError, ensure_shards, write_part, write_shards

SOURCE = DrawnSource(clips=5, frames=2)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def test_parts_in_any_order_make_the_set_that_one_job_makes(tmp_path):
    write_shards(SOURCE, tmp_path / "one", clips_per_shard=1, progress=False)
    made = [write_part(SOURCE, tmp_path / "parts", part, 3, 1, progress=False) for part in (3, 1, 1, 2)]
    assert [manifest is None for manifest in made] == [True, True, True, False], "the last one writes the manifest"
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def test_a_part_leaves_what_others_are_writing(tmp_path):
    for name in (".shard-000000.tar.1.tmp", ".shard-000001.tar.1.tmp"):
        (tmp_path / name).touch()
    write_part(SOURCE, tmp_path, 1, 2, 1, progress=False)
    assert [path.name for path in tmp_path.glob(".shard*")] == [".shard-000001.tar.1.tmp"]


def test_there_is_no_part_beyond_the_last(tmp_path):
    with pytest.raises(ShardError, match="part must be one of 1 to 3, got 4"):
        write_part(SOURCE, tmp_path, 4, 3)


def test_another_node_waits_for_the_one_that_makes_the_set_and_says_so(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shards, "_LOOK_S", 0.05)
    lock = (tmp_path / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.3, lock.close).start()
    assert ensure_shards(SOURCE, tmp_path, clips_per_shard=5).clips == 5
    assert "another process is writing into" in caplog.text and "waiting for it up to 720 min" in caplog.text


def test_waiting_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WAIT_S", 0.1)
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="another process is writing into"):
            ensure_shards(SOURCE, tmp_path)
