"""Mixture: several sets of clips to train on as one, each with its share of the samples."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path

from fasthmr.body import BodyMismatchError
from fasthmr.data.masks import clips_id
from fasthmr.data.schema import Clip
from fasthmr.data.shards import ClipStore


class Mixture:
    """The clips of one or more sets as one sequence: those of the first set, then those of the second, and so on.

    Args:
        stores: the sets by name.
        shares: of each set in the samples; they add up to 1.

    Raises:
        ValueError: a set without clips, or one that is there twice; names it.
        BodyMismatchError: labels of two bodies; names the sets.
    """

    def __init__(self, stores: Mapping[str, ClipStore], shares: Mapping[str, float]) -> None:
        self.stores, self.shares = dict(stores), dict(shares)
        self.sizes = {name: len(store) for name, store in self.stores.items()}
        self._ends = list(itertools.accumulate(self.sizes.values()))
        if len(stores) > 1:
            for name, store in self.stores.items():
                if len(store) == 0:
                    raise ValueError(f"set {name!r} in {store.folder} has no clips: leave it out of train and weights")
            for pair in itertools.combinations(self.stores.items(), 2):
                _require_compatible(*pair)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Clip:
        name, number = self.place(index)
        return self.stores[name][number]

    def shard_of(self, index: int) -> Path:
        """The shard that holds clip `index`."""
        name, number = self.place(index)
        return self.stores[name].shard_of(number)

    def place(self, index: int) -> tuple[str, int]:
        """The set that holds clip `index`, and the clip's number in it."""
        number = bisect_right(self._ends, index)
        name = list(self.stores)[number]
        return name, index - self._ends[number] + self.sizes[name]

    def lengths(self) -> Iterator[tuple[str, int]]:
        """(key, frames) of every clip, from the indices."""
        return itertools.chain.from_iterable(store.lengths() for store in self.stores.values())

    def describe(self, samples: Mapping[str, int]) -> str:
        """A table of the sets, of which an epoch has so many `samples`."""
        rows = [("set", "clips", "frames", "share", "samples an epoch", "passes an epoch")]
        for name, store in self.stores.items():
            share, passes = f"{self.shares[name]:.1%}", f"{samples[name] / len(store):.2f}"
            rows.append((name, f"{len(store):,}", f"{store.manifest.frames:,}", share, f"{samples[name]:,}", passes))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )


def shares_of(names: Mapping[str, object], weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of sets as shares that add up to 1, by name: the order of a config's keys means nothing.

    Raises:
        ValueError: no set, a set without a weight, a weight without a set, or one that is not positive.
    """
    if not names or set(names) != set(weights):
        raise ValueError(
            f"train and weights must name the same sets, one or more, got {sorted(names)} and {sorted(weights)}"
        )
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weights.{name} must be positive, got {weight}: leave a set out that is not to be used")
    whole = math.fsum(weights.values())  # the same in any order
    return {name: weights[name] / whole for name in sorted(names)}


def _require_compatible(one: tuple[str, ClipStore], other: tuple[str, ClipStore]) -> None:
    (name, store), (other_name, other_store) = one, other
    body, other_body = store.manifest.body, other_store.manifest.body
    if (body or "").partition("@")[2] != (other_body or "").partition("@")[2]:
        raise BodyMismatchError(
            f"sets {name!r} and {other_name!r} are labelled with different bodies, {body!r} ({store.folder}) and "
            f"{other_body!r} ({other_store.folder}): convert both with the same --body"
        )
    if clips_id(store.manifest) == clips_id(other_store.manifest):
        raise ValueError(
            f"sets {name!r} and {other_name!r} are the same clips ({store.folder}, {other_store.folder}): "
            "leave one of them out, and give the other both weights"
        )
