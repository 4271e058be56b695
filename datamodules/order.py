"""Which clips make up which batch: the training order, that of mixtures, the validation split, a loader that resumes.

Training batches are numbered 0, 1, 2, ... over the whole run. What is in batch n on rank r is a pure function of
(seed, n, r): the data set is shuffled afresh for every pass over it and cut into global batches, of which each rank
takes its slice; what does not fill a global batch is left for another pass. All ranks therefore do equally many steps.

The only state is how many batches the trainer has finished. It is read from the trainer (whose counters are in every
checkpoint) whenever an iterator is made, never counted here: loader workers run ahead of training, so a sampler's own
count would skip what was fetched but not yet trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Sampler


class SampleId(NamedTuple):
    """A clip in one pass over the data; with the seed it determines every random choice made for the sample."""

    epoch: int
    clip: int


class TrainOrder(Sampler[list[SampleId]]):
    """Batch sampler of the training set, see the module's description.

    Args:
        samples: size of the data set.
        batch_size: samples per batch and rank.
        seed: of the shuffling.
        batches_done: how many batches the trainer has finished since the run began.
        rank, world_size: this process among those that train together.
        epoch_length: batches after which an iteration ends, if fewer than a pass over the data (Lightning's
            `limit_train_batches`); the next iteration goes on from there.

    Raises:
        ValueError: fewer samples than one batch on every rank needs.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        epoch_length: int | None = None,
    ) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.batches_done, self.rank, self.world_size = batches_done, rank, world_size
        self.batches_per_pass = samples // (batch_size * world_size)
        if self.batches_per_pass == 0:
            raise ValueError(
                f"a training step needs {batch_size} clips on each of {world_size} rank(s), "
                f"but an epoch of the training set has only {samples}: lower batch_size or make more clips"
            )
        self.epoch_length = epoch_length or self.batches_per_pass
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.batches_per_pass

    def __iter__(self) -> Iterator[list[SampleId]]:
        return map(self.batch, rest_of_epoch(self.batches_done(), self.epoch_length))

    def batch(self, number: int) -> list[SampleId]:
        """The samples of this rank's batch `number`, counted from the beginning of the run."""
        epoch, step = divmod(number, self.batches_per_pass)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        start = (step * self.world_size + self.rank) * self.batch_size
        return [SampleId(*row) for row in self._drawn[1][start : start + self.batch_size].tolist()]

    def _draw(self, epoch: int) -> np.ndarray:
        """(samples, 2) int64: the `SampleId`s of an epoch in their order."""
        clips = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        return np.stack([np.full_like(clips, epoch), clips], axis=1)


class MixtureOrder(TrainOrder):
    """Batch sampler of a mixture: in every epoch each set has exactly its share of the samples, in random places.

    Each set is shuffled afresh for every pass over it, and its passes go on from epoch to epoch: of a large set with a
    small share, every clip is shown once before any is shown again. The epoch of a `SampleId` is the pass over the set.

    Args:
        sizes: clips of each set by name; clips are numbered through all of them.
        shares: of each set in the samples; they add up to 1.
        samples: of an epoch, over all ranks.
        batch_size, seed, batches_done, rank, world_size, epoch_length: as of `TrainOrder`.

    Attributes:
        counts: samples of each set in an epoch.

    Raises:
        ValueError: an epoch is too short for one step, or for one sample of a set.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Mapping[str, float],
        samples: int,
        batch_size: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        epoch_length: int | None = None,
    ) -> None:
        super().__init__(samples, batch_size, seed, batches_done, rank, world_size, epoch_length)
        self.sizes = dict(sizes)
        self.counts = dealt_out(self.batches_per_pass * batch_size * world_size, shares)
        for name, count in self.counts.items():
            if count == 0:
                raise ValueError(
                    f"set {name!r} has a share of {shares[name]:.2g}, which is no sample in an epoch of {samples}: "
                    "raise its weight or clips_per_epoch"
                )

    def _draw(self, epoch: int) -> np.ndarray:
        sets = np.repeat(np.arange(len(self.sizes)), [self.counts[name] for name in self.sizes])
        np.random.default_rng([self.seed, epoch]).shuffle(sets)
        drawn = np.empty((len(sets), 2), dtype=np.int64)
        first = 0
        for number, (name, size) in enumerate(self.sizes.items()):
            count = self.counts[name]
            passes, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
            clips = np.empty_like(passes)
            for which in range(passes[0], passes[-1] + 1):
                # four numbers, so that no sample and no epoch has the same generator
                shuffled = np.random.default_rng([self.seed, which, number, 1]).permutation(size)
                clips[passes == which] = first + shuffled[places[passes == which]]
            drawn[sets == number] = np.stack([passes, clips], axis=1)
            first += size
        return drawn


def rest_of_epoch(batches_done: int, epoch_length: int) -> range:
    """Numbers of the batches from the next one of the run to the end of its epoch."""
    return range(batches_done, batches_done + epoch_length - batches_done % epoch_length)


def dealt_out(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers as near as possible to shares of a total, to which they add up (the largest remainders win)."""
    counts = {name: math.floor(share * total) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name] * total)
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class ValidationOrder(Sampler[list[int]]):
    """Batch sampler of a validation set: rank r takes samples r, r + world_size, ... exactly once, in order.

    Nothing is padded or repeated, so metrics summed over ranks are exact; ranks may have different numbers of batches,
    also none, and must only meet at the end of the epoch.
    """

    def __init__(self, samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        own = list(range(rank, samples, world_size))
        self.on_all_ranks = samples >= world_size
        self.batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        if not self.on_all_ranks:
            # Lightning leaves validation out on a rank whose loader has length 0, and the others wait for it for ever.
            # What has no length it begins.
            raise TypeError("a validation that some ranks have no part in has no length")
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Resumes:
    """Of a loader: having a state tells Lightning that it continues in the middle of an epoch.

    Lightning stores the state in checkpoints. It is only compared on loading, because the position itself comes from
    the trainer's counters.

    Attributes:
        batches_done: how many batches the trainer has finished since the run began.
    """

    batches_done: Callable[[], int]

    def state_dict(self) -> dict[str, int]:
        return {"batches_done": self.batches_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        done = self.batches_done()
        if state["batches_done"] != done:
            raise RuntimeError(
                f"the checkpoint was written after {state['batches_done']} training batches, but the trainer resumes "
                f"after {done}; the order of the data cannot be continued exactly"
            )


class ResumableLoader(Resumes, DataLoader[Any]):
    """A loader over a `TrainOrder`, which continues in the middle of an epoch."""

    batch_sampler: TrainOrder

    @property
    def batches_done(self) -> Callable[[], int]:  # type: ignore[override]  # the order's
        return self.batch_sampler.batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts when the first batch is asked for. Lightning makes the iterator earlier, before it restores
        # its counters, if a schedule asks for `estimated_stepping_batches`: loader workers would start at batch 0.
        yield from super().__iter__()
