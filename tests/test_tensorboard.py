"""What a user sees in TensorBoard after a short run, through the real entry point with clips that it makes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fit import QUICK, TINY_NET

from fasthmr.data.shards import ClipStore
from fasthmr.fit import fit

CONFIG = Path(__file__).parents[1] / "conf/encoder_tiny.yaml"
EPOCHS, STEPS = 3, 3
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 3 epochs of 3 steps, each followed by a validation; scalars of the training are logged every 2 steps."""
    folder = tmp_path_factory.mktemp("watched")
    throughput = folder / "throughput.yaml"
    throughput.write_text(
        "trainer: {callbacks+: {class_path: callbacks.throughput.Throughput, init_args: {every_n_steps: 3}}}"
    )
    sizes = {
        "data_dir": folder / "clips", "run_dir": folder / "run",
        "data.init_args.make_train.clips": 3, "data.init_args.make_train.frames": 8,
        "data.init_args.make_val.clips": 2, "data.init_args.make_val.frames": 8,
        "data.init_args.val_frames": 8, "data.init_args.batch_size": 1, "data.init_args.workers": 0,
        "trainer.max_epochs": EPOCHS, "trainer.log_every_n_steps": 2,
    }  # fmt: skip
    keys = [f"--{key}={value}" for key, value in sizes.items()]
    fit(["-c", str(CONFIG), "-c", str(throughput), *TINY_NET, *QUICK, *keys])
    return folder / "run"


@pytest.fixture(scope="module")
def events(run) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Values by step."""
    return {e.step: e.value for e in events.Scalars(tag)}


def test_the_clips_of_the_config_were_made(run):
    train, val = (ClipStore(run.parent / "clips" / name) for name in ("train", "val"))
    assert [frames for _, frames in train.lengths()] == [8, 8, 8] and len(val) == 2
    assert train.manifest.source["second_person_share"] == 0.1
    assert train.manifest.source["seed"] != val.manifest.source["seed"]


def test_loss_parts_gradient_norm_and_learning_rate(events):
    for part in ("total", "rotations", "root", "betas", "joints3d", "joints2d", "token_joints"):
        values = scalars(events, f"train/loss_{part}")
        assert len(values) == EPOCHS * STEPS // 2 and all(v >= 0 for v in values.values())
    assert all(v > 0 for v in scalars(events, "train/grad_norm").values())
    rates = list(scalars(events, "lr-AdamW/pg1").values())
    assert len(rates) > 2 and rates == sorted(rates) and rates[0] < rates[-1], "warm-up"


def test_metrics_of_every_validation(events, run):
    metrics = json.loads((run / "done.json").read_text())["metrics"]
    assert {"val/mpjpe_mm", "val/pa_mpjpe_mm", "val/pve_mm", "val/accel_m_s2"} <= set(metrics)
    for name in metrics:
        assert len(scalars(events, name)) == EPOCHS


def test_throughput_of_every_window_whatever_step_it_ends_at(events):
    """Windows of 3 batches end at steps 3, 6 and 9; only one of them is on the grid of every 2 steps."""
    clips, frames, wait = (
        scalars(events, f"throughput/{name}") for name in ("clips_per_s", "frames_per_s", "data_wait_share")
    )
    assert list(clips) == list(frames) == list(wait) == [3, 6, 9]
    assert frames == pytest.approx(clips), "a frame a clip"
    assert all(0 < share < 1 for share in wait.values())


def test_pictures_of_every_validation(events):
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("samples/")]
    assert tags == ["samples/0", "samples/1"], "the two validation clips"
    for tag in tags:
        shown = events.Images(tag)
        assert [image.step for image in shown] == [3, 6, 9]
        assert {(image.width, image.height) for image in shown} == {(5 * 256, 256)}
        assert len({image.encoded_image_string for image in shown}) == 3, "people change as the model does"


def test_the_resolved_config_as_text(events):
    (text,) = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "vit_dim: 32" in shown and "max_epochs: 3" in shown and "${" not in shown
