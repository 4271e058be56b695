"""The order of training clips and the split of validation clips, without a trainer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from datamodules.order import SampleId, TrainOrder, ValidationOrder
from datamodules.samples import middle_window, stratified_frames


def order(done: int = 0, rank: int = 0, world_size: int = 1, **changes: int) -> TrainOrder:
    arguments = {"samples": 23, "batch_size": 3, "seed": 1, **changes}
    return TrainOrder(batches_done=lambda: done, rank=rank, world_size=world_size, **arguments)


def run(batches: int, rank: int = 0, world_size: int = 1, **changes: int) -> list[list[SampleId]]:
    """What an uninterrupted run of that many batches is shown."""
    shown: list[list[SampleId]] = []
    while len(shown) < batches:
        shown += order(len(shown), rank, world_size, **changes)
    return shown[:batches]


def test_a_pass_shows_clips_once_and_every_pass_in_another_order() -> None:
    shown = run(14)
    first, second = (list(itertools.chain(*half)) for half in (shown[:7], shown[7:]))
    assert {s.epoch for s in first} == {0} and {s.epoch for s in second} == {1}
    assert len({s.clip for s in first}) == 21  # 23 clips in batches of 3: two wait for another pass
    assert [s.clip for s in first] != [s.clip for s in second]


@pytest.mark.parametrize("epoch_length", [None, 4])
def test_the_order_continues_from_any_batch(epoch_length: int | None) -> None:
    whole = run(30, epoch_length=epoch_length)
    for done in range(20):
        rest = list(order(done, epoch_length=epoch_length))
        assert rest == whole[done : done + len(rest)]
        assert (done + len(rest)) % (epoch_length or 7) == 0, "an iteration ends with the epoch"


def test_shortened_epochs_still_show_every_clip() -> None:
    assert run(14, epoch_length=4) == run(14)


def test_ranks_share_each_step_without_overlap_and_take_equally_many() -> None:
    ranks = [run(6, rank, 3) for rank in range(3)]
    for step in zip(*ranks, strict=True):
        assert len({s.clip for batch in step for s in batch}) == 9
    assert {len(order(0, rank, 3)) for rank in range(3)} == {2}


def test_another_seed_is_another_order() -> None:
    assert run(7) != run(7, seed=2)


def test_fewer_clips_than_one_step_needs_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 clips on each of 8 rank.* only 23: lower batch_size"):
        order(world_size=8)


@pytest.mark.parametrize(("samples", "world_size"), [(7, 1), (7, 2), (7, 3), (2, 4), (0, 2)])
def test_validation_clips_are_dealt_out_exactly_once(samples: int, world_size: int) -> None:
    dealt = [list(itertools.chain(*ValidationOrder(samples, 2, rank, world_size))) for rank in range(world_size)]
    assert sorted(itertools.chain(*dealt)) == list(range(samples))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize(("length", "frames"), [(81, 8), (8, 8), (9, 8), (100, 1)])
def test_training_frames_come_one_from_each_part(length: int, frames: int) -> None:
    rng = np.random.default_rng(0)
    draws = np.stack([stratified_frames(length, frames, rng) for _ in range(2000)])
    assert (draws.max(0)[:-1] < draws.min(0)[1:]).all(), "parts do not overlap"
    assert set(np.unique(draws)) == set(range(length)), "every frame has its turn"


def test_validation_takes_the_middle() -> None:
    assert middle_window(10, 4).tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="4 frames from a clip of 3"):
        middle_window(3, 4)
