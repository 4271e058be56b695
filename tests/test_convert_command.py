"""`python -m fasthmr.shard convert`: says what is missing, goes on where it was killed, refuses hostile files."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import foreign_sets as foreign
import numpy as np
import pytest
import scipy.io

from fasthmr.body import BodyModel
from fasthmr.data.convert import SETS
from fasthmr.data.convert.reading import ConvertError, Picture, read_json, read_npz, read_pickle, read_picture
from fasthmr.data.convert.source import Report
from fasthmr.data.shards import ClipStore
from fasthmr.data.synth.amass import MotionFolder
from fasthmr.shard import main

#: the camera and the pictures of the takes are small, for speed
SIZE = (160, 120)
#: what reports say
LOST, NAN = "frame of a clip without any labels ({})", "the set says so, or they hold NaN"


def run(name: str, root: Path, out: Path, *options: str) -> int:
    command = ["convert", name, "--root", str(root), "--out", str(out), "--workers", "1", "--clips_per_shard", "1"]
    return main([*command, *options])


@pytest.fixture(scope="module")
def three_scenes(tmp_path_factory: pytest.TempPathFactory, free_body: BodyModel) -> Path:
    """Three scenes of BEDLAM's format, one clip of two frames each."""
    root = tmp_path_factory.mktemp("bedlam")
    for number in range(3):
        foreign.write_bedlam(root, f"scene{number}", foreign.take(free_body, frames=2, seed=number, size=SIZE))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard*"))}


# ---- what is not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SETS, "amass"])
def test_an_incomplete_download_is_told_what_it_lacks_and_where_that_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    assert run(name, root, tmp_path / "out") == 2
    assert "there is no folder" in capsys.readouterr().err
    root.mkdir()
    assert run(name, root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert " lacks " in error and ("http" in error or "github.com" in error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_gendered_labels_ask_for_their_bodies(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.write_emdb(tmp_path, foreign.take(free_body, frames=1, size=SIZE))
    assert run("emdb", tmp_path, tmp_path / "out") == 2
    assert "give --body_female" in capsys.readouterr().err


def test_missing_pictures_are_counted_and_named_and_cut_the_track(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.write_bedlam(tmp_path, "scene", foreign.take(free_body, frames=4, size=SIZE))
    gone = tmp_path / "images/scene/png/seq_000000/seq_000000_0005.png"
    gone.unlink()
    assert run("bedlam", tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"1 of 4 pictures are missing ({gone.relative_to(tmp_path)}): complete" in error  # no dots: that was all
    assert run("bedlam", tmp_path, tmp_path / "out", "--max_missing", "0.3") == 0
    assert [frames for _, frames in ClipStore(tmp_path / "out").lengths()] == [1, 2]
    report = Report.read(tmp_path / "out")
    assert report.dropped == {"missing picture": 1} and (report.clips, report.frames) == (2, 3)
    assert "left out: 1 x missing picture: images/scene" in capsys.readouterr().out


def test_damaged_pictures_cost_their_frames_and_are_named_up_to_a_limit(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=6, size=SIZE)
    foreign.write_bedlam(tmp_path, "scene", made)
    folder = tmp_path / "images/scene/png/seq_000000"
    (folder / "seq_000000_0000.png").write_bytes(b"no picture")
    whole = (folder / "seq_000000_0015.png").read_bytes()
    (folder / "seq_000000_0015.png").write_bytes(whole[: len(whole) // 2])
    assert run("bedlam", tmp_path, tmp_path / "out", "--max_unusable", "0.3") == 2
    error = capsys.readouterr().err
    assert "2 of 6 pictures or masks cannot be used (" in error and "0015.png cannot be decoded" in error
    assert run("bedlam", tmp_path, tmp_path / "out", "--max_unusable", "0.4") == 0
    clips = list(ClipStore(tmp_path / "out"))
    assert [clip.key[-12:] for clip in clips] == ["_00000_00001", "_00000_00004"]
    for clip, frames in zip(clips, (slice(1, 3), slice(4, 6)), strict=True):
        assert np.abs(clip.joints3d[..., :3] - made.joints[frames]).max() < 1e-4
    report = Report.read(tmp_path / "out")
    assert (report.clips, report.frames) == (2, 4)
    ((reason, times),) = report.dropped.items()
    assert (reason, times) == ("a picture or mask that cannot be used", 2)
    assert "frame 0: " in report.named[reason][0] and "0015.png cannot be decoded" in report.named[reason][1]
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_too_many_damaged_pictures_stop_the_conversion_where_they_are(
    workers: str, three_scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six pictures in three shards, of the first two of which one is damaged each."""
    root, out, options = tmp_path / "root", tmp_path / "out", ("--workers", workers, "--max_unusable")
    shutil.copytree(three_scenes, root)
    for picture in sorted(root.glob("images/*/png/*/*_0005.png"))[:2]:
        picture.write_bytes(b"no picture")
    assert run("bedlam", root, out, *options, "0.2") == 2
    error = capsys.readouterr().err
    assert "2 of 6 pictures or masks cannot be used (" in error and "_0005.png" in error
    assert workers == "2" or error.count("_0005.png") == 2  # that of the clip before, too
    finished = contents(out)
    assert not {"shard-000000.tar", "shard-000001.tar"} <= finished.keys()  # two processes begin with these
    assert workers == "2" or list(finished) == ["shard-000000.tar", "shard-000000.tar.idx"]
    assert not (out / "manifest.json").exists() and not list(out.glob(".shard*"))

    if workers == "1":
        assert run("bedlam", root, out, *options, "0.2") == 2  # that in the finished shard still counts
        assert capsys.readouterr().err.count("_0005.png") == 2
    assert run("bedlam", root, out, *options, "0.4") == 0
    assert Report.read(out).dropped == {"a picture or mask that cannot be used": 2}
    assert run("bedlam", root, tmp_path / "at_once", "--max_unusable", "0.4") == 0
    assert finished.items() <= contents(out).items() and contents(out) == contents(tmp_path / "at_once")


def test_a_damaged_picture_of_a_shard_that_is_made_anew_counts_once(three_scenes: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(three_scenes, root)
    min(root.glob("images/*/png/*/*_0005.png")).write_bytes(b"no picture")
    assert run("bedlam", root, out, "--max_unusable", "0.2") == 0  # 1 of 6
    before, tar = contents(out), out / "shard-000000.tar"
    (out / "manifest.json").unlink()
    tar.write_bytes(tar.read_bytes()[:-512])
    assert run("bedlam", root, out, "--max_unusable", "0.2") == 0
    assert contents(out) == before


def test_clips_that_are_lost_otherwise_do_not_raise_the_share_of_damaged_pictures(
    tmp_path: Path, free_body: BodyModel
) -> None:
    made = foreign.take(free_body, frames=2, size=SIZE)
    for name in ("damaged", "whole"):
        foreign.write_bedlam(tmp_path, name, made)
    foreign.write_bedlam(tmp_path, "away", made, center=np.full((2, 2), 5000.0))
    (tmp_path / "images/damaged/png/seq_000000/seq_000000_0005.png").write_bytes(b"no picture")
    assert run("bedlam", tmp_path, tmp_path / "out", "--max_unusable", "0.2") == 0  # 1 of 6 that were planned
    report = Report.read(tmp_path / "out")
    assert (report.clips, report.frames) == (2, 3)
    assert report.dropped["a picture or mask that cannot be used"] == 1


@pytest.mark.parametrize("name", ["bedlam", "4dhumans"])
def test_a_mask_of_another_size_than_its_picture_costs_the_frame(
    name: str, tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=2, size=SIZE)
    if name == "bedlam":
        foreign.write_bedlam(tmp_path, "scene", made, with_masks=True)
        for layer in tmp_path.glob("masks/scene/seq_000000/seq_000000_0000_*.png"):
            foreign.write_picture(layer, np.zeros((60, 80, 3), np.uint8))
    else:
        members = foreign.hmr2_members("good", made, 1, [foreign.hmr2_person(made, 1)])
        small = io.BytesIO()
        np.savez(small, masks=np.ones((1, 60, 80), bool))
        bad = foreign.hmr2_members("bad", made, 0, [foreign.hmr2_person(made)]) | {
            "bad.detection.npz": small.getvalue()
        }
        foreign.write_tar(tmp_path / "a.tar", members | bad)
    assert run(name, tmp_path, tmp_path / "out", "--max_unusable", "0.5") == 0
    assert [len(clip) for clip in ClipStore(tmp_path / "out")] == [1]
    assert "the mask is 80x60 px, the picture 160x120" in capsys.readouterr().out


def test_layers_of_a_mask_that_differ_in_size_cost_the_frame(tmp_path: Path, free_body: BodyModel) -> None:
    foreign.write_bedlam(tmp_path, "scene", foreign.take(free_body, frames=2, size=SIZE), with_masks=True)
    layer = tmp_path / "masks/scene/seq_000000/seq_000000_0000_01_clothing.png"
    foreign.write_picture(layer, np.zeros((60, 80, 3), np.uint8))
    assert run("bedlam", tmp_path, tmp_path / "out", "--max_unusable", "0.5") == 0
    ((told,),) = Report.read(tmp_path / "out").named.values()
    assert f"{layer} has (60, 80) px, other masks of the picture have (120, 160)" in told


def test_two_tracks_of_one_name_are_named_before_anything_is_written(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=1, size=SIZE)
    for folder in ("a/b", "a-b"):
        members = foreign.hmr2_members("k", made, 0, [foreign.hmr2_person(made)], with_masks=False)
        foreign.write_tar(tmp_path / f"{folder}.tar", members)
    assert run("4dhumans", tmp_path, tmp_path / "out") == 2
    assert "1 names are those of several tracks, such as 'hmr2-a-b_k_0'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- labels that cannot be used -------------------------------------------------------------------------------------


def test_nan_labels_and_boxes_of_no_size_switch_frames_off(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, frames=4, size=SIZE)
    pose = made.pose_in_camera.reshape(4, 72).copy()
    pose[1, 30] = np.nan
    scale = foreign.bedlam_labels(made, [""] * 4)["scale"]
    scale[2] = 0.0
    foreign.write_bedlam(tmp_path, "scene", made, pose_cam=pose, scale=scale)
    assert run("bedlam", tmp_path, tmp_path / "out") == 0
    (clip,) = ClipStore(tmp_path / "out")
    assert clip.valid.tolist() == [True, False, True, True]
    side = (made.boxes[:, 2:] - made.boxes[:, :2]).max(1)
    assert clip.box_size[2] == pytest.approx(side[2], rel=0.03)  # the mesh's
    assert Report.read(tmp_path / "out").frames_without_labels == {"the set says so, or they hold NaN": 1}


def test_frames_that_are_switched_off_are_counted_by_reason(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=8, size=SIZE)
    trans, camera, good = made.trans.copy(), made.camera.copy(), np.ones(8, bool)
    good[0] = False
    camera[1, :3, :3] *= 2
    trans[2:4] -= camera[2:4, 2, :3] * 10  # ten metres towards the camera, and out of it behind
    trans[4] += camera[4, 0, :3] * 50  # to the right
    foreign.write_emdb(
        tmp_path, made, gender="neutral", good_frames_mask=good,
        camera={"intrinsics": made.intrinsics, "extrinsics": camera, "width": SIZE[0], "height": SIZE[1]},
        smpl={
            "poses_root": made.pose[:, 0], "poses_body": made.pose[:, 1:].reshape(8, 69), "trans": trans,
            "betas": made.betas,
        },
        bboxes={"bboxes": made.boxes, "invalid_idxs": np.array([4])},
    )  # fmt: skip
    assert run("emdb", tmp_path, tmp_path / "out") == 0
    (clip,) = ClipStore(tmp_path / "out")
    assert clip.valid.tolist() == 5 * [False] + 3 * [True]
    report = Report.read(tmp_path / "out")
    assert report.frames_without_labels == {
        "the set says so, or they hold NaN": 1, "the camera's rotation is none": 1,
        "the person is behind the camera": 2, "nobody in the picture": 1,
    }  # fmt: skip
    assert (report.clips, report.frames, report.dropped) == (1, 8, {})
    assert "kept without labels: 2 frames: the person is behind the camera" in capsys.readouterr().out


def without(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["h36m", "mpi_inf_3dhp", "raw", "4dhumans"])
def test_pictures_without_labels_are_counted_and_named(tmp_path: Path, free_body: BodyModel, name: str) -> None:
    made, options = foreign.take(free_body, frames=4, size=SIZE, still=True), list[str]()
    if name == "h36m":
        foreign.write_h36m_neural_annot(tmp_path, made)
        data = tmp_path / "annotations/Human36M_subject1_data.json"
        fits = tmp_path / "annotations/Human36M_subject1_SMPL_NeuralAnnot.json"
        without(data, lambda content: content["annotations"].pop())

        def first_fit(content: Any) -> None:
            (of_action,) = content.values()
            (of_sub_action,) = of_action.values()
            of_sub_action.pop(min(of_sub_action, key=int))

        without(fits, first_fit)
        options, frames = ["--split", "train"], 2
    elif name == "mpi_inf_3dhp":
        foreign.write_3dhp_neural_annot(tmp_path, made)
        without(tmp_path / "annotations/MPI-INF-3DHP_1k.json", lambda content: content["annotations"].pop())
        frames = 3
    elif name == "raw":
        foreign.write_3dhp_raw(tmp_path, made)
        folder = next(tmp_path.glob("S1/Seq1/imageFrames/video_*"))
        last = max(folder.iterdir())
        number = int(last.stem.rpartition("_")[2]) + 1
        (folder / f"{last.stem.rpartition('_')[0]}_{number:06d}.jpg").write_bytes(last.read_bytes())
        name, options, frames = "mpi_inf_3dhp", ["--split", "raw"], None
    else:
        members = foreign.hmr2_members("one", made, 0, [foreign.hmr2_person(made)], with_masks=False)
        members |= foreign.hmr2_members("nobody", made, 1, [], with_masks=False)
        foreign.write_tar(tmp_path / "a.tar", members)
        frames = 1
    assert run(name, tmp_path, tmp_path / "out", *options) == 0
    report = Report.read(tmp_path / "out")
    assert report.dropped == {"picture without labels": 2 if name == "h36m" else 1}
    assert len(report.named["picture without labels"]) == (2 if name == "h36m" else 1)
    assert frames is None or report.frames == frames


def test_nobody_in_the_picture_is_no_clip(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=2, size=SIZE)
    foreign.write_bedlam(tmp_path, "seen", made)
    foreign.write_bedlam(tmp_path, "away", made, center=np.full((2, 2), 5000.0))
    foreign.write_bedlam(tmp_path, "nan", made, trans_cam=np.full((2, 3), np.nan))
    assert run("bedlam", tmp_path, tmp_path / "out") == 0
    assert len(ClipStore(tmp_path / "out")) == 1
    report = Report.read(tmp_path / "out")
    assert report.dropped == {LOST.format("nobody in the picture"): 2, LOST.format(NAN): 2}  # frames, not clips
    assert (report.frames, report.frames_without_labels) == (2, {})


def test_stills_without_labels_keep_their_reasons(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=3, size=SIZE)
    shape = np.tile(made.betas, (3, 1))
    shape[1, 0] = np.nan
    foreign.write_camerahmr(tmp_path, made, shape=shape)
    behind = made.trans_in_camera - np.array([[0], [0], [50]]) * np.eye(3)[2]
    with np.load(file := tmp_path / "labels/coco-release.npz") as labels:
        np.savez(file, **dict(labels) | {"trans_cam": behind})
    assert run("camerahmr", tmp_path, tmp_path / "dry", "--dry_run") == 0
    assert "left out with the clip: 1 frames: the person is behind the camera: coco_0000002" in capsys.readouterr().out
    assert run("camerahmr", tmp_path, tmp_path / "out") == 0
    assert [clip.key for clip in ClipStore(tmp_path / "out")] == ["coco_0000000"]
    report = Report.read(tmp_path / "out")
    lost = LOST.format("the person is behind the camera")
    assert report.dropped == {LOST.format(NAN): 1, lost: 1}
    assert report.named[lost] == ["coco_0000002"]


@pytest.mark.parametrize("pixels", [1.25, 20.0])
def test_a_mesh_without_a_box_gets_that_of_what_shows_of_it_or_none_if_that_is_too_little(
    tmp_path: Path, free_body: BodyModel, pixels: float
) -> None:
    made = foreign.take(free_body, frames=2, size=SIZE, still=True)
    vertices = made.vertices[1, ::5]
    rightmost = vertices[made.pixels(vertices)[:, 0].argmax()]
    shift = np.zeros((2, 3))  # until the rightmost point is `pixels` from the picture's left edge
    shift[1, 0] = (pixels - made.pixels(rightmost)[0]) * rightmost[2] / made.intrinsics[0, 0]
    labels = foreign.bedlam_labels(made, [""] * 2)
    changes = {"trans_cam": labels["trans_cam"] + shift, "scale": labels["scale"] * [1, 0]}
    foreign.write_bedlam(tmp_path, "scene", made, **changes)
    assert run("bedlam", tmp_path, tmp_path / "out") == 0
    (clip,) = ClipStore(tmp_path / "out")
    assert clip.valid.tolist() == [True, pixels > 4]
    if pixels > 4:  # a hand: not as high as the person who stands beside the picture
        shown = made.pixels(made.vertices[1] + shift[1])
        shown = shown[((shown >= 0) & (shown <= np.array(SIZE) - 1)).all(1)]
        assert clip.box_size[1] == pytest.approx(np.ptp(shown, axis=0).max(), abs=3)
        assert clip.box_size[1] < 0.6 * np.ptp(made.pixels(made.vertices[1]), axis=0).max()


@pytest.mark.parametrize("beside", [0, 100_000])
def test_a_person_whose_joints_all_lie_around_the_picture_fills_it(
    tmp_path: Path, free_body: BodyModel, beside: int
) -> None:
    made = foreign.take(free_body, frames=2, size=SIZE, still=True)
    foreign.write_3dhp_raw(tmp_path, made)
    labels = scipy.io.loadmat(file := tmp_path / "S1/Seq1/annot.mat", variable_names=["annot2", "annot3"])
    points = labels["annot2"][1, 0][1].reshape(28, 2)  # a view of the second frame of the camera with pictures
    known = points[list(foreign.OURS_OF_3DHP)]
    points[:] = 2000 * (points - (known.min(0) + known.max(0)) / 2) + np.array(SIZE) / 2 + beside
    assert (np.abs(points - np.array(SIZE) / 2).max(1) > max(SIZE)).all()
    scipy.io.savemat(file, {name: labels[name] for name in ("annot2", "annot3")})
    assert run("mpi_inf_3dhp", tmp_path, tmp_path / "out", "--split", "raw") == 0
    (clip,) = ClipStore(tmp_path / "out")
    assert clip.valid.tolist() == [True, not beside]
    assert beside or (clip.box_center[1].tolist() == [79.5, 59.5] and clip.box_size[1] >= 159)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trans_cam": np.zeros((2, 2))}, "trans_cam must have shape (2, 3), got (2, 2)"),
        ({"pose_cam": np.zeros((2, 60))}, "pose_cam must have shape (2, 165), got (2, 60)"),
        ({"cam_int": np.zeros((1, 3, 3))}, "cam_int has 1 rows, imgname has 2"),
        ({"imgname": np.array(["../../etc/passwd_0000.png"] * 2)}, "is no name of a file under"),
        ({"imgname": np.array(["seq/first.png"] * 2)}, "imgname must end in a picture's number"),
        ({"gender": np.array(["robot"] * 2)}, "gender must be one of neutral, male, female, got 'robot'"),
    ],
)
def test_labels_of_another_format_are_an_error(
    changes: dict, message: str, tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.write_bedlam(tmp_path, "scene", foreign.take(free_body, frames=2, size=SIZE), **changes)
    assert run("bedlam", tmp_path, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_missing_key_is_named_with_those_there_are(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=2, size=SIZE)
    foreign.write_threedpw(tmp_path, [made], ["m"], np.ones((1, 2)), campose_valid=None)
    command = (tmp_path, tmp_path / "out", "--body_male", "free")
    assert run("threedpw", *command) == 2
    assert "campose_valid must be a list" in capsys.readouterr().err


def test_bad_samples_of_4dhumans_are_left_out_and_named_up_to_a_limit(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=1, size=SIZE)
    person = foreign.hmr2_person(made)
    changes = {
        "good": {},
        "nan": {"center": np.full(2, np.nan), "keypoints_2d": np.full((44, 3), np.nan)},
        "shape": {"body_pose": np.zeros(69)},
        "flag": {"has_betas": "yes"},
        "word": {"scale": ["a", "b"]},
    }
    members = {}
    for key, changed in changes.items():
        members |= foreign.hmr2_members(key, made, 0, [person | changed], with_masks=False)
    members |= foreign.hmr2_members("cut", made, 0, [person], with_masks=False)
    members["cut.data.pyd"] = members["cut.data.pyd"][:-20]
    members["alone.jpg"] = members["good.jpg"]
    foreign.write_tar(tmp_path / "a.tar", members)
    assert run("4dhumans", tmp_path, tmp_path / "out", "--max_unusable", "0.7") == 2
    assert "5 of 7 tracks have labels that cannot be used (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("4dhumans", tmp_path, tmp_path / "out", "--max_unusable", "0.8") == 0
    assert [clip.key for clip in ClipStore(tmp_path / "out")] == ["hmr2-a_good_0"]
    report = Report.read(tmp_path / "out")
    assert report.dropped == {"labels that cannot be used": 5, LOST.format("nobody in the picture"): 1}
    told = "\n".join(report.named["labels that cannot be used"])
    for name in ("shape_0: body_pose", "flag_0: has_betas", "word_0: scale", "cut.data.pyd", "alone has only jpg"):
        assert name in told


Writer = Callable[[Path, foreign.Take], object]
#: (set, its kind of labels, how it is written, the label file)
LABEL_FILES: dict[str, tuple[str, str, Writer, str]] = {
    "3dpw": (
        "threedpw", "test", lambda root, made: foreign.write_threedpw(root, [made], ["m"], np.ones((1, len(made)))),
        "sequenceFiles/test/*.pkl",
    ),
    "emdb": ("emdb", "emdb1", foreign.write_emdb, "P0/*/*_data.pkl"),
    "bedlam": ("bedlam", "all", lambda root, made: foreign.write_bedlam(root, "scene", made), "labels/*.npz"),
    "camerahmr": ("camerahmr", "all", foreign.write_camerahmr, "labels/*.npz"),
    "spin": ("mpi_inf_3dhp", "spin", foreign.write_3dhp_spin, "annotations/*.npz"),
    "hybrik h36m": ("h36m", "train", foreign.write_h36m_hybrik, "annotations/*.json"),
    "hybrik 3dhp": ("mpi_inf_3dhp", "hybrik", foreign.write_3dhp_hybrik, "annotations/*.json"),
    "raw 3dhp": ("mpi_inf_3dhp", "raw", foreign.write_3dhp_raw, "S1/Seq1/annot.mat"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "put_there"),
    [
        *((name, "half of it") for name in LABEL_FILES),
        *(("3dpw", "emdb"), ("emdb", "3dpw"), ("bedlam", "spin"), ("spin", "bedlam")),
        ("bedlam", "camerahmr"),
        *(("hybrik h36m", "hybrik 3dhp"), ("hybrik 3dhp", "hybrik h36m")),
    ],
)
def test_a_label_file_that_is_cut_or_of_another_set_is_named(
    ours: str, put_there: str, tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=2, size=SIZE, still=True)
    name, split, write, labels = LABEL_FILES[ours]
    write(tmp_path / "root", made)
    (file,) = (tmp_path / "root").glob(labels)
    if put_there == "half of it":
        content = file.read_bytes()[: file.stat().st_size // 2]
    else:
        _, _, write, labels = LABEL_FILES[put_there]
        write(tmp_path / "other", made)
        (other,) = (tmp_path / "other").glob(labels)
        content = other.read_bytes()
    file.write_bytes(content)
    assert run(name, tmp_path / "root", tmp_path / "out", "--split", split) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and file.name in error, error
    if put_there == "camerahmr":
        assert "has no cam_ext and no sub" in error and "use `convert camerahmr`" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["h36m", "emdb"])
def test_a_box_of_no_size_is_replaced_by_the_meshs(tmp_path: Path, free_body: BodyModel, name: str) -> None:
    made = foreign.take(free_body, frames=3, size=SIZE, still=True)
    side = (made.boxes[:, 2:] - made.boxes[:, :2]).max(1)
    if name == "h36m":
        boxes = np.concatenate([made.boxes[:, :2], made.boxes[:, 2:] - made.boxes[:, :2]], 1)
        boxes[1, 2:] = 0
        foreign.write_h36m_hybrik(tmp_path, made, bbox=boxes)
    else:
        boxes = made.boxes.copy()
        boxes[1, 2:] = boxes[1, :2]
        invalid = np.array([], np.int64)
        foreign.write_emdb(tmp_path, made, gender="neutral", bboxes={"bboxes": boxes, "invalid_idxs": invalid})
    assert run(name, tmp_path, tmp_path / "out") == 0
    (clip,) = ClipStore(tmp_path / "out")
    assert clip.valid.all() and clip.box_size == pytest.approx(side, rel=0.03)


# ---- going on, sharing, looking -------------------------------------------------------------------------------------


def test_a_stopped_conversion_goes_on_with_the_same_bytes(three_scenes: Path, tmp_path: Path) -> None:
    assert run("bedlam", three_scenes, tmp_path / "whole") == 0
    assert run("bedlam", three_scenes, tmp_path / "stopped") == 0
    before = contents(tmp_path / "stopped")
    for name in ("manifest.json", "shard-000001.tar", "shard-000001.tar.idx"):
        (tmp_path / "stopped" / name).unlink()
    kept = (tmp_path / "stopped/shard-000000.tar").stat().st_mtime_ns
    assert run("bedlam", three_scenes, tmp_path / "stopped") == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole") == before
    assert (tmp_path / "stopped/shard-000000.tar").stat().st_mtime_ns == kept


def test_jobs_of_a_cluster_make_one_set(three_scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bedlam", three_scenes, tmp_path / "whole") == 0
    capsys.readouterr()
    assert run("bedlam", three_scenes, tmp_path / "parts", "--part", "2/2") == 0
    assert "the set is ready when all parts are" in capsys.readouterr().out
    assert run("bedlam", three_scenes, tmp_path / "parts", "--part", "1/2") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert main(["verify", str(tmp_path / "parts")]) == 0
    assert Report.read(tmp_path / "parts") == Report.read(tmp_path / "whole")
    assert run("bedlam", three_scenes, tmp_path / "parts", "--part", "3/2") == 2
    assert "--part must be i/n" in capsys.readouterr().err


def test_a_dry_run_counts_and_estimates_and_writes_only_the_sheet(
    three_scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, out = tmp_path / "look.png", tmp_path / "out"
    assert run("bedlam", three_scenes, out, "--dry-run", "--sheet", str(sheet)) == 0
    told = capsys.readouterr().out
    assert "3 label files, 3 tracks -> 3 clips, 6 frames" in told and "s on one core" in told
    assert not out.exists()
    out.mkdir()
    for name in ("shard-000000.tar", "shard-000000.tar.idx"):
        (out / name).write_text("damaged")
    assert run("bedlam", three_scenes, out, "--dry-run") == 0  # it does not even look
    picture = cv2.cvtColor(cv2.imread(str(sheet)), cv2.COLOR_BGR2RGB).astype(int)
    plain, meshed = picture[30:256, :256], picture[30:256, 256:512]
    blue = [((tile[..., 2] > 90) & (tile[..., 1] > 90)).mean() for tile in (plain, meshed)]
    assert blue[0] < 0.01 < blue[1]  # the mesh is drawn over every second frame


def test_processes_give_the_same_bytes(three_scenes: Path, tmp_path: Path) -> None:
    assert run("bedlam", three_scenes, tmp_path / "one") == 0
    assert run("bedlam", three_scenes, tmp_path / "two", "--workers", "2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ---- hostile files --------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/fasthmr-evil"),))


class Large:
    def __reduce__(self):
        return (np.ndarray, ((1 << 40,), np.dtype("u1")))


class Doubling:
    def __reduce__(self):
        import codecs

        return (codecs.encode, ("00" * 9, "hex"))


@pytest.mark.parametrize("content", [Evil(), Doubling(), [1], b"x" * 10])
def test_pickles_that_are_no_labels_are_not_loaded(tmp_path: Path, content: object) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ConvertError, match=r"a\.pkl"):
        read_pickle(tmp_path / "a.pkl")
    assert not Path("/tmp/fasthmr-evil").exists()


def test_a_pickle_cannot_ask_for_memory_that_it_does_not_bring(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"poses": Large()}))
    with pytest.raises(ConvertError, match="not a whole pickle"):
        read_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_all_protocols_that_sets_use_are_read(tmp_path: Path, protocol: int) -> None:
    content = {"a": np.arange(6.0).reshape(2, 3), "b": [np.float32(2), "m"], "c": np.asfortranarray(np.eye(2)[:, :1])}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickle(tmp_path / "a.pkl")
    assert np.array_equal(read["a"], content["a"]) and np.array_equal(read["c"], content["c"])
    assert read["b"] == content["b"]


def test_an_npz_bomb_and_an_npz_that_lies_are_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 33,)})
    with zipfile.ZipFile(tmp_path / "lies.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("poses.npy", header.getvalue() + bytes(1000))
    with pytest.raises(ConvertError, match="which are not its 1000 bytes"):
        read_npz(tmp_path / "lies.npz", ("poses",))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("poses.npy", b"")
        archive.infolist()[0].file_size = 1 << 40  # what the directory will say
    with pytest.raises(ConvertError, match="would unpack to 1099511627776 bytes"):
        read_npz(tmp_path / "bomb.npz", ("poses",))
    np.savez(tmp_path / "evil.npz", poses=np.array([Evil()], object))
    with pytest.raises(ConvertError, match="not on the list of harmless names"):
        read_npz(tmp_path / "evil.npz", ("poses",))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "evil.npz").read_bytes()[:-30])
    with pytest.raises(ConvertError, match="no whole npz"):
        read_npz(tmp_path / "cut.npz", ("poses",))


def test_hostile_json_is_refused(tmp_path: Path) -> None:
    for content in ("[" * 100_000, "{", "[1]"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ConvertError, match=r"a\.json"):
            read_json(tmp_path / "a.json")


def test_a_picture_that_says_it_is_huge_is_not_decoded(tmp_path: Path) -> None:
    encoded = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    encoded[16:24] = (100_000).to_bytes(4) + (100_000).to_bytes(4)
    (tmp_path / "a.png").write_bytes(encoded)
    with pytest.raises(ConvertError, match="says that it is 100000x100000 px"):
        read_picture(tmp_path, Picture("a.png"))
    with pytest.raises(ConvertError, match="is no name of a file under"):
        read_picture(tmp_path, Picture("../a.png"))


@pytest.mark.parametrize("name", ["../../escape.jpg", "/etc/escape.jpg", "a\\..\\b.jpg"])
def test_tars_that_lead_elsewhere_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    foreign.write_tar(tmp_path / "a.tar", {name: b"x"})
    assert run("4dhumans", tmp_path, tmp_path / "out") == 2
    assert "is no name of a file under" in capsys.readouterr().err


def test_damaged_tars_are_refused(tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]) -> None:
    made = foreign.take(free_body, frames=1, size=SIZE)
    members = foreign.hmr2_members("k", made, 0, [foreign.hmr2_person(made)])
    foreign.write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    link = tarfile.TarInfo("k.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    cases = {
        "it is cut or damaged": whole[:2000],
        "is no uncompressed tar": b"\x1f\x8b" + whole[2:],
        "is no plain file": link.tobuf() + bytes(1024),
        "it takes a picture and .data.pyd": None,
        "must have shape (44, 3), got (1, 3)": None,
        "must hold a list of dictionaries": None,
    }
    for message, content in cases.items():
        if content is not None:
            (tmp_path / "a.tar").write_bytes(content)
        elif "picture" in message:
            foreign.write_tar(tmp_path / "a.tar", {"k.jpg": members["k.jpg"]})
        else:
            person = foreign.hmr2_person(made, keypoints_2d=np.zeros((1, 3)))
            labels = pickle.dumps([person] if "shape" in message else person)
            foreign.write_tar(tmp_path / "a.tar", members | {"k.data.pyd": labels})
        assert run("4dhumans", tmp_path, tmp_path / "out") == 2, message
        assert message in capsys.readouterr().err


# ---- AMASS ----------------------------------------------------------------------------------------------------------


def test_amass_is_packed_z_up_to_y_up_at_thirty_frames_a_second(
    tmp_path: Path, free_body: BodyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign.take(free_body, frames=120, seed=3, up="z", still=True)
    root = tmp_path / "AMASS"
    foreign.write_amass(root / "CMU/01/01_01_poses.npz", made)
    foreign.write_amass(root / "CMU/01/short_poses.npz", replace(made, pose=made.pose[:90], trans=made.trans[:90]))
    np.savez(root / "CMU/01/shape.npz", betas=np.zeros(16))
    (root / "CMU/01/cut_poses.npz").write_bytes(b"PK")
    with np.load(root / "CMU/01/01_01_poses.npz") as labels:
        np.savez_compressed(damaged := root / "CMU/01/damaged_poses.npz", **labels)
    content = bytearray(damaged.read_bytes())
    content[100:108] = b"\xff" * 8
    damaged.write_bytes(content)

    assert run("amass", root, tmp_path / "out", "--dry-run") == 0
    assert "1 subsets, 5 files, 30 frames at 30 fps" in capsys.readouterr().out
    assert run("amass", root, tmp_path / "out", "--dry-run", "--part", "2/2") == 0
    assert "part 2 of 2 has nothing to do" in capsys.readouterr().out
    assert run("amass", root, tmp_path / "out", "--max_unusable", "0.3") == 2
    error = capsys.readouterr().err
    assert "2 of 5 tracks have labels that cannot be used (" in error and "cut_poses.npz cannot be read" in error
    assert "damaged_poses.npz cannot be unpacked" in error
    assert not (tmp_path / "out/CMU.npz").exists()
    assert run("amass", root, tmp_path / "out", "--max_unusable", "0.4") == 0
    report = Report.read(tmp_path / "out")
    assert (report.clips, report.frames) == (1, 30)
    assert report.dropped == {
        "shorter than 25 frames": 1, "a body's shape, no motion": 1, "labels that cannot be used": 2,
    }  # fmt: skip
    packed = MotionFolder(tmp_path / "out")
    motion = packed.window(0, 30, 30.0, np.random.default_rng(0))
    # the same joints but for heading and place: distances between joints over time tell
    rows = foreign.Take(
        free_body, motion.pose.astype(float), motion.translation.astype(float), np.zeros(10),
        np.tile(np.eye(4), (30, 1, 1)), made.intrinsics, SIZE,
    )  # fmt: skip
    ours, theirs = rows.joints.reshape(-1, 3), made.joints[::4].reshape(-1, 3)
    ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
    gram = np.abs(ours @ ours.T - theirs @ theirs.T).max()
    assert gram < 2e-4
    before = (tmp_path / "out/CMU.npz").stat().st_mtime_ns
    assert run("amass", root, tmp_path / "out", "--max_unusable", "0.4") == 0
    assert (tmp_path / "out/CMU.npz").stat().st_mtime_ns == before
    assert Report.read(tmp_path / "out") == report
    assert run("amass", root, tmp_path / "out") == 2  # as strict as when it was not finished


def test_amass_without_any_motion_is_an_error_and_names_few_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        (file := tmp_path / f"AMASS/CMU/01/{number}_poses.npz").parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"junk")
    assert run("amass", tmp_path / "AMASS", tmp_path / "out") == 2
    assert "7 of 7 tracks have labels that cannot be used" in capsys.readouterr().err
    assert run("amass", tmp_path / "AMASS", tmp_path / "out", "--max_unusable", "1") == 2
    assert "no motion could be packed: " in capsys.readouterr().err
    report = Report.read(tmp_path / "out")
    assert report.dropped == {"labels that cannot be used": 7}
    (named,) = report.named.values()
    assert len(named) == 5 and "0_poses.npz cannot be read" in named[0]
