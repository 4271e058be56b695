"""`python -m fasthmr.predict`: from a video and masks to a motion file that reads back, a mesh and an overlay."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial.transform import Rotation
from test_pipeline import Film, decoder, film, hmr  # noqa: F401  (fixtures)
from test_video import write_pictures, write_video

import fasthmr.predict as command
from fasthmr.checkpoint import save_encoder, save_pipeline
from fasthmr.conventions import MASK_SUBJECT, PELVIS
from fasthmr.data.synth.amass import MotionFolder
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.motion_file import motion_arrays
from fasthmr.pipeline import Pipeline, PipelineConfig
from fasthmr.predict import main, read_boxes
from fasthmr.render.overlay import overlay_mesh
from fasthmr.video.reading import Frames, VideoError

FRAMES = 28


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, film: Film, hmr, decoder, free_body) -> Path:  # noqa: F811
    """A folder with a film of 28 frames in several forms, and checkpoints."""
    folder = tmp_path_factory.mktemp("inputs")
    there_and_back = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1]
    index = [there_and_back[i % len(there_and_back)] for i in range(FRAMES)]
    write_pictures(folder / "frames", film.frames[index])
    masks = film.masks[index].copy()
    masks[10:12] = 0
    write_pictures(folder / "labels", masks)
    np.savez_compressed(folder / "masks.npz", masks=masks == MASK_SUBJECT)
    write_video(folder / "video.mp4", film.frames[index], fps=24.0)
    (folder / "boxes.json").write_text(
        json.dumps([None if i == 5 else film.boxes[j].tolist() for i, j in enumerate(index)])
    )
    save_encoder(folder / "encoder.ckpt", hmr, free_body.id)
    save_pipeline(folder / "pipeline.ckpt", hmr, decoder, free_body.id)
    return folder


def run(inputs: Path, out: Path, video: str = "video.mp4", masks: str = "masks.npz", *more: str) -> int:
    return main(
        [str(inputs / video), "--masks", str(inputs / masks), f"--checkpoint={inputs / 'pipeline.ckpt'}",
         "--device=cpu", "-o", str(out), *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("result") / "out"
    assert run(inputs, out, "video.mp4", "masks.npz", "--glb_frame=3", "--focal_px=600") == 0
    return out


class TestResult:
    def test_is_written_and_named(self, inputs, tmp_path, capsys):
        assert run(inputs, tmp_path / "out", "frames", "labels", "--subject=1", "--fps=25", "--precision=32") == 0
        written = {"motion.npz", "frame_000000.glb", "overlay.mp4"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == written
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("written: ") and all(name in line for name in written)
        assert line.endswith("(28 frames at 25 a second, 2 of them interpolated)")

    def test_motion_reads_back(self, result, free_body):
        with np.load(result / "motion.npz", allow_pickle=False) as file:
            poses, trans = file["poses"], file["trans"]
            assert poses.shape == (FRAMES, 72) and poses.dtype == np.float32
            assert file["mocap_framerate"] == 24 and file["gender"] == "neutral" and file["up_axis"] == "z"
            assert file["betas"].shape == (10,) and file["body"] == free_body.id
            assert file["interpolated"].nonzero()[0].tolist() == [10, 11]
            assert file["intrinsics"][0, 0] == 600 and file["image_size"].tolist() == [640, 480]
        motions = MotionFolder(result / "motion.npz")
        read = motions.window(0, FRAMES, 24.0, np.random.default_rng(0))
        # It has chosen a heading, set the person on the floor around the origin, and turned the world y up.
        np.testing.assert_allclose(read.pose[:, 1:], poses.reshape(FRAMES, 24, 3)[:, 1:], atol=1e-4)
        height = read.translation[:, 1] - trans[:, 2]
        np.testing.assert_allclose(height, height[0], atol=1e-4)
        distance, own = (np.linalg.norm(np.diff(t, axis=0), axis=1) for t in (read.translation, trans))
        np.testing.assert_allclose(distance, own, atol=1e-4)
        y_from_z = Rotation.from_matrix([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
        turns = Rotation.from_rotvec(read.pose[:, PELVIS]) * (y_from_z * Rotation.from_rotvec(poses[:, :3])).inv()
        assert np.ptp(turns.as_rotvec(), axis=0).max() < 1e-3 and np.abs(turns.as_rotvec()[:, [0, 2]]).max() < 1e-3

    def test_the_world_is_the_camera_turned(self, inputs, result, film, hmr, free_body):  # noqa: F811
        motion = Pipeline(hmr, None, free_body, PipelineConfig())(film.frames, film.masks, fps=30.0)
        arrays = {key: torch.from_numpy(value) for key, value in motion_arrays(motion, free_body).items() if value.ndim}
        seen = free_body(motion.rotations, motion.betas, motion.translation).joints
        rotations = axis_angle_to_matrix(arrays["poses"].unflatten(1, (24, 3)))
        world = free_body(rotations, arrays["betas"].expand(len(motion), -1), arrays["trans"]).joints
        torch.testing.assert_close(world, seen @ arrays["world_from_camera"].mT, atol=1e-4, rtol=1e-5)
        down, away = torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 0, 1])
        assert (arrays["world_from_camera"] @ down).tolist() == [0, 0, -1]
        assert (arrays["world_from_camera"] @ away).tolist() == [0, 1, 0]

    def test_mesh(self, result, free_body):
        mesh = trimesh.load(result / "frame_000003.glb", force="mesh")
        assert mesh.vertices.shape == (free_body.num_vertices, 3) and len(mesh.faces) == len(free_body.faces)
        assert mesh.vertices[:, 2].max() < 0  # before glTF's camera, which looks along -z
        with np.load(result / "motion.npz") as file:
            pose, trans = (torch.from_numpy(file[key][3:4]) for key in ("poses", "trans"))
            betas = torch.from_numpy(file["betas"])[None]
        world = free_body(axis_angle_to_matrix(pose.unflatten(1, (24, 3))), betas, trans).vertices[0].numpy()
        # From z up, y away to y up, -z away.
        np.testing.assert_allclose(mesh.vertices, world @ [[1, 0, 0], [0, 0, -1], [0, 1, 0]], atol=1e-3)

    def test_overlay(self, inputs, result):
        drawn, plain = (np.stack(list(Frames(path))) for path in (result / "overlay.mp4", inputs / "video.mp4"))
        assert drawn.shape == plain.shape and Frames(result / "overlay.mp4").fps == 24
        changed = np.abs(drawn.astype(int) - plain).max(-1) > 60
        assert changed.any((1, 2)).all() and changed.mean() < 0.6
        blue = (drawn.astype(int)[..., 2] - drawn[..., 0])[changed & (np.arange(FRAMES) == 4)[:, None, None]].mean()
        orange = (drawn.astype(int)[..., 2] - drawn[..., 0])[changed & (np.arange(FRAMES) == 10)[:, None, None]].mean()
        assert blue > 20 and orange < -20  # of the frames without a mask

    def test_drawing_a_part_is_drawing_the_whole(self, film, hmr, free_body):  # noqa: F811
        motion = Pipeline(hmr, None, free_body, PipelineConfig())(film.frames, film.masks)
        # Also beyond the picture's border, and beside it.
        for shift in (0.0, 1.5, 50.0):
            moved = replace(motion, translation=motion.translation + torch.tensor([shift, 0, 0]))
            (drawn, *_) = command.draw_overlays(film.frames, moved, free_body)
            posed = free_body(motion.rotations[:1], motion.betas[:1], moved.translation[:1])
            focal_px, center = float(motion.intrinsics[0, 0]), tuple(motion.intrinsics[:2, 2].tolist())
            whole = overlay_mesh(film.frames[0], posed.vertices[0].numpy(), free_body.faces.numpy(), focal_px, center)
            assert (np.abs(drawn.astype(int) - whole) > 1).mean() < 1e-4
            assert (drawn != film.frames[0]).any() == (shift < 50)

    def test_without_a_decoder_and_with_boxes(self, inputs, tmp_path):
        more = [f"--checkpoint={inputs / 'encoder.ckpt'}", f"--boxes={inputs / 'boxes.json'}"]
        assert run(inputs, tmp_path, "frames", "masks.npz", *more) == 0
        with np.load(tmp_path / "motion.npz") as file:
            assert file["interpolated"].nonzero()[0].tolist() == [5, 10, 11]
            assert file["mocap_framerate"] == 30


class TestMistakes:
    @pytest.mark.parametrize(
        ("video", "masks", "more", "message"),
        [
            ("nowhere.mp4", "masks.npz", [], "there is no video or folder of pictures at"),
            ("video.mp4", "nowhere", [], "there are no masks at"),
            ("video.mp4", "masks.npz", ["--checkpoint=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
            ("video.mp4", "masks.npz", ["--body=nowhere.pkl"], "there is no body file nowhere.pkl"),
            ("video.mp4", "masks.npz", ["--fps=0"], "--fps must be positive, got 0"),
            ("video.mp4", "masks.npz", ["--focal_px=-5"], "--focal_px must be positive, got -5"),
            ("video.mp4", "masks.npz", ["--glb_frame=-1"], "--glb_frame must be 0 or more, got -1"),
            ("video.mp4", "masks.npz", ["--glb_frame=28"], "--glb_frame must be below the 28 frames of the video"),
            ("video.mp4", "masks.npz", ["--precision=8"], "precision must be one of"),
            ("video.mp4", "few.npz", [], "there are 9 masks, but more frames"),
            ("video.mp4", "small.npz", [], "mask 0 is 20 x 10 px, its frame is 640 x 480 px"),
            ("video.mp4", "masks.npz", ["--boxes={}/few.json"], "there are 2 boxes, but more frames and masks"),
            ("video.mp4", "masks.npz", ["--boxes={}/video.mp4"], "holds no boxes"),
        ],
    )  # fmt: skip
    def test_end_in_one_line_and_nothing_is_written(self, inputs, tmp_path, capsys, video, masks, more, message):
        np.savez(inputs / "few.npz", masks=np.ones((9, 480, 640), bool))
        np.savez(inputs / "small.npz", masks=np.ones((FRAMES, 10, 20), bool))
        (inputs / "few.json").write_text("[[1, 2, 300, 400], [1, 2, 300, 400]]")
        assert run(inputs, tmp_path / "out", video, masks, *(m.format(inputs) for m in more)) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last
        assert not (tmp_path / "out").exists()

    def test_boxes_files(self, tmp_path):
        (tmp_path / "boxes.json").write_text("[[1, 2, 3, 4], null]")
        np.savez(tmp_path / "boxes.npz", boxes=[[1, 2, 3, 4], [np.nan] * 4])
        for name in ("boxes.json", "boxes.npz"):
            np.testing.assert_array_equal(read_boxes(tmp_path / name), [[1, 2, 3, 4], [np.nan] * 4])
        for text in ("nonsense", "[[1, 2], [1, 2, 3]]", "5"):
            (tmp_path / "boxes.json").write_text(text)
            with pytest.raises(VideoError, match="holds no boxes"):
                read_boxes(tmp_path / "boxes.json")

    def test_an_interruption_leaves_nothing_half_written(self, inputs, tmp_path, monkeypatch):
        def interrupted(*arguments):
            yield next(drawing(*arguments))
            raise KeyboardInterrupt

        drawing = command.draw_overlays
        monkeypatch.setattr(command, "draw_overlays", interrupted)
        assert run(inputs, tmp_path) == 130
        assert {path.name for path in tmp_path.iterdir()} == {"motion.npz", "frame_000000.glb"}


def test_the_examples_of_the_documentation(film, decoder, hmr, free_body):  # noqa: F811
    document = (Path(__file__).parents[1] / "docs" / "predict.md").read_text()
    first, streaming = re.findall(r"```python\n(.*?)```", document, flags=re.S)
    names = {"frames": film.frames, "person_masks": film.masks}
    exec(first, names)
    assert names["mesh"].vertices.shape == (6, 6600, 3)
    names["pipeline"] = Pipeline(hmr, decoder, free_body)
    names |= {"features": torch.randn(11, decoder.feature_dim), "betas": torch.zeros(11, 10)}
    names["rotations"] = torch.eye(3).expand(11, 24, 3, 3)
    exec(streaming.replace("stride=8, look_ahead=8", "stride=4, look_ahead=5"), names)  # of a window of 12 frames
    assert len(names["refined"]) == 4 and len(names["rest"]) == 7


def test_background_as_masks(inputs, tmp_path, free_body, hmr):  # noqa: F811
    from test_video import scene

    images, _ = scene(30)
    video = write_video(tmp_path / "scene.mp4", images, fps=30.0)
    more = [f"--checkpoint={inputs / 'encoder.ckpt'}", "-o", str(tmp_path / "out")]
    assert main([str(video), "--masks", "background", *more]) == 0
    assert len(MotionFolder(tmp_path / "out" / "motion.npz")) == 1


def test_a_real_video(inputs, tmp_path):
    folder = os.environ.get("FASTHMR_TEST_DATA")
    video = Path(folder or "nowhere") / "media" / "video_juggle.mp4"
    if not video.exists():
        pytest.skip("set FASTHMR_TEST_DATA to a folder with media/video_juggle.mp4, 247 frames of a man with a ball")
    more = [f"--checkpoint={inputs / 'encoder.ckpt'}", "-o", str(tmp_path / "out")]
    assert main([str(video), "--masks", "background", *more]) == 0
    assert sum(1 for _ in Frames(tmp_path / "out" / "overlay.mp4")) == 247
    (first, *_) = Frames(tmp_path / "out" / "overlay.mp4")
    assert first.shape == (720, 1280, 3) and cv2.Laplacian(first, cv2.CV_64F).std() > 10
