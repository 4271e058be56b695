"""Reading shards at random: a finished set as a sequence of clips, through the index files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fasthmr.body import require_same_body
from fasthmr.data.codec import decode_sample
from fasthmr.data.index import IndexedSample, Manifest, ShardError, ShardIndex
from fasthmr.data.schema import Clip, ClipError


class ClipStore:
    """A finished set of shards as a sequence of clips, read by position; images stay encoded until they are asked for.

    Opening compares every shard with its index: it must be there and of that size. `verify_shards` compares contents.
    A store holds no open files, so it can be pickled, forked and shared.

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
            index, size = ShardIndex.read(tar), tar.stat().st_size
            if size != index.bytes:
                raise ShardError(
                    f"shard {tar} has {size} bytes, its index says {index.bytes}: it was cut short or changed; "
                    "make the set again to restore it"
                )
            self._samples += [(number, sample) for sample in index.samples]

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
        try:
            return decode_sample({"__key__": sample.key, **_read(self.shards[number], sample)})
        except ClipError as error:
            raise ClipError(f"{self.shards[number]}: {error}") from error

    def lengths(self) -> Iterator[tuple[str, int]]:
        """(key, frames) of every clip, from the indices."""
        return ((sample.key, sample.frames) for _, sample in self._samples)

    def shard_of(self, index: int) -> Path:
        """The shard that holds clip `index`."""
        return self.shards[self._samples[index][0]]

    def require_body(self, body_id: str) -> None:
        """Refuse labels of another body.

        Raises:
            BodyMismatchError: naming both bodies.
        """
        require_same_body(body_id, self.manifest.body, where=str(self.folder))


def _read(tar: Path, sample: IndexedSample) -> dict[str, bytes]:
    """A sample's members. The shard is opened anew each time: 20 microseconds, for which there is no state to keep."""
    file = os.open(tar, os.O_RDONLY)
    try:
        return {extension: os.pread(file, size, offset) for extension, (offset, size) in sample.files.items()}
    finally:
        os.close(file)
