"""What lies where in a set of shards: the index beside each shard, and the manifest of the whole set."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fasthmr.data.codec import decode_sample
from fasthmr.data.schema import READ_VERSIONS

MANIFEST = "manifest.json"
INDEX_SUFFIX = ".idx"
#: names go into paths, URLs and commands: no folders, and nothing that looks like an option
_SHARD_NAME = re.compile(r"\w[\w-]*\.tar", re.ASCII)
_Text = str | bytes


class ShardError(ValueError):
    """A set of shards is incomplete, damaged or of another kind than asked for."""


@dataclass(frozen=True)
class IndexedSample:
    """Where a sample lies in its shard: extension -> [offset, size] in bytes."""

    key: str
    frames: int
    files: dict[str, list[int]]


class Samples:
    """The samples of all shards of a set by number, in arrays: as objects they would take seven times the memory."""

    def __init__(self) -> None:
        self._extensions: dict[str, int] = {}
        self._keys, self._key_ends = bytearray(), array("q", [0])
        self._frames = array("q")
        self._files, self._file_ends = array("q"), array("q", [0])  # extension, offset and size of each

    def append(self, sample: IndexedSample) -> None:
        self._keys += sample.key.encode()
        self._key_ends.append(len(self._keys))
        self._frames.append(sample.frames)
        for extension, place in sample.files.items():
            self._files.extend((self._extensions.setdefault(extension, len(self._extensions)), *place))
        self._file_ends.append(len(self._files))

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, number: int) -> IndexedSample:
        files = self._files[self._file_ends[number] : self._file_ends[number + 1]]
        extensions = list(self._extensions)
        places = {extensions[files[i]]: [files[i + 1], files[i + 2]] for i in range(0, len(files), 3)}
        return IndexedSample(self._key(number), self._frames[number], places)

    def lengths(self) -> Iterator[tuple[str, int]]:
        """(key, frames) of each."""
        return ((self._key(number), frames) for number, frames in enumerate(self._frames))

    def _key(self, number: int) -> str:
        return self._keys[self._key_ends[number] : self._key_ends[number + 1]].decode()


@dataclass(frozen=True)
class ShardIndex:
    """The index file of a shard: its size, its checksum, its samples, and in words the clips that could not be made."""

    bytes: int
    sha256: str
    samples: list[IndexedSample]
    dropped: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, tar: Path) -> ShardIndex:
        """Read the index beside `tar`.

        Raises:
            ShardError: it is missing or damaged.
        """
        path = index_path(tar)
        try:
            return cls.from_json(path.read_bytes(), path)
        except FileNotFoundError as error:
            raise ShardError(f"{tar} has no index {path.name}: it was not finished, make the set again") from error

    @classmethod
    def from_json(cls, text: _Text, where: str | Path) -> ShardIndex:
        """An index from the text of its file, which somebody else may have written; `where` names it in errors.

        Raises:
            ShardError: it is damaged.
        """
        try:
            content = json.loads(text)
            index = cls(content["bytes"], content["sha256"], [IndexedSample(**s) for s in content["samples"]])
            index.dropped.extend(map(str, content.get("dropped", [])))  # indices of old have none
            places = [place for sample in index.samples for place in sample.files.values()]
            numbers = [index.bytes, *(s.frames for s in index.samples), *(n for place in places for n in place)]
            if not all(type(number) is int for number in numbers):
                raise ValueError("its numbers are no integers")
            if not all(offset >= 0 and size >= 0 and offset + size <= index.bytes for offset, size in places):
                raise ValueError(f"it has a member outside of the shard's {index.bytes} bytes")
            if not all(sample.key.isprintable() and 0 < sample.frames <= index.bytes for sample in index.samples):
                raise ValueError("it has a key that is no text, or a clip of impossible length")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ShardError(f"the index {where} is damaged ({error}): remove it and make the set again") from error
        return index

    @classmethod
    def of(cls, tar: Path) -> ShardIndex:
        """Index a shard by reading all of it: offsets, sizes, checksum, and the number of frames of each clip.

        Raises:
            ShardError: the tar is cut short, or has members that no shard has.
            ClipError: the labels of a clip are damaged.
        """
        files = _members(tar)
        sha256 = hashlib.sha256()
        with tar.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)

            def read(place: list[int]) -> bytes:
                file.seek(place[0])
                return file.read(place[1])

            samples = []
            for key, places in files.items():
                clip = decode_sample({"__key__": key, **{extension: read(p) for extension, p in places.items()}})
                samples.append(IndexedSample(key, len(clip), places))
        return cls(tar.stat().st_size, sha256.hexdigest(), samples)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Manifest:
    """What a finished set is: schema version, body, counts, what made it, and each shard's checksum."""

    schema_version: int
    body: str | None
    clips: int
    frames: int
    source: dict[str, Any]
    shards: dict[str, str]

    @property
    def bodies(self) -> list[str]:
        """Ids of the bodies that labels may belong to: the set's own, and the gendered ones of its family."""
        return allowed_bodies(self.source | {"body": self.body})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a set's manifest.

        Raises:
            ShardError: there is none (missing or unfinished set), it is damaged, or of another schema version.
        """
        path = folder / MANIFEST
        try:
            return cls.from_json(path.read_bytes(), path)
        except FileNotFoundError as error:
            state = "is not finished" if folder.is_dir() and any(folder.iterdir()) else "does not exist or is empty"
            raise ShardError(
                f"there is no set of shards in {folder}: it {state}; make it with `python -m fasthmr.shard make`"
            ) from error

    @classmethod
    def from_json(cls, text: _Text, where: str | Path) -> Manifest:
        """A manifest from the text of its file, which somebody else may have written; `where` names it in errors.

        Raises:
            ShardError: it is damaged, or of another schema version.
        """
        try:
            content = json.loads(text)
            version = content["schema_version"]
            if version not in READ_VERSIONS:
                raise ShardError(
                    f"{where} has schema version {version}, this fasthmr reads {READ_VERSIONS}: make the set again"
                )
            manifest = cls(**content)
            if not isinstance(manifest.source, dict):
                raise TypeError("its source is no mapping")
            for name, sha256 in manifest.shards.items():
                if not _SHARD_NAME.fullmatch(name) or not isinstance(sha256, str):
                    raise ValueError(f"no shard is called {name!r}")
        except ShardError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ShardError(f"{where} is damaged ({error}): make the set again") from error
        return manifest


def allowed_bodies(described: dict[str, Any]) -> list[str]:
    """Ids of the bodies that the labels of a source may belong to; a source says them in `body` and `bodies`."""
    return [body for body in (described.get("body"), *described.get("bodies", {}).values()) if body]


def index_path(tar: Path) -> Path:
    """Where the index of a shard lies."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def _members(tar: Path) -> dict[str, dict[str, list[int]]]:
    """key -> extension -> [offset, size], from the headers of a tar."""
    members: dict[str, dict[str, list[int]]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                if member.type != tarfile.REGTYPE or "/" in member.name or not extension:
                    raise ShardError(f"{tar}: {member.name!r} is no member of a clip; they are files KEY.EXTENSION")
                if extension in members.setdefault(key, {}):
                    raise ShardError(f"{tar}: {member.name!r} occurs twice")
                members[key][extension] = [member.offset_data, member.size]
                if member.offset_data + member.size > tar.stat().st_size:
                    raise ShardError(f"{tar} is cut short in {member.name!r}: make the set again")
    except tarfile.TarError as error:
        raise ShardError(f"{tar} is no readable tar file: {error}") from error
    return members
