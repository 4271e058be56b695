"""Every format there and back: our body, filmed into a set of that format, comes back where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import foreign_sets as foreign
import numpy as np
import pytest
import torch

from fasthmr.body import BodyModel, load_body
from fasthmr.conventions import JOINT_INDEX, MASK_OTHER, MASK_SUBJECT
from fasthmr.data.convert.mpi_inf_3dhp import MpiInf3dhp
from fasthmr.data.convert.reading import ConvertError
from fasthmr.data.schema import Clip
from fasthmr.data.shards import ClipStore, verify_shards
from fasthmr.data.sheet import draw_mesh
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.shard import main

#: a tenth of a millimetre
CLOSE_M = 1e-4


@pytest.fixture(scope="module")
def gendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return foreign.gendered_body_files(tmp_path_factory.mktemp("bodies"))


def convert(name: str, root: Path, out: Path, *options: str, gendered: dict[str, Path] | None = None) -> list[Clip]:
    bodies = [f"--body_{gender}={path}" for gender, path in (gendered or {}).items()]
    command = ["convert", name, "--root", str(root), "--out", str(out), "--workers", "1", *bodies, *options]
    assert main(command) == 0
    assert verify_shards(out) == []
    return list(ClipStore(out))


def mesh_of(clip: Clip, body: BodyModel):
    with torch.no_grad():
        return body(
            axis_angle_to_matrix(torch.from_numpy(clip.pose)),
            torch.from_numpy(clip.betas).expand(len(clip), -1),
            torch.from_numpy(clip.translation),
        )


def assert_is_back(clip: Clip, made: foreign.Take, frames: slice = slice(None)) -> None:
    """Mesh and joints in the camera, their pixels, and the mesh on the stored picture."""
    posed = mesh_of(clip, made.body)
    assert np.abs(posed.vertices.numpy() - made.vertices[frames]).max() < CLOSE_M
    assert np.abs(clip.joints3d[..., :3] - made.joints[frames]).max() < CLOSE_M
    assert np.abs(clip.joints2d[..., :2] - made.pixels(made.joints[frames])).max() < 0.02
    assert clip.joints2d[..., 2].min() == 1 and clip.valid.all()
    assert clip.image_size.tolist() == list(made.size)
    assert np.abs(clip.intrinsics - made.intrinsics).max() < 1e-4
    assert_on_picture(clip, made.body)


def assert_on_picture(clip: Clip, body: BodyModel) -> None:
    for frame in range(len(clip)):
        image = clip.frames.decode(frame)
        shown = image[..., 1] > 120
        drawn = draw_mesh(clip, frame, np.zeros_like(image), body, opacity=1.0).any(-1)
        assert (shown & drawn).sum() / (shown | drawn).sum() > 0.94


def assert_box_around(clip: Clip, made: foreign.Take) -> None:
    """The tight square box, to a hundredth."""
    low, high = made.boxes[:, :2], made.boxes[:, 2:]
    side = (high - low).max(1)
    assert np.abs(clip.box_size / side - 1).max() < 0.02
    assert (np.abs(clip.box_center - (low + high) / 2) / side[:, None]).max() < 0.01


# ---- 3DPW: gendered bodies, a moving camera in a world, two people, frames that are not valid -----------------------


def test_threedpw(tmp_path: Path, gendered: dict[str, Path]) -> None:
    man = foreign.take(load_body(gendered["male"]), seed=1)
    woman = foreign.take(load_body(gendered["female"]), seed=2)
    woman.trans[:] += [0.9, 0, 0]
    valid = np.ones((2, 4))
    valid[1, 2] = 0
    foreign.write_threedpw(tmp_path, [man, woman], ["m", "f"], valid)
    clips = convert("threedpw", tmp_path, tmp_path / "out", gendered=gendered)

    assert [c.key for c in clips] == ["3dpw-downtown_test_00_0", "3dpw-downtown_test_00_1"]
    assert [c.gender for c in clips] == ["male", "female"]
    assert [c.body for c in clips] == [man.body.id, woman.body.id]
    assert ClipStore(tmp_path / "out").manifest.body == load_body("free").id
    assert_is_back(clips[0], man)
    assert_box_around(clips[0], man)
    assert clips[1].valid.tolist() == [True, True, False, True]
    good = clips[1].valid
    assert np.abs(mesh_of(clips[1], woman.body).vertices.numpy() - woman.vertices)[good].max() < CLOSE_M
    # with the wrong body it would be centimetres away: the test can tell
    assert np.abs(mesh_of(clips[1], man.body).vertices.numpy() - woman.vertices[:, :])[good].max() > 0.01
    assert {clips[0].status[n] for n in ("pose", "betas", "joints2d", "intrinsics")} == {"ground_truth"}
    assert clips[0].status["masks"] == "missing"


# ---- EMDB: portrait pictures, the set's boxes, and the mesh's where those are invalid -------------------------------


@pytest.mark.parametrize("up", ["y", "z"])
def test_emdb(tmp_path: Path, gendered: dict[str, Path], up: str) -> None:
    made = foreign.take(load_body(gendered["female"]), seed=3, size=(240, 320), up=up)
    wide = made.boxes + np.array([-10, -10, 10, 10])
    wide[1] = 0
    mask = np.array([True, True, True, False])
    boxes = {"bboxes": wide, "invalid_idxs": np.array([1])}
    foreign.write_emdb(tmp_path, made, bboxes=boxes, good_frames_mask=mask)
    foreign.write_emdb(tmp_path, made, "10_indoor", emdb1=False)
    (clip,) = convert("emdb", tmp_path, tmp_path / "out", gendered=gendered)

    assert clip.key == "emdb-P0_09_outdoor_walk" and clip.gender == "female"
    assert clip.valid.tolist() == mask.tolist()
    posed = mesh_of(clip, made.body)
    assert np.abs(posed.vertices.numpy() - made.vertices).max() < CLOSE_M
    assert_on_picture(clip, made.body)
    side = (made.boxes[:, 2:] - made.boxes[:, :2]).max(1)
    assert clip.box_size[0] == pytest.approx(side[0] + 20, abs=0.01)
    assert clip.box_size[1] == pytest.approx(side[1], rel=0.02)  # the mesh's
    assert len(convert("emdb", tmp_path, tmp_path / "all", "--split", "all", gendered=gendered)) == 2


# ---- BEDLAM: portrait rotation, every fifth frame, cam_ext, layered masks, SMPL-X, zooms ----------------------------


@pytest.mark.parametrize("scene", ["20221010_3_1000_batch01hand_6fps", "20221010_closeup_6fps", "b2_portrait_a"])
def test_bedlam(tmp_path: Path, free_body: BodyModel, scene: str) -> None:
    size = (320, 240) if "batch01" in scene else (240, 320)
    made = foreign.take(free_body, seed=4, size=size)
    foreign.write_bedlam(tmp_path, scene, made, with_masks=True)
    (clip,) = convert("bedlam", tmp_path, tmp_path / "out")
    assert_is_back(clip, made)
    assert_box_around(clip, made)
    assert clip.fps == 6
    for frame in range(len(clip)):
        mask = clip.masks.decode(frame)
        image = clip.frames.decode(frame)
        shown = image[..., 1] > 120
        assert (shown & (mask == MASK_SUBJECT)).sum() / (shown | (mask == MASK_SUBJECT)).sum() > 0.94
    assert clip.status["masks"] == "ground_truth"


def test_bedlam_tracks_are_cut_at_gaps_and_zooms(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, frames=6, seed=4)
    names = [f"seq_000000/seq_000000_{i:04d}.png" for i in (0, 5, 10, 20, 25, 30)]
    zoom = np.tile(made.intrinsics, (6, 1, 1))
    zoom[5, :2] *= 1.1
    foreign.write_bedlam(tmp_path, "scene", made, imgname=np.array(names), cam_int=zoom)
    for name, image in zip(names, made.images, strict=True):
        foreign.write_picture(tmp_path / "images/scene/png" / name, image)
    clips = convert("bedlam", tmp_path, tmp_path / "out")
    assert [len(c) for c in clips] == [3, 2, 1]
    assert_is_back(clips[1], made, slice(3, 5))
    assert clips[2].intrinsics[0, 0] == pytest.approx(1.1 * made.intrinsics[0, 0])


def test_bedlam_gendered_shapes_and_smplx(tmp_path: Path, gendered: dict[str, Path], free_body: BodyModel) -> None:
    made = foreign.take(load_body(gendered["male"]), seed=5)
    foreign.write_bedlam(tmp_path, "gendered", made, gender=np.array(["male"] * 4))
    neutral = foreign.take(free_body, seed=6)
    with_kid = np.concatenate([np.tile(neutral.betas, (4, 1)), np.zeros((4, 1))], 1)
    foreign.write_bedlam(tmp_path, "neutral", neutral, gender=np.array(["male"] * 4), shape=with_kid)
    smplx = np.zeros((4, 55, 3))
    smplx[:, :22] = neutral.pose_in_camera[:, :22]
    smplx[:, 22:] = 0.5
    foreign.write_bedlam(tmp_path, "smplx", neutral, pose_cam=smplx.reshape(4, 165))
    clips = convert("bedlam", tmp_path, tmp_path / "out", gendered=gendered)

    assert [c.gender for c in clips] == ["male", "neutral", "neutral"]
    assert_is_back(clips[0], made)
    assert_is_back(clips[1], neutral)
    clip = clips[2]
    assert clip.status["pose"] == "pseudo" and clip.status["betas"] == clip.status["joints3d"] == "missing"
    assert np.abs(clip.pose[:, :22] - neutral.pose_in_camera[:, :22]).max() < 1e-5 and not clip.pose[:, 22:].any()
    assert np.abs(clip.joints2d[:, :22, :2] - neutral.pixels(neutral.joints)[:, :22]).max() < 0.02


def test_bedlam2s_sixteen_shapes_are_cut_and_pseudo_unless_the_rest_is_zero(
    tmp_path: Path, free_body: BodyModel
) -> None:
    made = foreign.take(free_body, seed=5)
    for scene, rest in (("sixteen", 0.5), ("ten", 0.0)):
        shape = np.tile(np.append(made.betas, np.full(6, rest)), (4, 1))
        foreign.write_bedlam(tmp_path, scene, made, step=1, shape=shape)
    sixteen, ten = sorted(convert("bedlam", tmp_path, tmp_path / "out"), key=lambda clip: "ten" in clip.key[:4])
    for clip in (sixteen, ten):
        assert_is_back(clip, made)
        assert np.abs(clip.betas - made.betas).max() < 1e-6 and clip.fps == 30
    of_shape = ("betas", "translation", "joints3d", "joints2d")
    assert {sixteen.status[name] for name in of_shape} == {"pseudo"}
    assert {ten.status[name] for name in of_shape} == {sixteen.status["pose"]} == {"ground_truth"}


def test_camerahmr_rows_are_stills(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, seed=7)
    foreign.write_camerahmr(tmp_path, made)
    clips = convert("camerahmr", tmp_path, tmp_path / "out")
    assert [len(c) for c in clips] == [1, 1, 1, 1]
    for i, clip in enumerate(clips):
        assert_is_back(clip, made, slice(i, i + 1))
        assert clip.status["pose"] == "pseudo" and clip.status["intrinsics"] == "ground_truth"


# ---- 4D-Humans: stills without a camera ------------------------------------------------------------------------------


def test_hmr2_tars(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, seed=8)
    two = [foreign.hmr2_person(made, 0), foreign.hmr2_person(made, 0, has_body_pose=0.0, has_betas=0.0)]
    members = foreign.hmr2_members("000001", made, 0, two)
    members |= foreign.hmr2_members("sub/000002", made, 1, [foreign.hmr2_person(made, 1)], with_masks=False)
    foreign.write_tar(tmp_path / "coco-train/000000.tar", members)
    clips = convert("4dhumans", tmp_path, tmp_path / "out")

    assert [len(c) for c in clips] == [1, 1, 1]
    first, second, third = clips
    assert first.status == {
        "joints2d": "pseudo", "joints3d": "pseudo", "pose": "pseudo", "betas": "pseudo", "translation": "missing",
        "masks": "ground_truth", "intrinsics": "missing",
    }  # fmt: skip
    assert np.abs(first.pose - made.pose_in_camera[:1]).max() < 1e-5
    assert np.abs(first.betas - made.betas).max() < 1e-6
    assert second.status["pose"] == "missing" and second.body is None
    assert third.status["masks"] == "missing"
    known = [JOINT_INDEX[n] for n in ("pelvis", "neck", "left_hip", "right_hip", "left_ankle", "right_ankle")]
    for clip, frame in ((first, 0), (second, 0), (third, 1)):
        assert np.abs(clip.joints2d[0, known, :2] - made.pixels(made.joints)[frame, known]).max() < 0.02
        assert np.allclose(clip.joints2d[0, known, 2], 0.9)
        assert clip.joints2d[0, JOINT_INDEX["spine1"], 2] == 0
        relative = made.joints[frame] - made.joints[frame, 0]
        assert np.abs(clip.joints3d[0, known, :3] - relative[known]).max() < CLOSE_M
    mask = first.masks.decode(0)
    drawn = cv2.warpAffine(made.masks[0].astype(np.uint8), first.crop_from_image[0], mask.shape)
    assert ((mask == MASK_SUBJECT) == drawn).mean() > 0.99 and (mask == MASK_OTHER).any()


# ---- Human3.6M and MPI-INF-3DHP -------------------------------------------------------------------------------------


@pytest.mark.parametrize("joints", [24, 29])
def test_h36m_of_hybrik(tmp_path: Path, free_body: BodyModel, joints: int) -> None:
    made = foreign.take(free_body, seed=9, still=True)
    foreign.write_h36m_hybrik(tmp_path, made, joints)
    (clip,) = convert("h36m", tmp_path, tmp_path / "out")
    assert_is_back(clip, made)
    assert_box_around(clip, made)
    assert clip.fps == 5 and clip.status["pose"] == "pseudo" and clip.status["intrinsics"] == "ground_truth"


def test_a_fit_whose_shape_changes_gets_one_shape_and_keeps_its_pelvis(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, seed=9, still=True)
    betas = made.betas + np.linspace(-0.5, 0.5, 4)[:, None]
    foreign.write_h36m_hybrik(tmp_path, made, betas=betas)
    (clip,) = convert("h36m", tmp_path, tmp_path / "out")
    assert clip.status["betas"] == "pseudo"
    assert np.abs(clip.betas - betas.mean(0)).max() < 1e-6
    assert np.abs(mesh_of(clip, free_body).joints[:, 0].numpy() - made.joints[:, 0]).max() < CLOSE_M


def test_h36m_of_neural_annot(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, seed=10, still=True, up="z")
    foreign.write_h36m_neural_annot(tmp_path, made)
    (clip,) = convert("h36m", tmp_path, tmp_path / "out")
    assert_is_back(clip, made)
    assert clip.fps == 25


def test_mpi_inf_3dhp_of_neural_annot(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, seed=11, still=True)
    foreign.write_3dhp_neural_annot(tmp_path, made)
    (clip,) = convert("mpi_inf_3dhp", tmp_path, tmp_path / "out")
    assert_is_back(clip, made)


@pytest.mark.parametrize(("kind", "write"), [("raw", foreign.write_3dhp_raw), ("hybrik", foreign.write_3dhp_hybrik)])
def test_mpi_inf_3dhp_joints(tmp_path: Path, free_body: BodyModel, kind: str, write) -> None:
    made = foreign.take(free_body, seed=12, still=True)
    write(tmp_path, made)
    (clip,) = convert("mpi_inf_3dhp", tmp_path, tmp_path / "out", "--split", kind)
    ours = list(foreign.OURS_OF_3DHP.values())
    assert np.abs(clip.joints3d[:, ours, :3] - made.joints[:, ours]).max() < CLOSE_M
    assert np.abs(clip.joints2d[:, ours, :2] - made.pixels(made.joints)[:, ours]).max() < 0.02
    assert (clip.joints3d[:, ours, 3] == 1).all() and clip.joints3d[..., 3].sum() == 4 * len(ours)
    assert clip.body is None and clip.status["pose"] == "missing"
    side = (made.boxes[:, 2:] - made.boxes[:, :2]).max(1)
    assert np.abs(clip.box_size / side - 1).max() < 0.15


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_picture_cannot_shift_the_labels_of_3dhp(tmp_path: Path, free_body: BodyModel, lost: int) -> None:
    foreign.write_3dhp_raw(tmp_path, foreign.take(free_body, seed=12, still=True))
    (tmp_path / f"S1/Seq1/imageFrames/video_1/frame_{lost:06d}.jpg").unlink()
    with pytest.raises(ConvertError, match=f"video_1 has no picture {lost}, but {lost + 1}"):
        MpiInf3dhp(tmp_path, "raw").open("S1/Seq1/annot.mat")


def test_cameras_that_share_a_folder_are_films_of_their_own(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, frames=2, seed=12, still=True)
    foreign.write_3dhp_hybrik(tmp_path, made)
    content = json.loads((annotations := next(tmp_path.glob("annotations/*.json"))).read_text())
    for image in content["images"][:]:
        second = image | {"id": image["id"] + 50, "file_name": image["file_name"].replace("_V0_", "_V1_")}
        content["images"].append(second)
        content["annotations"] += [
            a | {"image_id": second["id"]} for a in content["annotations"] if a["image_id"] == image["id"]
        ]
        shutil.copy(tmp_path / "images" / image["file_name"], tmp_path / "images" / second["file_name"])
    foreign.write_json(annotations, content)
    clips = convert("mpi_inf_3dhp", tmp_path, tmp_path / "out", "--split", "hybrik")
    assert [(clip.key, len(clip)) for clip in clips] == [(f"3dhp-S2-Seq1-img_S2_Seq1_V{i}__000001", 2) for i in (0, 1)]


def test_people_of_one_picture_and_pictures_of_one_name_are_clips_of_their_own(
    tmp_path: Path, free_body: BodyModel
) -> None:
    foreign.write_3dhp_spin(tmp_path, foreign.take(free_body, frames=2, seed=13))
    first = tmp_path / "annotations/mpi_inf_3dhp_train.npz"
    with np.load(first) as file:
        labels = dict(file)
    names = ["S1/Seq1/frame_000001.jpg", "S1/Seq1/frame_000001.jpg"]  # two people
    np.savez(first, **labels | {"imgname": np.array(names)})
    np.savez(first.with_name("more.npz"), **labels | {"imgname": np.array([n.replace("S1", "S2") for n in names])})
    shutil.copytree(tmp_path / "images/S1", tmp_path / "images/S2")
    clips = convert("mpi_inf_3dhp", tmp_path, tmp_path / "out", "--split", "spin")
    assert len({clip.key for clip in clips}) == 4
    assert [clip.source for clip in clips] == [f"3dhp:{n.replace('S1', s)}" for s in ("S2", "S1") for n in names]


def test_mpi_inf_3dhp_of_spin(tmp_path: Path, free_body: BodyModel) -> None:
    made = foreign.take(free_body, frames=2, seed=13)
    foreign.write_3dhp_spin(tmp_path, made)
    fitted, bare = convert("mpi_inf_3dhp", tmp_path, tmp_path / "out", "--split", "spin")
    assert np.abs(fitted.pose - made.pose_in_camera[:1]).max() < 1e-5
    assert fitted.status["translation"] == "missing" and bare.body is None
    knee = JOINT_INDEX["left_knee"]
    assert np.abs(bare.joints3d[0, knee, :3] - made.joints[1, knee]).max() < CLOSE_M
