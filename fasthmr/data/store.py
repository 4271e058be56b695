"""Reading shards: a finished set as a sequence of clips through the index files, at random or shard by shard."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from fasthmr.body import require_same_body
from fasthmr.data.codec import decode_sample
from fasthmr.data.index import Manifest, Samples, ShardError, ShardIndex
from fasthmr.data.remote import STREAMS, RemoteSet, ShardCache, is_remote
from fasthmr.data.schema import Clip, ClipError


class ClipStore:
    """A finished set of shards as a sequence of clips, read by position; images stay encoded until they are asked for.

    Opening compares every shard with its index: it must be there and of that size. `verify_shards` compares contents.
    Shards of a remote set are fetched when they are needed, and their contents compared then (`fasthmr.data.remote`).
    A store holds no open files, so it can be pickled, forked and shared.

    Args:
        place: the set's directory, its URL, or a command that prints its files.
        cache: where shards of a remote set are kept.
        in_sequence: shards are only read one after the other, so a remote set may be larger than the cache.

    Raises:
        ShardError: the set is missing or unfinished, cannot be reached, or does not fit into the cache; or a shard is
            missing or has another size than its index says.
    """

    def __init__(
        self,
        place: str | Path,
        cache: ShardCache = ShardCache(),  # noqa: B008  (frozen, so sharing it is safe)
        in_sequence: bool = False,
    ) -> None:
        self.in_sequence = in_sequence
        self.remote = RemoteSet(str(place), cache) if is_remote(place) else None
        self.folder = Path(place) if self.remote is None else self.remote.folder
        self.manifest = Manifest.read(self.folder)
        self.shards = [self.folder / name for name in sorted(self.manifest.shards)]
        self.sizes: list[int] = []  # of each shard, in bytes
        self._samples = Samples()
        self._firsts = [0]  # of each shard, the number of its first sample; and how many there are
        for tar in self.shards:
            if self.remote is None and not tar.is_file():
                raise ShardError(f"shard {tar} is missing: the manifest lists it; make the set again to restore it")
            index = ShardIndex.read(tar)
            if self.remote is None and (size := tar.stat().st_size) != index.bytes:
                raise ShardError(
                    f"shard {tar} has {size} bytes, its index says {index.bytes}: it was cut short or changed; "
                    "make the set again to restore it"
                )
            self.sizes.append(index.bytes)
            for sample in index.samples:
                self._samples.append(sample)
            self._firsts.append(len(self._samples))
        if self.remote is not None:
            self.remote.require_room(sum(self.sizes), in_sequence)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Clip]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, checked against the schema.

        Raises:
            ClipError: naming the shard, the clip and what is wrong with it.
            ShardError: the shard cannot be fetched.
        """
        index = range(len(self))[index]  # also of those that are counted from the end
        try:
            return decode_sample(self.members(index))
        except ClipError as error:
            raise ClipError(f"{self.shard_of(index)}: {error}") from error

    def members(self, index: int) -> dict[str, str | bytes]:
        """Clip `index` as it is stored, for `decode_sample`.

        Raises:
            ShardError: the shard cannot be fetched.
        """
        with self._opened(self.shard_number(index)) as file:
            return self._read(file, index)

    def clips_of(self, shard: int) -> range:
        """The numbers of the clips in shard `shard`."""
        return range(self._firsts[shard], self._firsts[shard + 1])

    def read_shard(self, number: int, skip: int = 0, ahead: int | None = None) -> Iterator[dict[str, str | bytes]]:
        """The clips of shard `number` from front to back, as members for `decode_sample`.

        Args:
            number: of the shard.
            skip: clips at its front that are not read.
            ahead: a shard that will be read next; it is fetched meanwhile, if it is elsewhere.

        Raises:
            ShardError: the shard cannot be fetched.
        """
        with self._opened(number) as file:
            if self.remote is not None and ahead is not None:
                self.remote.fetch_ahead(self.shards[ahead].name, self.sizes[ahead])
            for index in self.clips_of(number)[skip:]:
                yield self._read(file, index)

    def lengths(self) -> Iterator[tuple[str, int]]:
        """(key, frames) of every clip, from the indices."""
        return self._samples.lengths()

    def shard_number(self, index: int) -> int:
        """The number of the shard that holds clip `index`."""
        return bisect_right(self._firsts, index) - 1

    def shard_of(self, index: int) -> Path:
        """The shard that holds clip `index`."""
        return self.shards[self.shard_number(index)]

    def require_body(self, body_id: str) -> None:
        """Refuse labels of another body.

        Raises:
            BodyMismatchError: naming both bodies.
        """
        require_same_body(body_id, self.manifest.body, where=str(self.folder))

    def _read(self, file: int, index: int) -> dict[str, str | bytes]:
        """Members of a clip, with its key as `decode_sample` wants it.

        Raises:
            ShardError: the disk cannot read it.
        """
        sample = self._samples[index]
        try:
            members = {extension: os.pread(file, size, offset) for extension, (offset, size) in sample.files.items()}
        except OSError as error:
            raise ShardError(
                f"clip {sample.key} in {self.shard_of(index)} cannot be read ({error.strerror or error}): if this disk "
                "is sound, restore the shard, or make the set again"
            ) from error
        return {"__key__": sample.key, **members}

    @contextmanager
    def _opened(self, number: int) -> Iterator[int]:
        """A descriptor of a shard. It is opened each time: 20 microseconds, for which there is no state to keep."""
        tar = self.shards[number]
        file = os.open(tar, os.O_RDONLY) if self.remote is None else self.remote.open(tar.name, self.sizes[number])
        try:
            yield file
        finally:
            os.close(file)


def fetch_shards(stores: Sequence[ClipStore]) -> None:
    """Fetch all shards of those among `stores` that are remote and not read in sequence, with a progress bar.

    Raises:
        ShardError: together they do not fit into the cache, or one cannot be fetched.
    """
    missing = [
        (store.remote, tar.name, size)
        for store in stores
        if store.remote is not None and not store.in_sequence
        for tar, size in zip(store.shards, store.sizes, strict=True)
    ]
    if not missing:
        return
    total = sum(size for _, _, size in missing)
    missing[0][0].require_room(total)

    def fetch(remote: RemoteSet, name: str, size: int) -> int:
        remote.fetch(name, size)
        return size

    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="fetching shards") as bar,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        for size in pool.map(fetch, *zip(*missing, strict=True)):
            bar.update(size)
