"""What the synthetic source is told: every wrong setting is refused by its name, and a set tells what it depends on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from fasthmr.data.synth.backgrounds import find_photos, random_background
from fasthmr.data.synth.source import SynthConfig, SynthSource


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clips", 0), ("clips", 1.5), ("frames", 0), ("frames", True), ("seed", -1), ("fps", 0.0),
        ("fps", float("nan")), ("crop_px", 256), ("second_person_share", 1.1), ("occluder_share", -0.1),
        ("moving_camera_share", "half"), ("jpeg_quality", 0), ("noise", -1.0), ("motion", ""), ("backgrounds", None),
        ("full_frames", 1), ("motion_windows", True), ("procedural_share", -0.5),
    ],
)  # fmt: skip
def test_every_wrong_value_is_refused_by_its_name(field: str, value: object):
    with pytest.raises(ValueError, match=f"synth: {field} "):
        SynthConfig(**{field: value})


def test_an_index_out_of_range_is_refused(free_body):
    source = SynthSource(SynthConfig(clips=2, frames=2), free_body)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source.make(index)


def write_walk(path: Path, frames: int = 65) -> None:
    walk = {"poses": np.zeros((frames, 72)), "trans": np.zeros((frames, 3)), "mocap_framerate": np.array(30.0)}
    walk["poses"][:, 0] = np.pi / 2  # AMASS has z up
    walk["trans"][:, 1] = -np.linspace(0, 1, frames)
    np.savez(path, **walk)


def test_windows_of_a_motion_folder_are_taken_one_after_the_other(tmp_path, free_body):
    write_walk(tmp_path / "walk.npz")
    settings = {"motion": str(tmp_path), "motion_windows": True, "frames": 30, "seed": 0}
    source = SynthSource(SynthConfig(clips=0, **settings), free_body)
    assert len(source) == 2 and len(SynthSource(SynthConfig(clips=1, **settings), free_body)) == 1
    assert source.make(0).source != source.make(1).source
    assert np.abs(source.make(0).joints3d[..., :3]).max() > 0


def test_a_share_of_the_people_moves_procedurally_beside_a_motion_folder(tmp_path, free_body):
    write_walk(tmp_path / "walk.npz")
    settings = {"clips": 8, "frames": 2, "seed": 3, "motion": str(tmp_path), "second_person_share": 0.0}
    mixed = SynthSource(SynthConfig(procedural_share=0.5, **settings), free_body)
    kinds = [mixed.make(i).source.split(":")[0] for i in range(8)]
    assert {"synth/procedural", f"synth/{tmp_path.name}"} == set(kinds)
    recorded = SynthSource(SynthConfig(**settings), free_body)
    assert all(recorded.make(i).source.startswith(f"synth/{tmp_path.name}:") for i in range(2))
    assert mixed.describe() != recorded.describe()
    with pytest.raises(ValueError, match="procedural_share must be 0 with motion_windows"):
        SynthConfig(motion=str(tmp_path), motion_windows=True, procedural_share=0.5)


def test_photographs_are_backgrounds(tmp_path, free_body):
    photo = np.zeros((90, 160, 3), np.uint8)
    photo[..., 0] = 200  # blue, in OpenCV's order
    cv2.imwrite(str(tmp_path / "sea.png"), photo)
    config = SynthConfig(clips=1, frames=1, seed=2, occluder_share=0.0, backgrounds=str(tmp_path))
    source = SynthSource(config, free_body)
    clip = source.make(0)
    far = clip.frames.decode(0)[clip.masks.decode(0) == 0].astype(float)
    assert (far[:, 2] > far[:, 0] + 50).mean() > 0.2
    assert source.describe()["backgrounds"] == [f"sea.png:{(tmp_path / 'sea.png').stat().st_size}"]


def test_a_folder_without_photographs_is_refused(tmp_path, free_body):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="backgrounds: no photographs"):
            SynthSource(SynthConfig(backgrounds=str(folder)), free_body)


def test_a_broken_photograph_is_refused_by_its_name(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        random_background(np.random.default_rng(0), find_photos(tmp_path))


def test_describe_tells_sets_apart_and_is_json(free_body):
    told = [
        json.dumps(SynthSource(SynthConfig(clips=2, frames=2, seed=seed), free_body).describe(), sort_keys=True)
        for seed in (0, 0, 1)
    ]
    assert told[0] == told[1] != told[2] and free_body.id in told[0]


def test_describe_does_not_tell_where_somebody_keeps_things(tmp_path, free_body):
    private = tmp_path / "private"
    private.mkdir()
    cv2.imwrite(str(private / "sea.png"), np.zeros((90, 160, 3), np.uint8))
    walk = {"poses": np.zeros((65, 72)), "trans": np.zeros((65, 3)), "mocap_framerate": np.array(30.0)}
    np.savez(private / "walk.npz", **walk)
    config = SynthConfig(clips=1, frames=30, motion=str(private / "walk.npz"), backgrounds=str(private))
    assert "private" not in json.dumps(SynthSource(config, free_body).describe())
