"""ClipDataModule in a real trainer: what a resumed run is shown, what each rank is shown, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_training import Seen, fit, make_set

from datamodules.clips import ClipDataModule
from fasthmr.body import BodyMismatchError
from fasthmr.conventions import MASK_SUBJECT
from fasthmr.data.batch import ClipBatch, flatten_frames
from fasthmr.data.index import MANIFEST
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ShardError
from fasthmr.data.synth.source import SynthConfig

SCRIPT = Path(__file__).with_name("tiny_training.py")
EPOCHS, STEPS = 3, 5  # 11 clips in batches of 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clips")
    make_set(directory / "train", 11)
    make_set(directory / "val", 5)
    return directory


@pytest.fixture(scope="module")
def uninterrupted(data: Path) -> list[tuple[int, str, str]]:
    module = Seen()
    fit(data, module, max_epochs=EPOCHS)
    assert [number for number, _, _ in module.trained] == list(range(EPOCHS * STEPS))
    return module.trained


def loader_of(data: Path, **settings: object) -> ClipDataModule:
    module = ClipDataModule(
        data / "train", data / "val", **{"workers": 0, "frames_per_clip": 2, "val_frames": 3, **settings}
    )
    module.setup()
    return module


# ---- exact resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 2},
        {"limit_train_batches": 3},
        {"max_steps": 13, "max_epochs": -1},
        {"streaming": True, "val_check_interval": 2},
        {"streaming": True, "limit_train_batches": 3},
        {"streaming": True, "limit_train_batches": 0.6, "clips_per_epoch": 14},
    ],
    ids=lambda s: " ".join(s) or "plain",
)
def test_resuming_from_any_checkpoint_shows_what_an_uninterrupted_run_shows(
    data: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    settings = {"max_epochs": EPOCHS, **settings}
    whole = Seen()
    fit(data, whole, checkpoints=tmp_path, **settings)
    checkpoints = sorted(tmp_path.glob("*-*.ckpt"))
    assert {p.name.split("-")[0] for p in checkpoints} == {"step", "epoch", "val"}
    for path in checkpoints:
        resumed = Seen()
        fit(data, resumed, ckpt_path=path, **settings)
        done = len(whole.trained) - len(resumed.trained)
        assert resumed.trained == whole.trained[done:], path.name
        counters = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert done == counters["total"]["processed"], path.name


def test_resuming_with_loader_processes(data: Path, tmp_path: Path, uninterrupted: list[tuple[int, str, str]]) -> None:
    whole = Seen()
    fit(data, whole, checkpoints=tmp_path, workers=2, max_epochs=EPOCHS)
    assert whole.trained == uninterrupted, "processes change nothing"
    for step in (2, 5, 11):  # in an epoch, at its end, in another one
        resumed = Seen()
        fit(data, resumed, ckpt_path=tmp_path / f"step-step={step}.ckpt", workers=2, max_epochs=EPOCHS)
        assert resumed.trained == uninterrupted[step:]


def test_a_run_that_was_stopped_at_max_steps_goes_on(
    data: Path, tmp_path: Path, uninterrupted: list[tuple[int, str, str]]
) -> None:
    first, second, third = Seen(), Seen(), Seen()
    fit(data, first, checkpoints=tmp_path, max_steps=3, max_epochs=-1)
    fit(data, second, checkpoints=tmp_path, max_steps=8, max_epochs=-1, ckpt_path=tmp_path / "last.ckpt")
    fit(data, third, max_epochs=EPOCHS, ckpt_path=tmp_path / "last.ckpt")
    assert first.trained + second.trained + third.trained == uninterrupted


class StopAfter(L.Callback):
    """Ask the trainer to stop after some step, as a callback does that handles preemption."""

    def __init__(self, step: int, save: Path) -> None:
        self.step, self.save = step, save

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.save)
            trainer.should_stop = True


def test_a_preempted_run_goes_on(data: Path, tmp_path: Path, uninterrupted: list[tuple[int, str, str]]) -> None:
    first, resumed, resumed_later = Seen(), Seen(), Seen()
    fit(data, first, tmp_path, callbacks=[StopAfter(7, tmp_path / "preempted.ckpt")], max_epochs=EPOCHS)
    fit(data, resumed, ckpt_path=tmp_path / "preempted.ckpt", max_epochs=EPOCHS)
    assert first.trained + resumed.trained == uninterrupted
    # Lightning counts the interrupted epoch as over when it stops: its last checkpoint shows an epoch less, in order
    fit(data, resumed_later, ckpt_path=tmp_path / "last.ckpt", max_epochs=EPOCHS)
    assert resumed_later.trained == uninterrupted[7 : 7 + len(resumed_later.trained)]


def test_a_killed_run_goes_on(data: Path, tmp_path: Path, uninterrupted: list[tuple[int, str, str]]) -> None:
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(data / name)
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--workers=2", f"--max_epochs={EPOCHS}"]
    log = tmp_path / "run" / "trained_0.txt"
    victim = subprocess.Popen([*command, "--delay=0.1"], env=environment())
    try:
        deadline = time.monotonic() + 180
        while not log.exists() or len(log.read_text().splitlines()) < 8:
            assert victim.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    before = read_log(log)
    log.unlink()
    subprocess.run([*command, "--resume"], env=environment(), check=True, timeout=180)
    after = read_log(log)
    # checkpoints were written every third step and at the end of epochs; work since the last one is repeated
    assert before == uninterrupted[: len(before)]
    assert 5 <= after[0][0] <= len(before)
    assert after == uninterrupted[after[0][0] :]


def read_log(path: Path) -> list[tuple[int, str, str]]:
    rows = [line.split(" ") for line in path.read_text().splitlines()]
    return [(int(number), " ".join(keys), digest) for number, *keys, digest in rows]


def environment() -> dict[str, str]:
    paths = [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_torchs_global_generator_is_left_alone(data: Path) -> None:
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    module = loader_of(data, batch_size=2)
    next(iter(module.train_dataloader()))
    next(iter(module.val_dataloader()))
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_resuming_with_other_settings_is_refused(data: Path, tmp_path: Path) -> None:
    fit(data, Seen(), checkpoints=tmp_path, max_steps=2)
    module = ClipDataModule(
        data / "train", data / "val", batch_size=3, frames_per_clip=2, val_frames=3, workers=0, seed=11
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=5)
    with pytest.raises(ValueError, match=r"cannot be continued \(batch_size: 2 -> 3\)"):
        trainer.fit(Seen(), datamodule=module, ckpt_path=tmp_path / "last.ckpt")


def test_overfit_batches_repeats_the_same_batches(data: Path) -> None:
    module = Seen()
    fit(data, module, overfit_batches=2, max_epochs=3)
    assert [digest for _, _, digest in module.trained] == [digest for _, _, digest in module.trained[:2]] * 3


# ---- made on first use --------------------------------------------------------------------------------------------


def test_missing_shards_are_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = SynthConfig(clips=2, frames=4)
    settings = {"make_train": config, "make_val": replace(config, clips=1, seed=1)}
    module = ClipDataModule(
        tmp_path / "train", tmp_path / "val", batch_size=2, frames_per_clip=4, val_frames=4, workers=0, **settings
    )
    with caplog.at_level("INFO"):
        module.prepare_data()
    assert f"training set: 2 clips in {tmp_path / 'train'}" in caplog.text
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.tar")}
    assert len(made) == 2
    module.prepare_data()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.tar")} == made
    module.setup()
    batch = next(iter(module.train_dataloader()))
    # the labels of a real source survive a flip: 3D joints project onto 2D joints
    in_image = torch.einsum("bij,btkj->btki", batch.intrinsics, batch.joints3d[..., :3])
    in_image = in_image[..., :2] / in_image[..., 2:]
    in_crop = (in_image - batch.box_center[:, :, None]) / batch.box_size[:, :, None, None]
    torch.testing.assert_close(in_crop, batch.joints2d[..., :2], atol=1e-3, rtol=0)
    assert (flatten_frames(batch.masks) == MASK_SUBJECT).any((1, 2)).any()


def test_motion_that_is_missing_is_found_before_any_clip_is_made(tmp_path: Path) -> None:
    config = SynthConfig(clips=1, frames=4)
    wrong = replace(config, motion=str(tmp_path / "nowhere"))
    module = ClipDataModule(tmp_path / "train", tmp_path / "val", make_train=config, make_val=wrong, workers=0)
    with pytest.raises((OSError, ValueError), match="nowhere"):
        module.prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_clips_is_named_with_the_key_that_chooses_it(data: Path) -> None:
    config = SynthConfig(clips=1, frames=4)
    module = ClipDataModule(data / "train", data / "val", make_val=config, workers=0)
    with pytest.raises(ShardError, match=r"another job .*\(--data_dir, or data\.init_args\.val, says which\)"):
        module.prepare_data()


# ---- several ranks ------------------------------------------------------------------------------------------------


def test_two_ranks_share_the_clips(data: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(data / name)
    make_set(tmp_path / "val_small", 1)  # the second rank gets none
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--devices=2", "--max_epochs=2"]
    subprocess.run(command, env=environment(), check=True, timeout=300)
    shown = [read_log(tmp_path / "run" / f"trained_{rank}.txt") for rank in range(2)]
    assert [len(s) for s in shown] == [4, 4], "11 clips make 2 steps of 2 ranks x 2 clips in each of 2 epochs"
    for a, b in zip(*shown, strict=True):
        assert a[0] == b[0] and not set(a[1].split()) & set(b[1].split())
    validated = [(tmp_path / "run" / f"validated_{rank}.txt").read_text().split() for rank in range(2)]
    # twice the five clips while fitting, then the single one
    assert validated[0] == ["clip000", "clip002", "clip004"] * 2 + ["clip000"]
    assert validated[1] == ["clip001", "clip003"] * 2


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"seed": 2}, "seed: 0 -> 2"),
        ({"workers": 3}, "workers: 2 -> 3"),
        ({"shuffle_buffer": 5}, "shuffle_buffer: 64 -> 5"),
        ({"resample": False, "workers": 0}, "workers: 2 -> 1; resample: True -> False"),
        ({"streaming": False}, "streaming: True -> False; workers: 2 -> None; .*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_stream_goes_on_only_as_it_began(data: Path, settings: dict[str, object], changed: str) -> None:
    as_it_began = {"streaming": True, "workers": 2}
    again = loader_of(data, **{**as_it_began, **settings})
    again.load_state_dict(loader_of(data, **as_it_began).state_dict())
    with pytest.raises(ValueError, match=rf"cannot be continued \({changed}\)"):
        again.train_dataloader()


@pytest.mark.parametrize("setting", [{"max_damaged": 3}, {"resample": False}])
def test_settings_of_streams_are_refused_at_random(data: Path, setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="max_damaged and resample are for streaming: true"):
        loader_of(data, **setting)


# ---- validation ---------------------------------------------------------------------------------------------------


def test_validation_shows_every_clip_once_and_always_the_same(data: Path) -> None:
    def batches() -> list[ClipBatch]:
        return list(loader_of(data, val_batch_size=2).val_dataloader())

    first, second = batches(), batches()
    assert [key for b in first for key in b.keys] == [f"clip{i:03d}" for i in range(5)]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    assert first[0].frame_index.tolist() == [[0, 1, 2], [0, 1, 2]]


# ---- streaming ----------------------------------------------------------------------------------------------------


def stream(data: Path, workers: int = 0, seed: int = 0) -> list[tuple[list[str], torch.Tensor]]:
    module = loader_of(
        data, batch_size=2, workers=workers, seed=seed, streaming=True, clips_per_epoch=14, shuffle_buffer=3
    )
    loader = module.train_dataloader()
    assert len(loader) == 7
    return [(b.keys, b.images) for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_reproducible_and_as_long_as_promised(data: Path, workers: int) -> None:
    first, second = stream(data, workers), stream(data, workers)
    assert len(first) == 7
    for (keys_a, images_a), (keys_b, images_b) in zip(first, second, strict=True):
        assert keys_a == keys_b and torch.equal(images_a, images_b)
    assert [k for k, _ in stream(data, workers, seed=1)] != [k for k, _ in first]
    assert len({key for keys, _ in first for key in keys}) > 3, "of several shards, which have three each"


def test_streaming_through_the_trainer_gives_every_epoch_other_clips(data: Path) -> None:
    runs = [Seen(), Seen()]
    for module in runs:
        fit(data, module, streaming=True, clips_per_epoch=8, max_epochs=2)
    assert runs[0].trained == runs[1].trained
    assert len(runs[0].trained) == 8
    assert [row[1:] for row in runs[0].trained[:4]] != [row[1:] for row in runs[0].trained[4:]]
    assert sorted(runs[0].validated) == sorted([f"clip{i:03d}" for i in range(5)] * 2)


def test_a_damaged_shard_stops_the_stream(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    loader = loader_of(tmp_path / "data", batch_size=2, streaming=True).train_dataloader()
    for shard in (tmp_path / "data" / "train").glob("*.tar"):
        with shard.open("r+b") as file:
            file.truncate(2000)
    with pytest.raises(ClipError, match=r"shard-00000\d.tar: clip clip\d+: .*max_damaged is 0"):
        list(loader)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames_per_clip": 5}, "clip clip000 in .*train has 4 frames, fewer than frames_per_clip=5"),
        ({"val_frames": 9}, "clip clip000 in .*val has 4 frames, fewer than val_frames=9"),
    ],
)
def test_a_clip_shorter_than_the_window_is_an_error_at_the_start(data: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(data, **settings)


def test_labels_of_another_body_are_refused(data: Path, tmp_path: Path) -> None:
    make_set(tmp_path / "train", 1, body="somebody@123")
    (tmp_path / "val").symlink_to(data / "val")
    with pytest.raises(BodyMismatchError, match="somebody@123"):
        loader_of(tmp_path)


def test_a_validation_set_without_clips_is_refused(data: Path, tmp_path: Path) -> None:
    """Our writer makes no such set, but a script that split one could."""
    (tmp_path / "train").symlink_to(data / "train")
    (tmp_path / "val").mkdir()
    content = json.loads((data / "val" / MANIFEST).read_text()) | {"clips": 0, "frames": 0, "shards": {}}
    (tmp_path / "val" / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no validation clips in .*val: make some \(make_val\.clips\)"):
        loader_of(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"val_frames": 2}, {"workers": -1}, {"seed": -1}, {"clips_per_epoch": 100}],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ClipDataModule("train", "val", **settings)
