"""Which clips make up which batch: the training order, the validation split, and a loader that resumes.

Training batches are numbered 0, 1, 2, ... over the whole run. What is in batch n on rank r is a pure function of
(seed, n, r): the data set is shuffled afresh for every pass over it and cut into global batches, of which each rank
takes its slice; what does not fill a global batch is left for another pass. All ranks therefore do equally many steps.

The only state is how many batches the trainer has finished. It is read from the trainer (whose counters are in every
checkpoint) whenever an iterator is made, never counted here: loader workers run ahead of training, so a sampler's own
count would skip what was fetched but not yet trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
                f"but the training set has only {samples}: lower batch_size or make more clips"
            )
        self.epoch_length = epoch_length or self.batches_per_pass
        self._pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.batches_per_pass

    def __iter__(self) -> Iterator[list[SampleId]]:
        start = self.batches_done()
        for number in range(start, start + self.epoch_length - start % self.epoch_length):
            yield self.batch(number)

    def batch(self, number: int) -> list[SampleId]:
        """The samples of this rank's batch `number`, counted from the beginning of the run."""
        epoch, step = divmod(number, self.batches_per_pass)
        start = (step * self.world_size + self.rank) * self.batch_size
        return [SampleId(epoch, int(i)) for i in self._shuffled(epoch)[start : start + self.batch_size]]

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._pass is None or self._pass[0] != epoch:
            self._pass = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.samples))
        return self._pass[1]


class ValidationOrder(Sampler[list[int]]):
    """Batch sampler of a validation set: rank r takes samples r, r + world_size, ... exactly once, in order.

    Nothing is padded or repeated, so metrics summed over ranks are exact; ranks may have different numbers of batches,
    also none, and must only meet at the end of the epoch.
    """

    def __init__(self, samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        own = list(range(rank, samples, world_size))
        self.batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class ResumableLoader(DataLoader[Any]):
    """A loader over a `TrainOrder`; having a state tells Lightning that it continues in the middle of an epoch.

    Lightning stores the state in checkpoints. It is only compared on loading, because the position itself comes from
    the trainer's counters.
    """

    batch_sampler: TrainOrder

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts when the first batch is asked for. Lightning makes the iterator earlier, before it restores
        # its counters, if a schedule asks for `estimated_stepping_batches`: loader workers would start at batch 0.
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        return {"batches_done": self.batch_sampler.batches_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        done = self.batch_sampler.batches_done()
        if state["batches_done"] != done:
            raise RuntimeError(
                f"the checkpoint was written after {state['batches_done']} training batches, but the trainer resumes "
                f"after {done}; the order of the data cannot be continued exactly"
            )
