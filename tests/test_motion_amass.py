"""Recorded motions in AMASS's layouts end up on the floor, y up, at the wanted rate; what is wrong is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fasthmr.conventions import JOINT_INDEX, PELVIS
from fasthmr.data.synth.amass import MotionFolder
from fasthmr.data.synth.motion import Motion, MotionError
from fasthmr.data.synth.quaternions import from_rotvec, multiply, rotate, to_rotvec
from fasthmr.data.synth.skeleton import free_skeleton

SHARED = Path(os.environ.get("FASTHMR_SHARED", Path(__file__).parents[2] / "shared"))
PACK = SHARED / "data/mocap/cmu_train.npz"

#: SMPL's rest pelvis is not at the origin: the pelvis of a recorded body is this + trans, in the z-up world.
REST_PELVIS = np.array((-0.002, -0.23, 0.03))


def walker(frames: int, fps: float, width: int) -> dict[str, np.ndarray]:
    """Someone facing -y in a z-up world who glides along -y at 1 m/s, one elbow bending at 1 rad/s."""
    seconds = np.arange(frames) / fps
    poses = np.zeros((frames, width // 3, 3))
    poses[:, 0] = (np.pi / 2, 0, 0)  # y up -> z up: the body's forward +z becomes -y
    poses[:, JOINT_INDEX["left_elbow"], 1] = -seconds
    if width == 156:
        poses[:, 22], poses[:, 37] = (0, 0, 0.3), (0, 0, -0.4)
    if width == 165:
        poses[:, 25], poses[:, 40] = (0, 0, 0.3), (0, 0, -0.4)
        poses[:, 22:25] = 0.9  # jaw and eyes: no joints of SMPL's
    if width == 72:
        poses[:, 22], poses[:, 23] = (0, 0, 0.3), (0, 0, -0.4)
    pelvis = np.stack((0 * seconds + 3.0, 7.0 - seconds, 0 * seconds + 0.95), axis=-1)
    return {"poses": poses.reshape(frames, width), "trans": pelvis - REST_PELVIS}


def write(path: Path, width: int, frames: int = 240, fps: float = 120.0, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = "mocap_frame_rate" if width == 165 else "mocap_framerate"
    np.savez(path, **(walker(frames, fps, width) | {rate: np.array(fps), "gender": np.array(b"male")} | more))
    return path


def joints(motion: Motion) -> np.ndarray:
    skeleton = free_skeleton()
    _, position = skeleton.forward(from_rotvec(motion.pose.astype(np.float64)))
    return position + (skeleton.rest[PELVIS] + motion.translation)[:, None]


@pytest.mark.parametrize(
    ("file", "width"), [("a_poses.npz", 156), ("b_stageii.npz", 165), ("c.npz", 72)], ids=["smplh", "smplx", "smpl"]
)
def test_someone_standing_z_up_ends_standing_y_up_in_all_three_layouts(tmp_path, file, width):
    write(tmp_path / "SUBSET/subject" / file, width)
    motion = MotionFolder(tmp_path).window(0, 30, 30.0, np.random.default_rng(0))

    assert motion.name.startswith("SUBSET/subject/") and motion.pose.shape == (30, 24, 3)
    at = joints(motion)
    assert (at[:, JOINT_INDEX["head"], 1] > 1.3).all()
    feet = at[:, [JOINT_INDEX["left_foot"], JOINT_INDEX["right_foot"]], 1]
    assert (feet > 0.0).all() and (feet < 0.06).all()
    np.testing.assert_allclose(at[:, PELVIS][:, [0, 2]].mean(0), 0, atol=1e-5)
    # It glides where it faces, at 1 m/s.
    forward = rotate(from_rotvec(motion.pose[0, 0].astype(np.float64)), np.array((0.0, 0, 1)))
    glide = (at[-1, PELVIS] - at[0, PELVIS]) * 30 / 29
    np.testing.assert_allclose(glide, forward, atol=1e-4)
    assert abs(forward[1]) < 1e-6
    # The hands come from the right places.
    np.testing.assert_allclose(motion.pose[:, 22], np.tile((0, 0, 0.3), (30, 1)), atol=1e-6)
    np.testing.assert_allclose(motion.pose[:, 23], np.tile((0, 0, -0.4), (30, 1)), atol=1e-6)


@pytest.mark.parametrize("wanted", [30.0, 25.0, 50.0])
def test_a_clip_is_resampled_to_the_wanted_rate(tmp_path, wanted):
    source = MotionFolder(write(tmp_path / "a_poses.npz", 156, frames=241, fps=120.0))
    frames = int(wanted)
    motion = source.window(1, frames, wanted, np.random.default_rng(0))
    seconds = (frames + np.arange(frames)) / wanted  # the second window starts where the first one ended
    np.testing.assert_allclose(motion.pose[:, JOINT_INDEX["left_elbow"], 1], -seconds, atol=1e-5)
    assert motion.fps == wanted


def test_a_file_may_say_that_it_is_y_up(tmp_path):
    upright = walker(60, 30.0, 72)
    upright["poses"][:, :3] = 0
    upright["trans"] = upright["trans"][:, [0, 2, 1]]
    write(tmp_path / "a.npz", 72, frames=60, fps=30.0, up_axis=np.array("y"), **upright)
    motion = MotionFolder(tmp_path).window(0, 60, 30.0, np.random.default_rng(0))
    assert (joints(motion)[:, JOINT_INDEX["head"], 1] > 1.3).all()


def test_windows_tile_every_clip_and_rng_only_turns_them(tmp_path):
    write(tmp_path / "a_poses.npz", 156, frames=100, fps=30.0)
    write(tmp_path / "b_poses.npz", 156, frames=70, fps=30.0)
    source = MotionFolder(tmp_path)
    expected = [("a_poses", 0), ("a_poses", 32), ("a_poses", 64), ("b_poses", 0), ("b_poses", 32)]
    assert source.sequences(32, 30.0) == expected
    assert source.num_windows(32, 30.0) == 5
    one, two = (source.window(1, 32, 30.0, np.random.default_rng(seed)) for seed in (0, 1))
    assert one.name == two.name == "a_poses@32"
    np.testing.assert_array_equal(one.pose[:, 1:], two.pose[:, 1:])
    turned = multiply(from_rotvec(two.pose[:, 0].astype(np.float64)), from_rotvec(-one.pose[:, 0].astype(np.float64)))
    assert np.ptp(to_rotvec(turned)[:, 1]) < 1e-5 and np.abs(to_rotvec(turned)[:, [0, 2]]).max() < 1e-5
    with pytest.raises(IndexError, match="window 5 of 5"):
        source.window(5, 32, 30.0, np.random.default_rng(0))


def test_samples_are_a_function_of_rng_and_reach_every_long_enough_clip(tmp_path):
    write(tmp_path / "long_poses.npz", 156, frames=120, fps=30.0)
    write(tmp_path / "short_poses.npz", 156, frames=40, fps=30.0)
    source = MotionFolder(tmp_path)
    first, again = (source.sample(np.random.default_rng(7), 20, 30.0) for _ in range(2))
    np.testing.assert_array_equal(first.pose, again.pose)
    names = [source.sample(np.random.default_rng(seed), 35, 30.0).name for seed in range(80)]
    clips = [name.split("@")[0] for name in names]
    assert set(clips) == {"long_poses", "short_poses"} and clips.count("long_poses") > clips.count("short_poses")
    assert {source.sample(np.random.default_rng(seed), 41, 30.0).name.split("@")[0] for seed in range(20)} == {
        "long_poses"
    }
    described = source.describe(41, 30.0)
    assert (described["clips"], described["usable_clips"], described["windows"]) == (2, 1, 2)


def test_no_clip_long_enough_names_the_longest(tmp_path):
    write(tmp_path / "a_poses.npz", 156, frames=100, fps=30.0)
    source = MotionFolder(tmp_path)
    message = "no clip is long enough for 101 frames at 30 fps; the longest, 'a_poses', has 100"
    with pytest.raises(MotionError, match=message):
        source.sample(np.random.default_rng(0), 101, 30.0)
    with pytest.raises(MotionError, match=message):
        source.window(0, 101, 30.0, np.random.default_rng(0))


def test_shape_files_and_clips_under_25_frames_are_left_out(tmp_path):
    write(tmp_path / "a_poses.npz", 156, frames=120, fps=120.0)
    write(tmp_path / "tiny_poses.npz", 156, frames=80, fps=120.0)  # 20 frames at 30 fps
    np.savez(tmp_path / "shape.npz", betas=np.zeros(16))
    np.savez(tmp_path / "neutral_stagei.npz", betas=np.zeros(16))
    described = MotionFolder(tmp_path).describe()
    assert (described["clips"], described["clips_under_25_frames"], described["files_without_motion"]) == (1, 1, 2)


def test_a_pack_holds_many_clips(tmp_path):
    clips = np.array(["one", "two"])
    write(
        tmp_path / "pack.npz", 72, frames=90, fps=30.0, clip=clips, start=np.array([0, 30, 90]), up_axis=np.array("z")
    )
    source = MotionFolder(tmp_path / "pack.npz")
    assert source.sequences(30, 30.0) == [("pack/one", 0), ("pack/two", 0), ("pack/two", 30)]
    elbow = source.window(1, 30, 30.0, np.random.default_rng(0)).pose[0, JOINT_INDEX["left_elbow"]]
    np.testing.assert_allclose(elbow, (0, -1.0, 0), atol=1e-5)
    write(tmp_path / "pack.npz", 72, frames=90, fps=30.0, clip=clips, start=np.array([0, 30]))
    with pytest.raises(MotionError, match="start must rise from 0 to 90 in 3 numbers"):
        MotionFolder(tmp_path / "pack.npz")


def test_broken_files_are_named(tmp_path):
    with pytest.raises(MotionError, match="holds no motions"):
        MotionFolder(tmp_path)
    file = tmp_path / "a_poses.npz"
    np.savez(file, poses=np.zeros((60, 156)), betas=np.zeros(16))
    with pytest.raises(MotionError, match=r"a_poses\.npz: no trans and no mocap_framerate; found betas, poses"):
        MotionFolder(tmp_path)
    write(file, 156, trans=np.zeros((7, 3)))
    with pytest.raises(MotionError, match=r"a_poses\.npz: trans has shape \(7, 3\), expected \(240, 3\)"):
        MotionFolder(tmp_path)
    write(file, 156, poses=np.zeros((240, 60)))
    with pytest.raises(MotionError, match=r"poses has shape \(240, 60\), expected one of \(N, 72\)"):
        MotionFolder(tmp_path)
    write(file, 156, mocap_framerate=np.array(0.0))
    with pytest.raises(MotionError, match=r"mocap_framerate is 0\.0"):
        MotionFolder(tmp_path)
    file.write_bytes(write(file, 156).read_bytes()[:5000])
    with pytest.raises(MotionError, match=r"a_poses\.npz cannot be read as npz"):
        MotionFolder(tmp_path)


def test_a_number_that_is_not_finite_is_found(tmp_path):
    data = walker(60, 30.0, 156)
    data["poses"][40, 5] = np.nan
    write(tmp_path / "a_poses.npz", 156, frames=60, fps=30.0, **data)
    with pytest.raises(MotionError, match=r"a_poses\.npz: poses is not finite in row 40"):
        MotionFolder(tmp_path).window(0, 60, 30.0, np.random.default_rng(0))


def test_the_fingerprint_follows_the_content(tmp_path):
    file = write(tmp_path / "a_poses.npz", 156)
    before = MotionFolder(tmp_path).fingerprint()
    assert before == MotionFolder(tmp_path).fingerprint()
    data = walker(240, 120.0, 156)
    data["trans"][0] += 1e-3
    write(file, 156, **data)
    assert MotionFolder(tmp_path).fingerprint() != before


@pytest.mark.skipif(not PACK.exists(), reason=f"no CMU pack at {PACK}; set FASTHMR_SHARED to the folder that has one")
def test_the_cmu_pack_reads():
    source = MotionFolder(PACK)
    assert len(source) == 315
    heads = []
    for seed in range(30):
        motion = source.sample(np.random.default_rng(seed), 30, 30.0)
        heads.append(np.median(joints(motion)[:, JOINT_INDEX["head"], 1]))
    assert 1.2 < np.median(heads) < 1.7
