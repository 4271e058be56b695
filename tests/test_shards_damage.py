"""Reading sets of shards that are incomplete, damaged or hostile: every error says what is wrong where."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_sources import BODY, DrawnSource

from fasthmr.body import BodyMismatchError
from fasthmr.data.index import ShardIndex
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ClipStore, ShardError, verify_shards, write_shards

TAR = "shard-000001.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "whole"
    write_shards(DrawnSource(clips=4, frames=2), folder, clips_per_shard=2, progress=False)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A set of one's own, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def change(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def place_of(folder: Path, key: str, extension: str) -> int:
    (sample,) = [s for s in ShardIndex.read(folder / TAR).samples if s.key == key]
    return sample.files[extension][0]


# ---- opening --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / TAR).unlink(), "shard .*shard-000001.tar is missing: the manifest lists it"),
        (lambda f: (f / TAR).write_bytes((f / TAR).read_bytes()[:-9000]), "shard-000001.tar has .* it was cut short"),
        (lambda f: (f / f"{TAR}.idx").unlink(), "shard-000001.tar has no index .*: it was not finished"),
        (lambda f: (f / f"{TAR}.idx").write_text("{"), r"the index .*shard-000001.tar.idx is damaged"),
        (lambda f: (f / f"{TAR}.idx").write_text("[]"), r"the index .*shard-000001.tar.idx is damaged"),
        (lambda f: change_json(f / f"{TAR}.idx", bytes=10), "damaged .it has a member outside of the shard's 10 bytes"),
        (lambda f: (f / "manifest.json").unlink(), "there is no set of shards in .*: it is not finished"),
        (lambda f: shutil.rmtree(f), "there is no set of shards in .*: it does not exist or is empty"),
        (lambda f: (f / "manifest.json").write_text("nothing"), "manifest.json is damaged"),
        (
            lambda f: change_json(f / "manifest.json", schema_version=9),
            r"has schema version 9, this fasthmr reads \(1, 2\)",
        ),
        (lambda f: change_json(f / "manifest.json", extra=1), "manifest.json is damaged"),
        (lambda f: change_json(f / "manifest.json", shards={"../x.tar": ""}), "no shard is called '../x.tar'"),
    ],
)
def test_a_set_that_is_not_whole_is_not_opened(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ShardError, match=message):
        ClipStore(folder)


def test_labels_of_another_body_are_refused(whole: Path) -> None:
    store = ClipStore(whole)
    store.require_body(BODY)
    with pytest.raises(BodyMismatchError, match=r"stick@0.*giant@7"):
        store.require_body("giant@7")


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_damaged_clip_is_named_with_its_shard(folder: Path) -> None:
    change(folder / TAR, place_of(folder, "drawn-003", "labels.npz") + 300, bytes(50))
    store = ClipStore(folder)
    assert store[2].key == "drawn-002"
    with pytest.raises(ClipError, match=r"shard-000001.tar: clip drawn-003: its labels are damaged"):
        store[3]


def test_a_disk_that_cannot_read_is_named_with_clip_and_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    store = ClipStore(folder)
    monkeypatch.setattr(os, "pread", broken)
    for read in (lambda: store[3], lambda: next(store.read_shard(1, skip=1))):
        with pytest.raises(ShardError, match=r"clip drawn-003 in .*shard-000001.tar cannot be read \(Input/output"):
            read()
    assert any("Input/output error" in found for found in verify_shards(folder))


def test_a_shard_that_is_cut_after_it_was_opened(folder: Path) -> None:
    store = ClipStore(folder)
    with (folder / TAR).open("r+b") as file:
        file.truncate(place_of(folder, "drawn-003", "frames.jpgs") + 100)
    with pytest.raises(ClipError, match=r"shard-000001.tar: clip drawn-003: the offsets of frames do not fit"):
        store[3]


# ---- verifying ------------------------------------------------------------------------------------------------------


def test_a_whole_set_has_no_problems(whole: Path) -> None:
    assert verify_shards(whole) == []


def test_a_corrupt_jpeg_is_named(folder: Path) -> None:
    frames = ClipStore(folder)[2].frames
    pixels = frames.offsets[1] + frames[1].index(b"\xff\xda")
    at = place_of(folder, "drawn-002", "frames.jpgs") + pixels
    change(folder / TAR, at, bytes(frames.offsets[2] - pixels))
    problems = verify_shards(folder)
    assert len(problems) == 2
    assert f"{TAR}: its checksum is" in problems[0]
    assert f"{TAR}: clip drawn-002: frames: frame 1 cannot be decoded" in problems[1]


def test_one_flipped_bit_is_found(folder: Path) -> None:
    at = place_of(folder, "drawn-002", "frames.jpgs") + 4000
    change(folder / TAR, at, bytes([(folder / TAR).read_bytes()[at] ^ 1]))
    assert any(f"{TAR}: its checksum is" in problem for problem in verify_shards(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / TAR).unlink(), "shard-000001.tar is missing"),
        (lambda f: (f / f"{TAR}.idx").unlink(), "shard-000001.tar has no index"),
        (lambda f: shutil.copy(f / TAR, f / "shard-000007.tar"), "shard-000007.tar is not in the manifest"),
        (lambda f: shutil.copy(f / "shard-000000.tar", f / TAR), "shard-000001.tar: its checksum"),
        (lambda f: change_json(f / "manifest.json", clips=5), "are (4, 8) by the indices and (5, 8) by the manifest"),
        (lambda f: change_json(f / "manifest.json", body="giant@7"), "clip drawn-000 belongs to body 'stick@0'"),
    ],
)
def test_every_kind_of_problem_is_told(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    assert message in "\n".join(verify_shards(folder))


def test_a_shard_cut_anywhere_is_told(folder: Path) -> None:
    content = (folder / TAR).read_bytes()
    labels = place_of(folder, "drawn-003", "labels.npz")
    for size in (0, 100, 512, 5000, labels - 512, labels - 100, labels, labels + 700, len(content) - 20_000):
        (folder / TAR).write_bytes(content[:size])
        problems = verify_shards(folder)
        assert problems, size
        assert all(TAR in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["../../etc/passwd.txt", "/root/key.meta.json", "folder/key.meta.json", "README"])
def test_members_with_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    with pytest.raises(ShardError, match="is no member of a clip"):
        ShardIndex.of(tmp_path / "x.tar")


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("key.meta.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ShardError, match="is no member of a clip"):
        ShardIndex.of(tmp_path / "x.tar")


def test_a_member_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("key.meta.json"))
    with pytest.raises(ShardError, match=r"'key.meta.json' occurs twice"):
        ShardIndex.of(tmp_path / "x.tar")


def test_a_member_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("key.meta.json")
    member.size = 1 << 40
    (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ShardError, match=r"is cut short in 'key.meta.json'"):
        ShardIndex.of(tmp_path / "x.tar")
