"""Pure error functions and protocols equal the public evaluation codes (fixtures) and plain NumPy."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fasthmr.conventions import LEFT_HIP, RIGHT_HIP
from fasthmr.metrics import PROTOCOLS, BestConstantError, PoseErrors
from fasthmr.metrics.functional import acceleration_error, mpjpe, pa_mpjpe, pve
from fasthmr.metrics.protocols import H36M_REGRESSOR, H36M_TO_14, SPIN_TO_14
from fasthmr.metrics.regressor_file import find_regressor, read_regressor

MM = {"atol": 5e-4, "rtol": 0}  # the references are float32 too
ACCEL = {"atol": 2e-3, "rtol": 0}  # m/s^2; second differences of float32 metres, times 900


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parent / "fixtures" / "metrics.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def _h36m(joints14: torch.Tensor) -> torch.Tensor:
    """The regressor's 17 joints, of which only the 14 compared ones are known."""
    joints = torch.full((*joints14.shape[:-2], 17, 3), torch.nan)
    joints[..., list(H36M_TO_14), :] = joints14
    return joints


@pytest.fixture(scope="module", params=["emdb-24", "3dpw-14"])
def wham(request, oracle):
    """(expected values, predicted joints, true joints, predicted vertices, true vertices), rooted as WHAM does."""
    protocol = PROTOCOLS[request.param]
    folder = {"emdb-24": "emdb24", "3dpw-14": "tdpw14"}[request.param]
    expected = {key.removeprefix(folder + "/"): value for key, value in oracle.items() if key.startswith(folder)}
    full = _h36m if request.param == "3dpw-14" else torch.Tensor.clone
    pred, pred_vertices = protocol.align(full(expected["pred_j"]), expected["pred_v"])
    target, target_vertices = protocol.align(full(expected["gt_j"]), expected["gt_v"])
    return expected, pred, target, pred_vertices, target_vertices


def test_equals_wham(wham):
    expected, pred, target, pred_vertices, target_vertices = wham

    torch.testing.assert_close(mpjpe(pred, target), expected["mpjpe_mm"], **MM)
    torch.testing.assert_close(pa_mpjpe(pred, target), expected["pa_mpjpe_mm"], **MM)
    torch.testing.assert_close(pve(pred_vertices, target_vertices), expected["pve_mm"], **MM)


def test_acceleration_equals_wham(wham):
    expected, pred, target, *_ = wham
    values = acceleration_error(pred, target, fps=30)
    visible = expected["vis"]
    triples = visible[2:] & visible[1:-1] & visible[:-2]

    torch.testing.assert_close(values, 900 * expected["accel_per_frame_m_all"], **ACCEL)
    torch.testing.assert_close(values[1:-1], expected["accel_m_s2"], **ACCEL)
    torch.testing.assert_close(values[triples], 900 * expected["accel_vis_per_frame_m"], **ACCEL)


def test_equals_4d_humans(wham):
    expected, *_ = wham
    pred, target = expected["pred_j"], expected["gt_j"]

    rooted = mpjpe(pred - pred[:, :1], target - target[:, :1])

    torch.testing.assert_close(rooted, expected["hmr2_mpjpe_mm_root0"], **MM)
    torch.testing.assert_close(pa_mpjpe(pred, target), expected["hmr2_pampjpe_mm"], **MM)


def test_equals_emdbs_own_tool(oracle):
    protocol = PROTOCOLS["emdb-24"]
    pred, pred_vertices = protocol.align(oracle["emdb24/pred_j"], oracle["emdb24/pred_v"])
    target, target_vertices = protocol.align(oracle["emdb24/gt_j"], oracle["emdb24/gt_v"])

    torch.testing.assert_close(mpjpe(pred, target), oracle["emdbtool/mpjpe_pf"], **MM)
    torch.testing.assert_close(pa_mpjpe(pred, target).double(), oracle["emdbtool/mpjpe_pf_pa"], **MM)
    torch.testing.assert_close(pve(pred_vertices, target_vertices), oracle["emdbtool/mve_pf"], **MM)


def test_a_mirrored_body_is_not_forgiven(oracle):
    error = pa_mpjpe(oracle["reflect/pred"], oracle["reflect/gt"])
    expected = mpjpe(oracle["reflect/aligned"], oracle["reflect/gt"])

    torch.testing.assert_close(error, expected, atol=5e-3, rtol=0)
    assert (error > 100).all()


def test_equals_plain_numpy():
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 7, 24, 3))
    distance = np.zeros(7)
    acceleration = np.zeros(5)
    for t in range(7):
        for j in range(24):
            distance[t] += 1000 * np.sqrt(((pred[t, j] - target[t, j]) ** 2).sum()) / 24
    for t in range(5):
        for j in range(24):
            of_pred = pred[t + 2, j] - 2 * pred[t + 1, j] + pred[t, j]
            of_target = target[t + 2, j] - 2 * target[t + 1, j] + target[t, j]
            acceleration[t] += np.linalg.norm(of_pred - of_target) * 25**2 / 24

    pred, target = torch.from_numpy(pred), torch.from_numpy(target)
    np.testing.assert_allclose(mpjpe(pred, target), distance)
    np.testing.assert_allclose(acceleration_error(pred, target, fps=25), acceleration)


def test_constant_acceleration_in_metres_per_second_squared():
    time = torch.arange(10, dtype=torch.float64) / 50
    falling = torch.zeros(10, 24, 3, dtype=torch.float64)
    falling[..., 1] = (0.5 * 9.81 * time**2)[:, None]

    values = acceleration_error(falling, torch.zeros_like(falling), fps=50)

    torch.testing.assert_close(values, torch.full((8,), 9.81, dtype=torch.float64))


def test_leading_dimensions_are_kept():
    pred, target = torch.randn(2, 3, 4, 5, 24, 3)

    assert mpjpe(pred, target).shape == pa_mpjpe(pred, target).shape == (3, 4, 5)
    assert acceleration_error(pred, target, fps=30).shape == (3, 4, 3)
    torch.testing.assert_close(pa_mpjpe(pred, target)[1, 2], pa_mpjpe(pred[1, 2], target[1, 2]))


@pytest.mark.parametrize("error", [mpjpe, pa_mpjpe, pve])
def test_shapes_do_not_broadcast(error):
    with pytest.raises(ValueError, match="must both be"):
        error(torch.zeros(4, 24, 3), torch.zeros(1, 24, 3))


def test_acceleration_needs_three_frames_and_a_frame_rate():
    with pytest.raises(ValueError, match="3 or more frames"):
        acceleration_error(torch.zeros(2, 24, 3), torch.zeros(2, 24, 3), fps=30)
    with pytest.raises(ValueError, match="fps must be positive"):
        acceleration_error(torch.zeros(5, 24, 3), torch.zeros(5, 24, 3), fps=0)


# ---- protocols ------------------------------------------------------------


def test_protocols_remove_their_own_root_from_joints_and_vertices():
    joints17, joints19, vertices = torch.randn(2, 17, 3), torch.randn(2, 19, 3), torch.randn(2, 50, 3)
    roots = {
        "3dpw-14": joints17[:, [1, 4]].mean(1, keepdim=True),
        "3dpw-14-root0": joints17[:, :1],
        "3dpw-14-hmr2": joints19[:, [14]],
    }
    for name, root in roots.items():
        full = joints19 if name == "3dpw-14-hmr2" else joints17
        subset = SPIN_TO_14 if name == "3dpw-14-hmr2" else H36M_TO_14
        joints, moved = PROTOCOLS[name].align(full, vertices)
        torch.testing.assert_close(joints, full[:, list(subset)] - root)
        torch.testing.assert_close(moved, vertices - root)


def test_joints_are_regressed_from_vertices():
    regressor, vertices = torch.rand(17, 50), torch.randn(2, 3, 50, 3)

    joints = PROTOCOLS["3dpw-14"].select(torch.zeros(2, 3, 24, 3), vertices, regressor)

    torch.testing.assert_close(joints[1, 2], regressor @ vertices[1, 2])


def test_a_missing_regressor_says_where_to_get_it():
    with pytest.raises(ValueError, match=r"J_regressor_h36m \(17, 6890\), got none. It comes with SPIN's"):
        PoseErrors(PROTOCOLS["3dpw-14"])
    with pytest.raises(ValueError, match=r"SMPL_to_J19 \(19, 6890\)"):
        PROTOCOLS["3dpw-14-hmr2"].select(torch.zeros(1, 24, 3), torch.zeros(1, 6890, 3))


def test_a_regressor_is_found_beside_the_body_file_or_one_folder_up(tmp_path):
    (tmp_path / "smpl").mkdir()
    body = str(tmp_path / "smpl/SMPL_NEUTRAL.pkl")
    assert find_regressor(H36M_REGRESSOR, body) is None and find_regressor(H36M_REGRESSOR, "free") is None
    above, beside = tmp_path / "J_regressor_h36m.npy", tmp_path / "smpl/J_regressor_h36m.pkl"
    np.save(above, np.eye(17, 30))
    assert find_regressor(H36M_REGRESSOR, body) == above
    beside.write_bytes(pickle.dumps(np.eye(17, 30)))
    assert find_regressor(H36M_REGRESSOR, body) == beside
    for file in (above, beside):
        torch.testing.assert_close(read_regressor(file), torch.eye(17, 30))


def test_a_regressor_that_is_none(tmp_path):
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(print))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "archive.npy").write_bytes(b"PK\x03\x04 no archive")
    header = {"descr": "<f8", "fortran_order": False, "shape": (17, 10**12)}
    with (tmp_path / "huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    np.save(tmp_path / "nan.npy", np.full((17, 30), np.nan))
    for name, message in (
        ("hostile.pkl", "is no .npy or .pkl"),
        ("text.npy", "is no .npy or .pkl"),
        ("archive.npy", "is no .npy or .pkl"),
        ("huge.npy", "is no .npy or .pkl"),
        ("nan.npy", "NaN"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            read_regressor(tmp_path / name)


@pytest.mark.parametrize("name", ["emdb-24", "3dpw-14-root0"])
def test_the_shape_is_averaged_over_the_frames_that_count(name):
    betas = torch.randn(3, 4, 10)
    valid = torch.tensor([[True, False, True, False], [True] * 4, [False] * 4])
    betas[0, 1] = 1e3

    shape = PROTOCOLS[name].clip_betas(betas, valid)

    if name == "3dpw-14-root0":
        assert shape is betas
    else:
        torch.testing.assert_close(shape[0], ((betas[0, 0] + betas[0, 2]) / 2).expand(4, 10))
        torch.testing.assert_close(shape[1], betas[1].mean(0).expand(4, 10))
        assert not shape[2].any()


def test_a_body_that_is_not_smpl_is_refused_by_the_regressor():
    with pytest.raises(ValueError, match=r"got a regressor of \(17, 6890\) and 6600 vertices.*body-24"):
        PROTOCOLS["3dpw-14"].select(torch.zeros(1, 24, 3), torch.zeros(1, 6600, 3), torch.zeros(17, 6890))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_names_joints_regressor_root_and_frames(name):
    line = PROTOCOLS[name].describe()

    assert line.startswith(name) and "\n" not in line
    for word in ("joints", "regressor", "root", "ground truth", "predicted shape", "acceleration", "frames"):
        assert word in line


# ---- metrics over a data set ------------------------------------------------------------


def _sequences(clips: int, frames: int, vertices: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(clips)
    pred_joints, target_joints = torch.randn(2, clips, frames, 24, 3, generator=generator)
    pred_vertices, target_vertices = torch.randn(2, clips, frames, vertices, 3, generator=generator)
    return {
        "pred_joints": pred_joints,
        "target_joints": target_joints,
        "pred_vertices": pred_vertices,
        "target_vertices": target_vertices,
        "valid": torch.rand(clips, frames, generator=generator) > 0.1,
        "fps": torch.tensor([30.0, 25.0] * clips)[:clips],
    }


def test_pose_errors_pool_frames_over_sequences(oracle):
    inputs = {
        "pred_joints": oracle["emdb24/pred_j"][None],
        "target_joints": oracle["emdb24/gt_j"][None],
        "pred_vertices": oracle["emdb24/pred_v"][None],
        "target_vertices": oracle["emdb24/gt_v"][None],
        "valid": torch.ones(1, 40, dtype=torch.bool),
        "fps": torch.tensor([30.0]),
    }
    # Two sequences: all 40 frames, and the first 10 of them.
    metric = PoseErrors(PROTOCOLS["emdb-24"])
    metric.update(**inputs)
    metric.update(**{key: value if key == "fps" else value[:, :10] for key, value in inputs.items()})
    values = metric.compute()

    for key, name, shorter in (("pve_mm", "pve_mm", 10), ("mpjpe_mm", "mpjpe_mm", 10), ("accel_m_s2", "accel_m_s2", 6)):
        frames = oracle[f"emdb24/{key}"].double()
        torch.testing.assert_close(values[name], torch.cat([frames, frames[:shorter]]).mean(), atol=1e-3, rtol=0)


def test_invalid_frames_do_not_count_whatever_they_hold():
    inputs = _sequences(clips=3, frames=12)
    clean, dirty = PoseErrors(PROTOCOLS["body-24"]), PoseErrors(PROTOCOLS["body-24"])
    clean.update(**inputs)
    for key in ("pred_joints", "target_joints", "pred_vertices", "target_vertices"):
        inputs[key] = inputs[key].masked_fill(~inputs["valid"][..., None, None], torch.nan)
    dirty.update(**inputs)

    assert not inputs["valid"].all()
    assert dirty.compute() == clean.compute()
    assert all(value.isfinite() for value in dirty.compute().values())


@pytest.mark.parametrize("name", ["emdb-24", "body-24"])
def test_what_a_gap_does_to_the_acceleration(name):
    inputs = _sequences(clips=1, frames=10)
    inputs["valid"] = torch.tensor([[True] * 6 + [False] + [True] * 3])
    metric = PoseErrors(PROTOCOLS[name])
    metric.update(**inputs)

    hips = [LEFT_HIP, RIGHT_HIP]
    pred, target = (
        j[0] - j[0][:, hips].mean(1, keepdim=True) for j in (inputs["pred_joints"], inputs["target_joints"])
    )
    if name == "emdb-24":  # removed: frames 5 and 7 become neighbours; of 7 differences the outer two are dropped
        keep = [0, 1, 2, 3, 4, 5, 7, 8, 9]
        expected = acceleration_error(pred[keep], target[keep], fps=30)[1:-1]
    else:  # skipped: of differences 0..7 the outer two and those with frame 6, which are 4, 5, 6, do not count
        expected = acceleration_error(pred, target, fps=30)[[1, 2, 3]]

    torch.testing.assert_close(metric.compute()["accel_m_s2"], expected.double().mean())


def test_frame_rates_differ_between_sequences():
    inputs = _sequences(clips=1, frames=8)
    slow, fast = PoseErrors(PROTOCOLS["body-24"]), PoseErrors(PROTOCOLS["body-24"])
    slow.update(**inputs | {"fps": torch.tensor([15.0])})
    fast.update(**inputs | {"fps": torch.tensor([30.0])})

    torch.testing.assert_close(fast.compute()["accel_m_s2"], 4 * slow.compute()["accel_m_s2"])


def test_clips_too_short_for_an_acceleration_still_count_for_the_pose():
    metric = PoseErrors(PROTOCOLS["emdb-24"])
    metric.update(**_sequences(clips=2, frames=2))
    values = metric.compute()

    assert values["mpjpe_mm"].isfinite()
    assert values["accel_m_s2"].isnan()


def test_without_vertices_there_is_no_pve():
    metric = PoseErrors(PROTOCOLS["body-24"])
    metric.update(**_sequences(clips=2, frames=8) | {"pred_vertices": None, "target_vertices": None})
    values = metric.compute()

    assert values["pve_mm"].isnan()
    assert values["pa_mpjpe_mm"] < values["mpjpe_mm"]


def test_protocols_without_acceleration_report_none():
    metric = PoseErrors(PROTOCOLS["3dpw-14-root0"], regressor=torch.rand(17, 40))
    metric.update(**_sequences(clips=2, frames=8))

    assert set(metric.compute()) == {"pa_mpjpe_mm", "mpjpe_mm", "pve_mm"}


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_seen_is_nan():
    metric = PoseErrors(PROTOCOLS["body-24"])
    assert all(value.isnan() for value in metric.compute().values())

    metric.update(**_sequences(clips=2, frames=8) | {"valid": torch.zeros(2, 8, dtype=torch.bool)})
    assert all(value.isnan() for value in metric.compute().values())
    assert BestConstantError(PROTOCOLS["body-24"]).compute().isnan()


def test_a_prediction_of_nan_shows():
    inputs = _sequences(clips=2, frames=8)
    inputs["pred_joints"][0, inputs["valid"][0].nonzero()[0]] = torch.nan
    metric = PoseErrors(PROTOCOLS["body-24"])
    metric.update(**inputs)

    assert metric.compute()["mpjpe_mm"].isnan() and metric.compute()["pa_mpjpe_mm"].isnan()


def test_ill_fitting_masks_are_refused():
    inputs = _sequences(clips=2, frames=8)
    with pytest.raises(ValueError, match=r"valid must be \(B,T\) bool"):
        PoseErrors(PROTOCOLS["body-24"]).update(**inputs | {"valid": inputs["valid"].float()})


def test_no_constant_pose_beats_the_best_one():
    inputs = _sequences(clips=4, frames=8)
    metric = BestConstantError(PROTOCOLS["body-24"])
    metric.update(inputs["target_joints"], inputs["valid"])
    best = metric.compute()

    frames = PROTOCOLS["body-24"].align(inputs["target_joints"])[0][inputs["valid"]]
    candidates = [frames.mean(0), frames.median(0).values, *frames[:5]]
    assert all(best < mpjpe(candidate.expand_as(frames), frames).mean() for candidate in candidates)
