"""The streaming path: training clips read from whole shards in sequence, for sets too large to read at random.

Random access (`datamodules.samples`) is the default: it resumes exactly. Streaming reads each shard from front to
back, which spinning disks and network storage need, at a price: shards are drawn WITH replacement (every worker of
every rank draws its own, so there is nothing to split and no rank can run dry), so a "pass over the data" is only an
average. An epoch is a fixed number of batches per rank. A run is reproducible given (seed, batches done, rank, worker,
number of workers); a run that is resumed draws anew from its step on: reproducible, but not identical to an
uninterrupted one.

A damaged tar stops the run. WebDataset's `warn_and_continue` would silently lose the rest of the shard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.samples import TrainSampling, stratified_frames
from fasthmr.data.batch import ClipBatch, ClipSample, collate
from fasthmr.data.codec import decode_sample
from fasthmr.data.transforms import make_sample


class StreamedSamples(IterableDataset[list[ClipSample]]):
    """Yields one worker's share of the batches of one epoch.

    Args:
        shards: paths of the tars.
        sampling: what a sample is.
        batch_size: clips per batch.
        batches: batches of this rank in the epoch, over all of its workers.
        buffer: clips held back, still encoded, for shuffling.
        entropy: integers that determine all random choices, together with the worker's number.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        sampling: TrainSampling,
        batch_size: int,
        batches: int,
        buffer: int,
        entropy: Sequence[int],
    ) -> None:
        self.shards, self.sampling, self.batch_size = [str(s) for s in shards], sampling, batch_size
        self.batches, self.buffer, self.entropy = batches, buffer, list(entropy)

    def __iter__(self) -> Iterator[list[ClipSample]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        own_batches = len(range(number, self.batches, workers))
        rng = np.random.default_rng([*self.entropy, number])
        pipeline = wds.DataPipeline(
            wds.ResampledShards(self.shards, seed=int(rng.integers(2**31)), deterministic=True),
            wds.tarfile_to_samples(handler=wds.reraise_exception),
            wds.shuffle(self.buffer, initial=self.buffer, rng=random.Random(int(rng.integers(2**63)))),
        )
        stream = iter(pipeline)
        for _ in range(own_batches):
            yield [self._sample(next(stream), rng) for _ in range(self.batch_size)]

    def _sample(self, members: dict, rng: np.random.Generator) -> ClipSample:
        clip = decode_sample(members)
        frame_index = stratified_frames(len(clip.frames), self.sampling.frames, rng)
        return make_sample(clip, frame_index, rng, self.sampling.augmentation, self.sampling.crop_scale)


class StreamLoader:
    """Iterable over the training batches of one rank; every iteration is an epoch of exactly `len(loader)` batches.

    Args:
        shards, sampling, batch_size, buffer: as of `StreamedSamples`.
        batches: per epoch and rank; equal on all ranks, so that none waits for another.
        seed: of everything.
        rank: this process' number; it only enters the seed.
        batches_done: how many batches the trainer has finished, which seeds the epoch that begins.
        workers: loader processes; they are started for each epoch.
        pin_memory: put batches into page-locked memory, for a GPU.

    Raises:
        ValueError: no shards, or less than one batch.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        sampling: TrainSampling,
        batch_size: int,
        batches: int,
        buffer: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not shards:
            raise ValueError("there are no shards to stream from")
        if batches < 1:
            raise ValueError(f"an epoch needs at least one batch on every rank, got {batches}: raise clips_per_epoch")
        self.shards, self.sampling, self.batch_size, self.batches = shards, sampling, batch_size, batches
        self.buffer, self.seed, self.batches_done, self.rank = buffer, seed, batches_done, rank
        self.workers, self.pin_memory = workers, pin_memory

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[ClipBatch]:
        samples = StreamedSamples(
            self.shards,
            self.sampling,
            self.batch_size,
            self.batches,
            self.buffer,
            entropy=[self.seed, self.batches_done(), self.rank],
        )
        loader = DataLoader(
            samples,
            batch_size=None,  # the samples come in batches
            collate_fn=collate,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or each epoch would advance torch's global generator
        )
        yield from loader
