"""The streaming path: training clips read from whole shards in sequence, for sets too large to read at random.

Random access (`datamodules.samples`) is the default: it resumes exactly. Streaming reads each shard from front to
back, which spinning disks and network storage need; shards that are elsewhere are fetched while the one before is read.
By default shards are drawn WITH replacement (every worker of every rank draws its own, so there is nothing to split and
no rank can run dry), and a "pass over the data" is only an average. They can also be dealt out, each to one worker of
one rank in a pass; then there must be one for each. Either way an epoch is a fixed number of batches per rank, so that
none waits for another. A run is reproducible given (seed, batches done, rank, worker, numbers of ranks and workers); a
run that is resumed draws anew from its step on: reproducible, but not identical to an uninterrupted one.

WebDataset makes the pipeline, but its tar reader would parse, and unpack, what others sent: members are found by the
shard's index, as they are at random, which also takes a seventh of its time.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.samples import TrainSampling, stratified_frames
from fasthmr.data.batch import ClipBatch, ClipSample, collate
from fasthmr.data.codec import decode_sample
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ClipStore
from fasthmr.data.transforms import make_sample

log = logging.getLogger(__name__)

#: samples of a batch, and of each damaged clip that was skipped on the way what is wrong with it
_Batch = tuple[list[ClipSample], list[str]]


class StreamedSamples(IterableDataset[_Batch]):
    """Yields one worker's share of the batches of one epoch.

    Args:
        store: the clips.
        sampling: what a sample is.
        batch_size: clips per batch.
        batches: batches of this rank in the epoch, over all of its workers.
        buffer: clips held back, still encoded, for shuffling.
        entropy: integers that determine all random choices, together with the numbers of rank and worker.
        rank, world_size: this process among those that train together.
        resample: draw shards with replacement; or deal them out.
        max_damaged: damaged clips to skip.
    """

    def __init__(
        self,
        store: ClipStore,
        sampling: TrainSampling,
        batch_size: int,
        batches: int,
        buffer: int,
        entropy: list[int],
        rank: int,
        world_size: int,
        resample: bool,
        max_damaged: int,
    ) -> None:
        self.store, self.sampling, self.batch_size, self.batches = store, sampling, batch_size, batches
        self.buffer, self.entropy, self.rank, self.world_size = buffer, entropy, rank, world_size
        self.resample, self.max_damaged = resample, max_damaged

    def __iter__(self) -> Iterator[_Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        own_batches = len(range(number, self.batches, workers))
        of_shards, rng = np.random.default_rng([*self.entropy, self.rank, number]).spawn(2)
        share = self.rank * workers + number
        shards = self._drawn(of_shards) if self.resample else self._dealt(share, self.world_size * workers)
        of_buffer = random.Random(int(rng.integers(2**63)))
        shuffle = wds.shuffle(self.buffer, initial=self.buffer, rng=of_buffer)
        clips = iter(wds.DataPipeline(lambda: shards, self._read, shuffle))
        skipped = 0
        for _ in range(own_batches):
            samples: list[ClipSample] = []
            damaged: list[str] = []
            while len(samples) < self.batch_size:
                shard, members = next(clips)
                try:
                    samples.append(self._sample(members, rng))
                except ClipError as error:
                    damaged.append(f"{self.store.shards[shard]}: {error}")
                    skipped += 1
                    _require_few(skipped, self.max_damaged, damaged[-1])
            yield samples, damaged

    def _drawn(self, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield int(rng.integers(len(self.store.shards)))

    def _dealt(self, share: int, shares: int) -> Iterator[int]:
        passes = (np.random.default_rng([*self.entropy, number]) for number in itertools.count())
        order = itertools.chain.from_iterable(rng.permutation(len(self.store.shards)).tolist() for rng in passes)
        return itertools.islice(order, share, None, shares)

    def _read(self, shards: Iterator[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for shard, after in itertools.pairwise(shards):
            for members in self.store.read_shard(shard, ahead=after):
                yield shard, members

    def _sample(self, members: dict[str, Any], rng: np.random.Generator) -> ClipSample:
        clip = decode_sample(members)
        frame_index = stratified_frames(len(clip.frames), self.sampling.frames, rng)
        return make_sample(clip, frame_index, rng, self.sampling.augmentation, self.sampling.crop_scale)


class StreamLoader:
    """Iterable over the training batches of one rank; every iteration is an epoch of exactly `len(loader)` batches.

    Args:
        store, sampling, batch_size, buffer, rank, world_size: as of `StreamedSamples`.
        batches: per epoch and rank; equal on all ranks, so that none waits for another.
        seed: of everything.
        batches_done: how many batches the trainer has finished, which seeds the epoch that begins.
        workers: loader processes; they are started for each epoch.
        resample: each worker draws shards with replacement; or in each pass they are dealt out to the workers of all
            ranks.
        max_damaged: damaged clips that are skipped in an epoch of this rank, each named in the log; one more is an
            error.
        pin_memory: put batches into page-locked memory, for a GPU.

    Raises:
        ValueError: no clips, less than one batch, or fewer shards than there are workers to deal them out to.
    """

    def __init__(
        self,
        store: ClipStore,
        sampling: TrainSampling,
        batch_size: int,
        batches: int,
        buffer: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        resample: bool = True,
        max_damaged: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if len(store) == 0:
            raise ValueError(f"there are no clips to stream from in {store.folder}")
        if batches < 1:
            raise ValueError(f"an epoch needs at least one batch on every rank, got {batches}: raise clips_per_epoch")
        shares = world_size * max(1, workers)
        if not resample and len(store.shards) < shares:
            raise ValueError(
                f"{len(store.shards)} shards cannot be dealt out to {shares} loader processes ({world_size} ranks): "
                "write smaller shards, lower workers, or draw them with replacement (resample: true)"
            )
        self.store, self.sampling, self.batch_size, self.batches = store, sampling, batch_size, batches
        self.buffer, self.seed, self.batches_done, self.rank = buffer, seed, batches_done, rank
        self.world_size, self.workers, self.resample = world_size, workers, resample
        self.max_damaged, self.pin_memory = max_damaged, pin_memory

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[ClipBatch]:
        samples = StreamedSamples(
            self.store,
            self.sampling,
            self.batch_size,
            self.batches,
            self.buffer,
            [self.seed, self.batches_done()],
            self.rank,
            self.world_size,
            self.resample,
            self.max_damaged,
        )
        loader = DataLoader(
            samples,
            batch_size=None,  # the samples come in batches
            collate_fn=_collate,  # type: ignore[arg-type]  # of what the data set yields
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or each epoch would advance torch's global generator
        )
        skipped = 0
        for batch, damaged in loader:
            for why in damaged:
                skipped += 1
                _require_few(skipped, self.max_damaged, why)  # of all workers together
                log.warning("rank %d skips a damaged clip, %d of %d: %s", self.rank, skipped, self.max_damaged, why)
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
