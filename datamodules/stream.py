"""The streaming path: training clips read from whole shards in sequence, for sets too large to read at random.

Random access (`datamodules.samples`) is the default. Streaming reads each shard from front to back, which spinning
disks and network storage need; shards that are elsewhere are fetched while the one before is read. By default shards
are drawn WITH replacement (every stream draws its own, so there is nothing to split and no rank can run dry), and a
"pass over the data" is only an average. They can also be dealt out, each to one stream in a pass; then there must be
one for each. Either way an epoch is a fixed number of batches per rank, so that none waits for another.

A rank has as many streams as loader workers, and they never end: batch n of the run is the next of stream n % workers.
The clips of a stream are shuffled in windows, so where a batch begins follows from n and the sizes of the shards: a
resumed run counts its way there, without reading, and is shown what an uninterrupted one is. Frames and augmentation
of a sample follow from n and its place in the batch, and a damaged clip's place is taken by another clip of its
shard, so nothing of it depends on what was read before.

WebDataset makes the pipeline, but its tar reader would parse, and unpack, what others sent: members are found by the
shard's index, as they are at random, which also takes a seventh of its time. Its shuffle cannot be entered midway.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.order import Resumes, rest_of_epoch
from datamodules.samples import TrainSampling, stratified_frames
from fasthmr.data.batch import ClipBatch, ClipSample, collate
from fasthmr.data.codec import decode_sample
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ClipStore
from fasthmr.data.transforms import make_sample

log = logging.getLogger(__name__)

#: samples of a batch, and of each damaged clip whose place another took what is wrong with it
_Batch = tuple[list[ClipSample], list[str]]
#: number of a clip, and its members as they are stored
_Clip = tuple[int, dict[str, str | bytes]]
#: what a generator is for: with the seed before and other numbers after it, none has the random numbers of another
_SHARDS, _PASS, _WINDOW, _SAMPLE = range(1, 5)


@dataclass(frozen=True)
class Streams:
    """All that the batches of a run are a function of, together with their numbers.

    Attributes:
        store: the clips.
        sampling: what a sample is.
        batch_size: clips per batch.
        window: clips of a stream that are shuffled together, and held in memory, still encoded.
        seed: of everything.
        rank, world_size: this process among those that train together.
        workers: streams of a rank.
        resample: draw shards with replacement; or deal them out.
        max_damaged: damaged clips to skip.
    """

    store: ClipStore
    sampling: TrainSampling
    batch_size: int
    window: int
    seed: int
    rank: int
    world_size: int
    workers: int
    resample: bool
    max_damaged: int

    def batches(self, numbers: range) -> Iterator[_Batch]:
        """Batches of one stream: every `workers`-th of the run.

        Raises:
            ClipError: more damaged clips in succession than may be skipped.
        """
        if not numbers:
            return  # or a shard would be opened for nothing
        done, stream = divmod(numbers.start, self.workers)
        clips = self._clips(stream, done * self.batch_size)
        for number in numbers:
            samples: list[ClipSample] = []
            damaged: list[str] = []
            for place, clip in enumerate(itertools.islice(clips, self.batch_size)):
                sample, why = self._sample(*clip, self._generator(_SAMPLE, self.rank, number, place))
                samples.append(sample)
                damaged += why
            yield samples, damaged

    def _clips(self, stream: int, skip: int) -> Iterator[_Clip]:
        """The clips of a stream, after the first `skip`."""
        windows, skip = divmod(skip, self.window)
        share = self.rank * self.workers + stream
        shards = partial(self._drawn if self.resample else self._dealt, share)
        stored = partial(self._stored, skip=windows * self.window)
        return iter(wds.DataPipeline(shards, stored, partial(self._shuffled, share=share, first=windows, skip=skip)))

    def _shuffled(self, stored: Iterator[_Clip], share: int, first: int, skip: int) -> Iterator[_Clip]:
        """Each window of clips in an order of its own, from window `first` on; of that, not the first `skip` clips."""
        window = list(itertools.islice(stored, self.window))
        for number in itertools.count(first):
            following = []
            for place in self._generator(_WINDOW, share, number).permutation(self.window).tolist():
                following.append(next(stored))  # one in for one out: reading is spread evenly
                if skip == 0:
                    yield window[place]
                else:
                    skip -= 1
                window[place] = (0, {})
            window = following

    def _stored(self, shards: Iterator[int], skip: int) -> Iterator[_Clip]:
        """The clips of shards as they are stored, after the first `skip`, of which nothing is read."""
        for shard, after in itertools.pairwise(shards):
            clips = self.store.clips_of(shard)
            if skip < len(clips):
                yield from zip(clips[skip:], self.store.read_shard(shard, skip, after), strict=True)
            skip = max(0, skip - len(clips))

    def _drawn(self, share: int) -> Iterator[int]:
        rng = self._generator(_SHARDS, share)
        while True:
            yield from rng.integers(len(self.store.shards), size=256).tolist()

    def _dealt(self, share: int) -> Iterator[int]:
        passes = (self._generator(_PASS, number) for number in itertools.count())
        order = itertools.chain.from_iterable(rng.permutation(len(self.store.shards)).tolist() for rng in passes)
        return itertools.islice(order, share, None, self.world_size * self.workers)

    def _sample(
        self, clip: int, members: dict[str, str | bytes], rng: np.random.Generator
    ) -> tuple[ClipSample, list[str]]:
        """A sample of a clip, or if that is damaged of the next whole one, and what is wrong with all before that."""
        damaged: list[str] = []
        substitutes = self._substitutes(clip)
        while True:
            try:
                decoded = decode_sample(members)
                frame_index = stratified_frames(len(decoded), self.sampling.frames, rng)
                sample = make_sample(decoded, frame_index, rng, self.sampling.augmentation, self.sampling.crop_scale)
                return sample, damaged
            except ClipError as error:
                damaged.append(f"{self.store.shard_of(clip)}: {error}")
                _require_few(len(damaged), self.max_damaged, damaged[-1])
            clip = next(substitutes, clip)
            members = self.store.members(clip)

    def _substitutes(self, clip: int) -> Iterator[int]:
        """All other clips; first those of the same shard, which is at hand."""
        own = self.store.clips_of(self.store.shard_number(clip))
        yield from (*range(clip + 1, own.stop), *range(own.start, clip))
        yield from itertools.chain(range(own.stop, len(self.store)), range(own.start))

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])


class _Batches(IterableDataset[_Batch]):
    """What each loader process makes of the batches `numbers` of a run: the first of them begins, and so on in turn."""

    def __init__(self, streams: Streams, numbers: range) -> None:
        self.streams, self.numbers = streams, numbers

    def __iter__(self) -> Iterator[_Batch]:
        worker = get_worker_info()
        return self.streams.batches(self.numbers[worker.id if worker else 0 :: self.streams.workers])


class StreamLoader(Resumes):
    """Iterable over the training batches of one rank; every iteration goes on from the trainer's batch to the epoch's
    end.

    Args:
        store, sampling, batch_size, window, seed, rank, world_size, resample: as of `Streams`.
        batches: per epoch and rank; equal on all ranks, so that none waits for another.
        batches_done: how many batches the trainer has finished since the run began.
        workers: loader processes, each with a stream; they are started for each epoch. 0: this process, one stream.
        max_damaged: damaged clips in an epoch of this rank whose places are given to others, each named in the log; one
            more is an error. A run that goes on in the midst of an epoch counts from there.
        epoch_length: batches after which an iteration ends, if fewer (Lightning's `limit_train_batches`).
        pin_memory: put batches into page-locked memory, for a GPU.

    Raises:
        ValueError: no clips, less than one batch, or fewer shards than there are streams to deal them out to.
    """

    def __init__(
        self,
        store: ClipStore,
        sampling: TrainSampling,
        batch_size: int,
        batches: int,
        window: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        resample: bool = True,
        max_damaged: int = 0,
        epoch_length: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        if len(store) == 0:
            raise ValueError(f"there are no clips to stream from in {store.folder}")
        if batches < 1:
            raise ValueError(f"an epoch needs at least one batch on every rank, got {batches}: raise clips_per_epoch")
        self.streams = Streams(
            store, sampling, batch_size, window, seed, rank, world_size, max(1, workers), resample, max_damaged
        )
        shares = world_size * self.streams.workers
        if not resample and len(store.shards) < shares:
            raise ValueError(
                f"{len(store.shards)} shards cannot be dealt out to {shares} loader processes ({world_size} ranks): "
                "write smaller shards, lower workers, or draw them with replacement (resample: true)"
            )
        self.batches, self.batches_done, self.workers = batches, batches_done, workers
        self.epoch_length, self.pin_memory = epoch_length or batches, pin_memory

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[ClipBatch]:
        loader = DataLoader(
            _Batches(self.streams, rest_of_epoch(self.batches_done(), self.epoch_length)),
            batch_size=None,  # the samples come in batches
            collate_fn=_collate,  # type: ignore[arg-type]  # of what the data set yields
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or each epoch would advance torch's global generator
        )
        rank, limit = self.streams.rank, self.streams.max_damaged
        skipped = 0
        for batch, damaged in loader:
            for why in damaged:
                skipped += 1
                _require_few(skipped, limit, why)  # of all workers together
                log.warning("rank %d skips a damaged clip, %d of %d: %s", rank, skipped, limit, why)
            yield batch


def _require_few(damaged: int, limit: int, last: str) -> None:
    if damaged > limit:
        raise ClipError(
            f"{last} ({damaged} damaged in this epoch, max_damaged is {limit}); "
            "`python -m fasthmr.shard verify` on the shard's folder finds all"
        )


def _collate(batch: _Batch) -> tuple[ClipBatch, list[str]]:
    samples, damaged = batch
    return collate(samples), damaged
