"""Streams of training clips: what a resumed one shows, few and uneven shards, damaged clips."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from shard_sources import damage
from test_fit import QUICK, TINY, TINY_NET, every_step, tiny_data, with_callback
from tiny_training import make_set

from datamodules.samples import TrainSampling
from datamodules.stream import StreamLoader
from fasthmr.data.batch import ClipBatch
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ClipStore
from fasthmr.data.transforms import Augmentation
from fasthmr.fit import main

TARS = [f"shard-{i:06d}.tar" for i in range(7)]  # of two clips each, the last one of one
KEYS = [f"clip{i:03d}" for i in range(13)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("made") / "set", 13, clips_per_shard=2)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The set, to damage."""
    return Path(shutil.copytree(made, tmp_path / "set"))


def stream(folder: Path, batches: int = 4, done: int = 0, **settings: object) -> StreamLoader:
    """The batches of an epoch from batch `done` of the run on."""
    given = {"sampling": TrainSampling(2, Augmentation()), "batch_size": 2, "window": 3, "seed": 1, **settings}
    return StreamLoader(ClipStore(folder), batches=batches, batches_done=lambda: done, **given)


def keys(batches: list[ClipBatch] | StreamLoader) -> list[str]:
    return [key for batch in batches for key in batch.keys]


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_from_any_batch_on_it_shows_what_it_would_have_shown(
    folder: Path, resample: bool, workers: int, rank: int, world_size: int
) -> None:
    for tar, numbers in ((TARS[1], [0, 1]), (TARS[4], [1]), (TARS[6], [0])):
        damage(folder, tar, *numbers)
    settings = {"resample": resample, "workers": workers, "rank": rank, "world_size": world_size, "max_damaged": 99}
    whole = [*stream(folder, 6, **settings), *stream(folder, 6, done=6, **settings)]
    assert set(keys(whole)) <= set(KEYS) - {"clip002", "clip003", "clip009", "clip012"}
    for done in (6, 7):  # at the end of an epoch, and in the midst of one, where another worker is first
        for ours, theirs in zip(stream(folder, 6, done, **settings), whole[done:], strict=True):
            assert ours.keys == theirs.keys and ours.images.equal(theirs.images)
            assert ours.frame_index.equal(theirs.frame_index) and ours.joints2d.equal(theirs.joints2d)


def test_how_epochs_are_cut_changes_no_batch(made: Path) -> None:
    whole = keys(stream(made, 12))
    assert keys([*stream(made, 5), *stream(made, 5, done=5), *stream(made, 5, done=10)])[:24] == whole
    assert keys([*stream(made, 12, epoch_length=7), *stream(made, 12, done=7)]) == whole


def test_no_worker_is_one_worker_and_two_are_others(made: Path) -> None:
    alone, one, two = (keys(stream(made, workers=workers)) for workers in range(3))
    assert alone == one != two


@pytest.mark.parametrize("resample", [True, False])
def test_what_was_shown_is_not_read_again(made: Path, resample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Counter[str]()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *place: reads.update(["read"]) or pread(*place))
    next(iter(stream(made, 20_000, done=10_001, resample=resample)))
    a_clip = 4  # members
    assert 0 < reads["read"] <= (2 * 3 + 2) * a_clip, "two windows at most, and what is to be shown"


def run_fit(arguments: list[str]) -> None:
    sys.argv = ["fit", *arguments]
    sys.exit(main())


def test_a_killed_run_goes_on_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    """kill -9 in the midst of the third of four epochs of three steps."""
    tiny = ["-c", TINY, *TINY_NET, *QUICK, *tiny_data(tiny_shards), "-c", every_step(tmp_path)]
    tiny += ["--data.init_args.streaming=true", "--data.init_args.workers=2", "--trainer.max_epochs=4"]

    def weights(folder: Path, *more: str, code: int = 0) -> dict[str, torch.Tensor]:
        """Of the last checkpoint that a training in a process of its own leaves."""
        arguments = [*tiny, "--trainer.limit_val_batches=1", f"--run_dir={folder}", *more]
        process = multiprocessing.get_context("fork").Process(target=run_fit, args=(arguments,))
        process.start()
        process.join()
        assert process.exitcode == code
        return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    kill = with_callback(tmp_path, "helpers.kill.KillAtStep", step=8)
    weights(tmp_path / "broken", "-c", kill, code=-signal.SIGKILL)
    resumed = weights(tmp_path / "broken", "--ckpt_path=last")
    assert all(value.equal(resumed[name]) for name, value in weights(tmp_path / "unbroken").items())


# ---- few and uneven shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_dealt_out_shards_go_to_one_stream_each(made: Path, shares: int) -> None:
    streams = stream(made, workers=shares, resample=False).streams
    dealt = [list(itertools.islice(streams._dealt(share), 42 // shares)) for share in range(shares)]
    order = list(itertools.chain(*zip(*dealt, strict=True)))
    passes = [order[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(of_one) == list(range(7)) for of_one in passes)
    assert len(set(map(tuple, passes))) > 3, "each in another order"


@pytest.mark.parametrize("batches", [13, 5])
def test_a_dealt_out_pass_shows_every_clip_once_however_long_an_epoch_is(made: Path, batches: int) -> None:
    shown: list[str] = []
    while len(shown) < 13:
        shown += keys(stream(made, batches, len(shown), batch_size=1, window=1, resample=False))
    assert sorted(shown[:13]) == KEYS


def test_clips_are_shuffled_in_windows(made: Path) -> None:
    (one_after_the_other, shuffled) = (
        keys(stream(made, 12, batch_size=1, window=window, resample=False)) for window in (1, 4)
    )
    assert [key for shard in range(0, 12, 4) for key in sorted(shuffled[shard : shard + 4])] == [
        key for shard in range(0, 12, 4) for key in sorted(one_after_the_other[shard : shard + 4])
    ]
    assert shuffled != one_after_the_other


def test_fewer_shards_than_workers_are_refused_or_drawn(made: Path) -> None:
    with pytest.raises(ValueError, match=r"7 shards cannot be dealt out to 8 loader processes \(2 ranks\): .*resample"):
        stream(made, world_size=2, workers=4, resample=False)
    assert len(list(stream(made, rank=9, world_size=10))) == 4


@pytest.mark.parametrize("resample", [True, False])
def test_ranks_have_equally_many_batches_of_uneven_shards(made: Path, resample: bool) -> None:
    ranks = [list(stream(made, rank=rank, world_size=3, resample=resample)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [4, 4, 4]
    assert len({tuple(keys(batches)) for batches in ranks}) == 3


# ---- damaged clips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_clips_are_named_counted_and_skipped(
    folder: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = keys(stream(folder, 16, workers=workers))
    damage(folder, TARS[3], 1)
    with caplog.at_level("WARNING"):
        after = keys(stream(folder, 16, workers=workers, max_damaged=50))
    assert after == ["clip006" if key == "clip007" else key for key in before], "the other one of its shard is shown"
    assert len(caplog.messages) == before.count("clip007") > 0
    told = f"rank 0 skips a damaged clip, 1 of 50: {folder / TARS[3]}: clip clip007: its labels are damaged"
    assert told in caplog.messages[0]


def test_a_clip_of_a_batch_of_one_is_replaced_too(folder: Path) -> None:
    damage(folder, TARS[6], 0)  # the set's last clip
    shown = keys(stream(folder, 30, batch_size=1, window=1, max_damaged=30))
    assert "clip012" not in shown and len(shown) == 30


def test_a_clip_whose_shard_is_all_damaged_is_replaced_from_the_next_and_all_are_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = keys(stream(folder, 16))
    damage(folder, TARS[3], 0, 1)
    with caplog.at_level("WARNING"):
        after = keys(stream(folder, 16, max_damaged=50))
    assert after == ["clip008" if key in ("clip006", "clip007") else key for key in before]
    assert len(caplog.messages) == 2 * (before.count("clip006") + before.count("clip007")) > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [0, 3])
def test_where_all_is_damaged_it_ends(folder: Path, workers: int, limit: int) -> None:
    for tar in TARS:
        damage(folder, tar, *([0] if tar == TARS[6] else [0, 1]))
    with pytest.raises(ClipError, match=rf"shard-00000\d.tar: clip clip0\d\d: .*\({limit + 1} damaged .* is {limit}\)"):
        list(stream(folder, workers=workers, max_damaged=limit))


def test_workers_together_may_not_skip_more_than_the_rank(folder: Path) -> None:
    for tar in TARS[:3]:
        damage(folder, tar, 0, 1)
    with pytest.raises(ClipError, match=r"\(21 damaged in this epoch, max_damaged is 20\)"):
        list(stream(folder, batches=40, workers=2, max_damaged=20))
