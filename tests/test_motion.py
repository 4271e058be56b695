"""Motion, the sources' common face, and the quaternions they are blended with."""

from __future__ import annotations

import numpy as np
import pytest

from fasthmr.data.synth.motion import Motion, MotionError, load_motion_source
from fasthmr.data.synth.procedural import ProceduralMotion
from fasthmr.data.synth.quaternions import (
    about,
    from_axes,
    from_rotvec,
    from_swing_twist,
    inverse,
    multiply,
    resample,
    rotate,
    slerp,
    swing_twist,
    to_rotvec,
)


def random_rotations(n: int, most: float = 3.1) -> np.ndarray:
    rng = np.random.default_rng(0)
    axis = rng.normal(size=(n, 3))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    return axis * rng.uniform(0, most, (n, 1))


def test_a_motion_checks_itself():
    pose, translation = np.zeros((5, 24, 3), np.float32), np.zeros((5, 3), np.float32)
    assert len(Motion(pose, translation, 30.0, "still")) == 5
    with pytest.raises(MotionError, match=r"'short': pose must be float32 \(5, 24, 3\), got float32 \(4, 24, 3\)"):
        Motion(pose[:4], translation, 30.0, "short")
    with pytest.raises(MotionError, match="float64"):
        Motion(pose.astype(np.float64), translation, 30.0, "wide")
    broken = translation.copy()
    broken[3, 1] = np.nan
    with pytest.raises(MotionError, match="translation is not finite in frame 3"):
        Motion(pose, broken, 30.0, "broken")
    with pytest.raises(MotionError, match="fps"):
        Motion(pose, translation, 0.0, "stopped")


def test_sources_are_chosen_by_name_or_path(tmp_path):
    assert isinstance(load_motion_source("procedural"), ProceduralMotion)
    with pytest.raises(MotionError, match="give a folder of AMASS npz files"):
        load_motion_source(str(tmp_path / "nothing"))


def test_quaternions_turn_vectors_like_the_rotation_matrix():
    quarter = about(2, np.pi / 2)
    np.testing.assert_allclose(rotate(quarter, np.array([1.0, 0, 0])), [0, 1, 0], atol=1e-12)
    first, second = from_rotvec(random_rotations(50)), from_rotvec(random_rotations(50)[::-1])
    vector = np.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(rotate(multiply(first, second), vector), rotate(first, rotate(second, vector)))
    np.testing.assert_allclose(to_rotvec(first), random_rotations(50), atol=1e-12)
    np.testing.assert_allclose(to_rotvec(multiply(first, inverse(first))), 0, atol=1e-12)


def test_from_axes_sends_x_and_y_where_they_are_told():
    turn = from_rotvec(random_rotations(50))
    x, y = rotate(turn, np.array([1.0, 0, 0])), rotate(turn, np.array([0, 1.0, 0]))
    found = from_axes(2.0 * x, y + 0.7 * x)
    np.testing.assert_allclose(np.abs((found * turn).sum(-1)), 1.0)


def test_slerp_takes_the_shorter_arc_at_constant_speed():
    start, end = about(0, np.array(0.2)), -about(0, np.array(1.4))  # the sign of a quaternion means nothing
    for weight in (0.0, 0.25, 1.0):
        np.testing.assert_allclose(
            to_rotvec(slerp(start, end, np.array(weight))), [0.2 + 1.2 * weight, 0, 0], atol=1e-9
        )


def test_resampling_reads_rows_at_whole_times_exactly():
    track = from_rotvec(random_rotations(7))
    np.testing.assert_allclose(resample(track, np.array([0.0, 3.0, 6.0])), track[[0, 3, 6]], atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_swing_and_twist_come_apart_and_together(axis):
    turns = from_rotvec(random_rotations(100, most=2.5))
    np.testing.assert_allclose(
        np.abs((from_swing_twist(swing_twist(turns, axis), axis) * turns).sum(-1)), 1.0, atol=1e-12
    )
    np.testing.assert_allclose(swing_twist(about(axis, np.array(0.6)), axis), 0.6 * np.eye(3)[axis], atol=1e-12)
