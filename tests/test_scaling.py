"""Scaling: the arithmetic against numbers worked out by hand, and a measurement of a few seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fasthmr import benchmark
from fasthmr.speed.needs import Assumptions, needs, ring_bytes
from fasthmr.speed.scaling import Measured, job_of, measure_reading

ROOT = Path(__file__).parents[1]
TINY = ROOT / "conf/encoder_tiny.yaml"
#: ViT-H in single precision; frames of 20 kB, of which 16 are read for each that is trained on
GIVEN = Assumptions(
    gpu_frames_per_s=320, step_frames=64, gradient_bytes=2.68e9, link_bytes_per_s=25e9, read_bytes_per_frame=320e3,
    loader_frames_per_s=100, clip_frames=4, gpus_per_node=8, open_s=0.01, dataset_bytes=1e12,
)  # fmt: skip


def test_a_ring_moves_nearly_twice_the_gradients():
    assert ring_bytes(1, 100.0) == 0
    assert ring_bytes(2, 100.0) == 100.0
    assert ring_bytes(8, 1e9) == pytest.approx(1.75e9)


def test_what_many_gpus_need():
    lone, many = needs(1, GIVEN), needs(64, GIVEN)
    assert lone.communication == 0
    assert lone.read_bytes_per_s == pytest.approx(320 * 320e3)  # 102 MB/s
    # A step of 0.2 s, and 2 * 63/64 * 2.68 GB at 25 GB/s: 0.211 s.
    assert many.step_s == pytest.approx(0.2)
    assert many.all_reduce_s == pytest.approx(0.21105)
    assert many.communication == pytest.approx(0.21105 / 0.41105)
    frames_per_s = 64 * 64 / 0.41105
    assert many.read_bytes_per_s == pytest.approx(frames_per_s * 320e3)
    assert many.opened_per_s == pytest.approx(frames_per_s / 4)
    assert many.workers == 4 and many.open_files == 32 and needs(2, GIVEN).open_files == 8


def test_the_size_of_shards():
    many = needs(64, GIVEN)
    reader = many.read_bytes_per_s / (64 * 4)
    # With shards of the least size, opening one is a hundredth of reading it.
    assert GIVEN.open_s / (many.smallest_shard_bytes / reader + GIVEN.open_s) == pytest.approx(0.01)
    assert many.shard_bytes == pytest.approx(1e12 / (4 * 64 * 4))  # four for each of 256 readers: 977 MB
    assert needs(8, GIVEN).shard_bytes == 1e9
    assert needs(512, GIVEN).shard_bytes == pytest.approx(1e12 / (4 * 512 * 4))
    assert needs(512, replace(GIVEN, dataset_bytes=1e10)).shard_bytes is None


@pytest.mark.parametrize("name", ["gpu_frames_per_s", "link_bytes_per_s", "dataset_bytes"])
def test_what_cannot_be_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got 0"):
        replace(GIVEN, **{name: 0})
    with pytest.raises(ValueError, match="gpus must be 1 or more, got 0"):
        needs(0, GIVEN)


def test_shares_of_what_was_measured():
    two = Measured(2, 100.0, 90.0, step_s=0.4, lone_step_s=0.3, all_reduce_s=0.05, waiting=0.1, gradient_bytes=10**8,
                   step_frames=20)  # fmt: skip
    assert two.communication == pytest.approx(0.25)
    assert two.all_reduce_bytes_per_s == pytest.approx(2e9)
    assert replace(two, lone_step_s=0.41).communication == 0  # noise


def test_reading_counts_the_bytes_that_are_read(tiny_shards):
    """A batch of 8 clips would be more than there are; of each that is read, one frame is used."""
    job = job_of(TINY, tiny_shards, 0.1, [1])
    job.data["init_args"] |= {"batch_size": 2, "frames_per_clip": 1}
    reading = measure_reading(job)
    clip_bytes = sum(tar.stat().st_size for tar in tiny_shards.glob("*.tar")) / 6
    assert reading.clip_frames == 1 and reading.frames_per_s > 0
    assert 0.5 * clip_bytes < reading.bytes_per_frame < 1.5 * clip_bytes


def test_the_command_measures_and_predicts(tiny_shards, tmp_path, capsys):
    content = yaml.safe_load(TINY.read_text())
    content["model"]["init_args"]["net"] |= {"vit_dim": 32, "vit_depth": 2, "head_dim": 32, "head_depth": 1}
    content["data"]["init_args"] |= {"batch_size": 2, "workers": 0}
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(content))
    arguments = ["--data", str(tiny_shards), "--processes", "2", "--seconds", "1", "--gpus", "8", "64"]
    assert benchmark.main(["scaling", str(config), *arguments, "--gpu_frames_per_s", "320"]) == 0
    said = capsys.readouterr().out
    for row in ("share of communication", "sent by each process meanwhile", "share of waiting for data", "64 GPU(s)"):
        assert row in said


def test_configs_of_something_else_are_refused(tmp_path, capsys):
    assert benchmark.main(["scaling", str(ROOT / "conf/fasthmr.yaml")]) == 2
    assert "is no config of one stage of training" in capsys.readouterr().err
    assert benchmark.main(["scaling", str(ROOT / "conf/prior_tiny.yaml"), "--data", str(tmp_path)]) == 2
    assert "scaling is measured for an encoder on clips, got" in capsys.readouterr().err
    assert benchmark.main(["scaling", str(tmp_path / "none.yaml")]) == 2
