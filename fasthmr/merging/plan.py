"""LayerMergePlan: which layers of an encoder became one, in which order, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MergeEvent:
    """One merge: the layers `drop` go into the layer `keep`, which stays (FastHMR, Eq. 4). Original layer numbers."""

    keep: int
    drop: tuple[int, ...]


@dataclass(frozen=True)
class LayerMergePlan:
    """Merge events in order, keyed by ORIGINAL layer numbers: the only record of what merged.

    The order matters. Merging a merged layer again is not the same as merging all the originals at once (Eq. 4 is not
    associative), so plans compose by concatenation, and `group_sizes` only describes the structure that results.

    A worked number: of 6 layers, `plan.merged(2, 4)` puts layers 2, 3 and 4 into layer 2; the group sizes are
    (1, 1, 3, 1), the layers that remain 0, 1, 2 and 5.

    Args:
        depth: layers of the un-merged encoder.
        events: merges in order.

    Raises:
        ValueError: an event merges layers that are not neighbours, or no longer there; names it.
    """

    depth: int
    events: tuple[MergeEvent, ...] = ()

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"a plan needs at least 1 layer, got depth {self.depth}")
        layers = list(range(self.depth))
        for event in self.events:
            if not event.drop:
                raise ValueError(f"{event} drops no layer; leave it out")
            try:
                start = layers.index(event.keep)
            except ValueError:
                raise ValueError(f"{event}: layer {event.keep} is not among the layers left, {layers}") from None
            end = start + 1 + len(event.drop)
            if tuple(layers[start + 1 : end]) != event.drop:
                raise ValueError(f"{event} must drop the layers that follow {event.keep} among those left, {layers}")
            del layers[start + 1 : end]

    @property
    def layers(self) -> tuple[int, ...]:
        """Original numbers of the layers that remain, front to back."""
        gone = {layer for event in self.events for layer in event.drop}
        return tuple(layer for layer in range(self.depth) if layer not in gone)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many original layers each remaining one stands for, front to back; they sum to `depth`."""
        edges = (*self.layers, self.depth)
        return tuple(edges[i + 1] - edges[i] for i in range(len(edges) - 1))

    def merged(self, first: int, last: int) -> LayerMergePlan:
        """This plan, then one more event: the remaining layers from `first` to `last` become one, at `first`.

        Raises:
            ValueError: `first` or `last` is not a layer that remains, or they are not at least two.
        """
        left = self.layers
        if first not in left or last not in left or last <= first:
            raise ValueError(f"cannot merge layers {first} to {last}: need two or more of the layers left, {left}")
        drop = left[left.index(first) + 1 : left.index(last) + 1]
        return LayerMergePlan(self.depth, (*self.events, MergeEvent(first, drop)))

    def then(self, plan: LayerMergePlan) -> LayerMergePlan:
        """This plan, then another one that was made for what remains (its layer i is our i-th remaining one).

        Raises:
            ValueError: the other plan is for another number of layers.
        """
        left = self.layers
        if plan.depth != len(left):
            raise ValueError(f"the second plan is for {plan.depth} layers, but the first leaves {len(left)}")
        translated = (MergeEvent(left[e.keep], tuple(left[i] for i in e.drop)) for e in plan.events)
        return LayerMergePlan(self.depth, (*self.events, *translated))

    def after(self, done: LayerMergePlan) -> tuple[MergeEvent, ...]:
        """The events still to come where `done` was applied already.

        Raises:
            ValueError: `done` is no beginning of this plan.
        """
        if done.depth != self.depth or done.events != self.events[: len(done.events)]:
            raise ValueError(f"cannot go on from {done} to {self}: the first is no beginning of the second")
        return self.events[len(done.events) :]

    # ---- plain data -----------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back."""
        return {"depth": self.depth, "events": [{"keep": e.keep, "drop": list(e.drop)} for e in self.events]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerMergePlan:
        """Plan of plain data. Raises ValueError saying what is wrong with it."""
        if not isinstance(values, Mapping) or set(values) != {"depth", "events"}:
            raise ValueError(f"a merge plan has the keys depth and events, got {values!r}")
        depth, events = values["depth"], values["events"]
        if type(depth) is not int or not isinstance(events, Sequence) or isinstance(events, str):
            raise ValueError(f"a merge plan's depth is a whole number and its events a list, got {values!r}")
        return cls(depth, tuple(_event(event) for event in events))

    def as_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.as_dict())

    @classmethod
    def from_json(cls, text: str) -> LayerMergePlan:
        """Plan of JSON text. Raises ValueError as `from_dict` does."""
        return cls.from_dict(json.loads(text))

    # ---- for people -----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """The layers in groups: "0 1 2+3+4 5"."""
        edges = (*self.layers, self.depth)
        return " ".join("+".join(map(str, range(edges[i], edges[i + 1]))) for i in range(len(edges) - 1))

    def picture(self) -> str:
        """Two lines of text: original layers on top, what became of them below.

        0  1  2  3  4  5
        |  |  [=====]  |
        """
        width = len(str(self.depth - 1)) + 2
        numbers = "".join(f"{layer:<{width}}" for layer in range(self.depth)).rstrip()
        below = "".join(
            f"{'|':<{width}}" if size == 1 else f"{'[' + '=' * (width * (size - 1) - 1) + ']':<{width * size}}"
            for size in self.group_sizes
        )
        return f"{numbers}\n{below.rstrip()}"


def _event(values: Any) -> MergeEvent:
    if not isinstance(values, Mapping) or set(values) != {"keep", "drop"}:
        raise ValueError(f"a merge event has the keys keep and drop, got {values!r}")
    keep, drop = values["keep"], values["drop"]
    if type(keep) is not int or not isinstance(drop, Sequence) or any(type(layer) is not int for layer in drop):
        raise ValueError(f"a merge event's layers are whole numbers, got {values!r}")
    return MergeEvent(keep, tuple(drop))
