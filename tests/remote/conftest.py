"""Fixtures of the tests of remote sets: a set of seven clips, a server of it whose faults can be chosen, a cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faulty_server import FaultyServer, serving
from tiny_training import make_set

from fasthmr.data import remote
from fasthmr.data.remote import ShardCache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("made") / "set", 7)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The set that is served, to damage."""
    return Path(shutil.copytree(made, tmp_path / "served" / "set"))


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with serving(folder.parent) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    return ShardCache(str(tmp_path / "cache"), attempts=3, timeout_s=20)
