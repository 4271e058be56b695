"""Reading shards: any clip at random through the index files, and the verification of everything."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasthmr.body import require_same_body
from fasthmr.data.codec import decode_sample
from fasthmr.data.schema import SCHEMA_VERSION, Clip, ClipError

MANIFEST = "manifest.json"
INDEX_SUFFIX = ".idx"


class ShardError(ValueError):
    """A set of shards is incomplete, damaged or of another kind than asked for."""


@dataclass(frozen=True)
class IndexedSample:
    """Where a sample lies in its shard: extension -> [offset, size] in bytes."""

    key: str
    frames: int
    files: dict[str, list[int]]


@dataclass(frozen=True)
class ShardIndex:
    """The index file of a shard."""

    bytes: int
    sha256: str
    samples: list[IndexedSample]

    @classmethod
    def read(cls, tar: Path) -> ShardIndex:
        """Read the index beside `tar`.

        Raises:
            ShardError: it is missing or damaged.
        """
        path = tar.with_name(tar.name + INDEX_SUFFIX)
        try:
            content = json.loads(path.read_text())
            return cls(content["bytes"], content["sha256"], [IndexedSample(**s) for s in content["samples"]])
        except FileNotFoundError as error:
            raise ShardError(f"{tar} has no index {path.name}: it was not finished, run `python -m fasthmr.shard make` again") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"the index {path} is damaged ({error}): remove it and make the shard again") from error

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

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a set's manifest.

        Raises:
            ShardError: there is none (missing or unfinished set), it is damaged, or of another schema version.
        """
        path = folder / MANIFEST
        try:
            manifest = cls(**json.loads(path.read_text()))
        except FileNotFoundError as error:
            state = "is not finished" if folder.is_dir() and any(folder.iterdir()) else "does not exist or is empty"
            raise ShardError(f"there is no set of shards in {folder}: it {state}; make it with `python -m fasthmr.shard make`") from error
        except (ValueError, TypeError) as error:
            raise ShardError(f"{path} is damaged ({error}): make the set again") from error
        if manifest.schema_version != SCHEMA_VERSION:
            raise ShardError(
                f"{folder} has schema version {manifest.schema_version}, this fasthmr reads {SCHEMA_VERSION}: make the set again"
            )
        return manifest


class ClipStore:
    """A finished set of shards as a sequence of clips, read by position; images stay encoded until they are asked for.

    Opening compares every shard with its index (there, and of the right size); contents are compared by `verify_shards`.
    Stores can be pickled and forked: each process opens the files for itself.

    Args:
        folder: the set's directory.

    Raises:
        ShardError: the set is missing or unfinished, or a shard is missing or has another size than its index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.shards = [self.folder / name for name in sorted(self.manifest.shards)]
        self._samples: list[tuple[int, IndexedSample]] = []
        for number, tar in enumerate(self.shards):
            if not tar.is_file():
                raise ShardError(f"shard {tar} is missing: the manifest lists it; make the set again to restore it")
            index = ShardIndex.read(tar)
            if tar.stat().st_size != index.bytes:
                raise ShardError(
                    f"shard {tar} has {tar.stat().st_size} bytes, its index says {index.bytes}: it was cut short or changed; "
                    "remove it with its index and make the set again"
                )
            self._samples += [(number, sample) for sample in index.samples]
        self._files: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Clip]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, checked against the schema.

        Raises:
            ClipError: naming the shard, the clip and what is wrong with it.
        """
        number, sample = self._samples[index]
        file = self._open(number)
        members: dict[str, Any] = {ext: os.pread(file, size, offset) for ext, (offset, size) in sample.files.items()}
        try:
            return decode_sample({"__key__": sample.key, **members})
        except ClipError as error:
            raise ClipError(f"{self.shards[number]}: {error}") from error

    def lengths(self) -> Iterator[tuple[str, int]]:
        """(key, frames) of every clip, from the indices."""
        return ((sample.key, sample.frames) for _, sample in self._samples)

    def require_body(self, body_id: str) -> None:
        """Refuse labels of another body.

        Raises:
            BodyMismatchError: naming both bodies.
        """
        require_same_body(body_id, self.manifest.body, where=str(self.folder))

    def _open(self, number: int) -> int:
        # A file descriptor belongs to the process that opened it: a forked loader worker opens its own.
        pid, file = self._files.get(number, (-1, -1))
        if pid != os.getpid():
            file = os.open(self.shards[number], os.O_RDONLY)
            self._files[number] = (os.getpid(), file)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def index_tar(tar: Path) -> ShardIndex:
    """Index a shard by reading all of it: offsets, sizes, checksum, and the number of frames of each clip.

    Raises:
        ShardError: the tar is cut short, or has members that no shard has.
    """
    sha = hashlib.sha256()
    with tar.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    samples: dict[str, dict[str, list[int]]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                if not member.isfile() or "/" in member.name or not extension:
                    raise ShardError(f"{tar}: {member.name!r} is no member of a clip; names are KEY.EXTENSION, without folders")
                samples.setdefault(key, {})[extension] = [member.offset_data, member.size]
            if archive.offset > tar.stat().st_size:
                raise ShardError(f"{tar} is cut short")
    except tarfile.TarError as error:
        raise ShardError(f"{tar} is no readable tar file: {error}") from error
    with tar.open("rb") as file:

        def read(place: list[int]) -> bytes:
            file.seek(place[0])
            return file.read(place[1])

        rows = [
            IndexedSample(key, len(decode_sample({"__key__": key, **{e: read(p) for e, p in files.items()}})), files)
            for key, files in samples.items()
        ]
    return ShardIndex(tar.stat().st_size, sha.hexdigest(), rows)


def verify_shards(folder: str | Path) -> list[str]:
    """Compare every shard with its index and the manifest, and decode every image; the problems found, in words.

    Raises:
        ShardError: the set cannot be opened at all.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    problems: list[str] = []
    clips = 0
    for name, checksum in sorted(manifest.shards.items()):
        tar = folder / name
        if not tar.is_file():
            problems.append(f"{tar} is missing")
            continue
        try:
            index, found = ShardIndex.read(tar), index_tar(tar)
        except (ShardError, ClipError) as error:
            problems.append(str(error))
            continue
        clips += len(found.samples)
        if not index.sha256 == found.sha256 == checksum:
            problems.append(f"{tar}: its checksum is {found.sha256}, the index says {index.sha256}, the manifest {checksum}")
        if found.samples != index.samples:
            problems.append(f"{tar}: its members are not those of its index")
    if problems:
        return problems
    store = ClipStore(folder)
    if clips != manifest.clips:
        problems.append(f"{folder} has {clips} clips, the manifest says {manifest.clips}")
    for position, (key, _) in enumerate(store.lengths()):
        try:
            clip = store[position]
            clip.check_images()
            if clip.body is not None:
                require_same_body(manifest.body or "none", clip.body, where=f"clip {key}")
        except ValueError as error:
            problems.append(str(error))
    return problems
