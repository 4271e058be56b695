"""Pose as joints and twists: equal to HybrIK where it is right, and back without loss where it is not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthmr.body import decode_pose, encode_pose
from fasthmr.body.ik import HybridPose, from_hybrid, to_hybrid
from fasthmr.body.pose import mirror_pose, pose_dim
from fasthmr.conventions import NUM_JOINTS, PARENTS29, SWAP24
from fasthmr.geometry.rotations import axis_angle_to_matrix, matrix_to_axis_angle
from fasthmr.geometry.swing_twist import shortest_swing, split_swing_twist, twist_rotation

SINGULAR = 14  # a pure swing by 179.9 degrees: HybrIK's own is wrong there


@pytest.fixture(scope="module")
def hybrik() -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parent / "fixtures" / "hybrik.npz", allow_pickle=False) as arrays:
        return {k: torch.from_numpy(arrays[k]) for k in arrays.files if arrays[k].dtype.kind == "f"}


def regular(values: torch.Tensor) -> torch.Tensor:
    return torch.cat((values[:SINGULAR], values[SINGULAR + 1 :]))


def forward(rotations: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Joints by forward kinematics, written anew: (B,24,3,3), (29,3) -> (B,29,3), the pelvis at the origin."""
    eye = torch.eye(3, dtype=rotations.dtype).expand(len(rotations), 5, 3, 3)
    rotations = torch.cat((rotations, eye), dim=1)
    world, place = [rotations[:, 0]], [torch.zeros(len(rotations), 3, dtype=rotations.dtype)]
    for joint, parent in enumerate(PARENTS29[1:], 1):
        world.append(world[parent] @ rotations[:, joint])
        place.append(place[parent] + world[parent] @ (rest[joint] - rest[parent]))
    return torch.stack(place, dim=1)


class TestParityWithHybrIK:
    def test_joints_and_twists(self, hybrik):
        pose = to_hybrid(hybrik["rotmat"], hybrik["rest29"].expand(16, -1, -1))
        torch.testing.assert_close(pose.joints, hybrik["joints29_rootrel"], atol=2e-6, rtol=0)
        torch.testing.assert_close(regular(pose.twists), regular(hybrik["twist_cos_sin"]), atol=2e-4, rtol=0)

    def test_inverse_kinematics(self, hybrik):
        pose = HybridPose(hybrik["joints29_rootrel"], hybrik["twist_cos_sin"])
        rotations = from_hybrid(pose, hybrik["rest29"].expand(16, -1, -1))
        assert rotations.isfinite().all()
        expected = regular(hybrik["ik_naive_svdroot_rotmat"])
        # Pose 13 swings by 170 degrees, where HybrIK's float32 loses a few digits.
        torch.testing.assert_close(regular(rotations), expected, atol=6e-3, rtol=0)
        assert (regular(rotations) - expected).abs().mean() < 2e-5

    def test_adaptive_inverse_kinematics(self, hybrik):
        pose = HybridPose(hybrik["joints29_rootrel"], hybrik["twist_cos_sin"])
        rotations = from_hybrid(pose, hybrik["rest29"].expand(16, -1, -1), adaptive=True)
        assert rotations.isfinite().all()
        # Pose 13, whose swings are by 170 degrees, as above.
        torch.testing.assert_close(regular(rotations), regular(hybrik["ik_adaptive_rotmat"]), atol=3e-2, rtol=0)
        torch.testing.assert_close(rotations[:13], hybrik["ik_adaptive_rotmat"][:13], atol=1e-3, rtol=0)

    def test_noisy_joints_are_met_as_well_as_by_hybrik(self, hybrik):
        rest = hybrik["rest29"]
        noisy = HybridPose(hybrik["noisy_joints29"] - hybrik["noisy_joints29"][:, :1], hybrik["twist_cos_sin"])

        def error_mm(rotations: torch.Tensor) -> float:
            return 1000 * float((forward(rotations, rest) - hybrik["joints29_rootrel"]).norm(dim=-1).mean())

        naive, adaptive = (error_mm(from_hybrid(noisy, rest.expand(16, -1, -1), how)) for how in (False, True))
        assert naive < error_mm(hybrik["ik_naive_noisy_rotmat"])
        assert adaptive < 0.8 * naive and adaptive < error_mm(hybrik["ik_adaptive_noisy_rotmat"])


def random_poses(count: int, largest_angle: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(count, NUM_JOINTS, 3, generator=generator), dim=-1)
    return axis_angle_to_matrix(axis * largest_angle * torch.rand(count, NUM_JOINTS, 1, generator=generator))


class TestRoundTrip:
    @pytest.mark.parametrize("largest_angle", [0.5, 2.0, 3.14159])
    def test_random_poses_and_shapes(self, free_body, largest_angle):
        rotations = random_poses(64, largest_angle)
        betas = 2 * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
        rest = free_body.rest_joints(betas)
        back = from_hybrid(to_hybrid(rotations, rest), rest)
        error_mm = 1000 * (free_body.joints29(back, betas) - free_body.joints29(rotations, betas)).norm(dim=-1)
        assert error_mm.max() < 0.1

    def test_swings_through_the_antipode(self, hybrik):
        rest = hybrik["rest29"].expand(401, -1, -1)
        rotations = torch.eye(3).expand(401, NUM_JOINTS, 3, 3).clone()
        angles = torch.linspace(torch.pi - 0.1, torch.pi + 0.1, 401)
        for joint in (1, 12, 18):
            rotations[:, joint] = axis_angle_to_matrix(angles[:, None] * torch.tensor([0.6, 0.0, 0.8]))
        pose = to_hybrid(rotations, rest)
        back = from_hybrid(pose, rest)
        torch.testing.assert_close(forward(back, rest[0]), forward(rotations, rest[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(back, rotations, atol=2e-3, rtol=0)

    def test_joints_are_the_bodys_own(self, free_body):
        rotations, betas = random_poses(8, 2.0), torch.randn(8, 10)
        joints = free_body.joints29(rotations, betas)
        pose = to_hybrid(rotations, free_body.rest_joints(betas))
        torch.testing.assert_close(pose.joints, joints - joints[:, :1], atol=1e-5, rtol=0)

    def test_twists_need_not_be_normalised(self, free_body):
        rotations, rest = random_poses(4, 1.0), free_body.rest_joints(torch.zeros(4, 10))
        pose = to_hybrid(rotations, rest)
        torch.testing.assert_close(from_hybrid(pose._replace(twists=3 * pose.twists), rest), from_hybrid(pose, rest))

    def test_133_numbers(self, free_body):
        pose = to_hybrid(
            random_poses(6, 1.0).unflatten(0, (2, 3)), free_body.rest_joints(torch.zeros(6, 10)).unflatten(0, (2, 3))
        )
        assert pose.pack().shape == (2, 3, 133)
        for ours, back in zip(pose, HybridPose.unpack(pose.pack()), strict=True):
            assert torch.equal(ours, back)
        with pytest.raises(ValueError, match="has 133 numbers"):
            HybridPose.unpack(torch.zeros(2, 132))

    def test_through_the_body(self, free_body):
        rotations, betas = random_poses(6, 2.0).unflatten(0, (2, 3)), torch.randn(2, 3, 10)
        numbers = encode_pose(rotations, betas, free_body)
        assert numbers.shape == (2, 3, 133)
        torch.testing.assert_close(decode_pose(numbers, betas, free_body), rotations, atol=1e-3, rtol=0)

    def test_as_rotations_of_6_numbers(self, free_body):
        rotations, betas = random_poses(6, 3.1).unflatten(0, (2, 3)), torch.randn(2, 3, 10)
        numbers = encode_pose(rotations, betas, free_body, "rotations_6d")
        assert numbers.shape == (2, 3, 144) and pose_dim("rotations_6d") == 144 and pose_dim("joints_twists") == 133
        back = decode_pose(2 * numbers, betas, free_body, "rotations_6d")  # of any length
        torch.testing.assert_close(back, rotations, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match=r"24 rotations of 6 numbers are 144 numbers, got shape \(2, 3, 133\)"):
            decode_pose(numbers[..., :133], betas, free_body, "rotations_6d")
        with pytest.raises(ValueError, match="representation must be joints_twists or rotations_6d, got 'euler'"):
            pose_dim("euler")

    @pytest.mark.parametrize("representation", ["joints_twists", "rotations_6d"])
    def test_under_autocast_nothing_is_rounded(self, free_body, representation):
        rotations, betas = random_poses(4, 2.0), torch.zeros(4, 10)
        with torch.autocast("cpu", torch.bfloat16):
            numbers = encode_pose(rotations, betas, free_body, representation)
            back = decode_pose(numbers, betas, free_body, representation)
        assert torch.equal(numbers, encode_pose(rotations, betas, free_body, representation))
        assert torch.equal(back, decode_pose(numbers, betas, free_body, representation))

    def test_degenerate_input_stays_finite(self, free_body):
        rest = free_body.rest_joints(torch.zeros(1, 10))
        pose = HybridPose(torch.zeros(1, 29, 3, requires_grad=True), torch.zeros(1, 23, 2))
        assert from_hybrid(pose, rest).isfinite().all()


class TestDerivatives:
    def test_gradcheck_away_from_the_antipode(self, free_body):
        rest = free_body.rest_joints(torch.zeros(1, 10)).double()
        rotations = random_poses(1, 1.0).double()
        pose = to_hybrid(rotations, rest)
        numbers = (pose.pack() + 0.01 * torch.randn(1, 133, dtype=torch.float64)).requires_grad_(True)
        assert torch.autograd.gradcheck(lambda n: from_hybrid(HybridPose.unpack(n), rest), numbers, atol=1e-6)
        angles = matrix_to_axis_angle(rotations).requires_grad_(True)
        assert torch.autograd.gradcheck(lambda a: to_hybrid(axis_angle_to_matrix(a), rest).pack(), angles, atol=1e-6)

    @pytest.mark.parametrize("angle", [0.0, 1e-6, torch.pi - 1e-6, torch.pi])
    def test_gradients_are_finite_everywhere(self, angle):
        source = torch.tensor([0.0, 1.0, 0.0])
        target = torch.tensor([float(np.sin(angle)), float(np.cos(angle)), 0.0], requires_grad=True)
        shortest_swing(source, target).sum().backward()
        assert target.grad.isfinite().all()


class TestSwingTwist:
    def test_worked_numbers(self):
        y = torch.tensor([0.0, 1.0, 0.0])
        about_y = axis_angle_to_matrix(torch.tensor([0.0, torch.pi / 2, 0.0]))
        swing, cos_sin = split_swing_twist(about_y, y)
        torch.testing.assert_close(swing, torch.eye(3))
        torch.testing.assert_close(cos_sin, torch.tensor([0.0, 1.0]))
        about_x = axis_angle_to_matrix(torch.tensor([torch.pi / 2, 0.0, 0.0]))
        swing, cos_sin = split_swing_twist(about_x, y)
        torch.testing.assert_close(swing, about_x)
        torch.testing.assert_close(cos_sin, torch.tensor([1.0, 0.0]))

    def test_they_make_up_the_rotation(self):
        # in float64: near half a turn float32 loses digits, how many depends on the axis
        rotations = random_poses(100, 3.1)[:, 0].double()
        rotations = axis_angle_to_matrix(matrix_to_axis_angle(rotations))  # rotations to more than float32's digits
        axis = torch.nn.functional.normalize(torch.randn(100, 3, dtype=torch.float64), dim=-1)
        swing, cos_sin = split_swing_twist(rotations, axis)
        torch.testing.assert_close(swing @ twist_rotation(axis, cos_sin), rotations, atol=1e-10, rtol=0)
        torch.testing.assert_close((twist_rotation(axis, cos_sin) @ axis[..., None])[..., 0], axis, atol=1e-12, rtol=0)


def test_mirror(free_body):
    """A symmetric body's mirrored pose, made from mirrored rotations, is the mirror of its numbers."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    rotations, betas = random_poses(8, 1.5), torch.zeros(8, 10)
    rest = free_body.rest_joints(betas)
    mirrored = flip @ rotations[:, list(SWAP24)] @ flip
    expected, ours = to_hybrid(mirrored, rest), to_hybrid(rotations, rest).mirrored()
    torch.testing.assert_close(ours.joints, expected.joints, atol=2e-3, rtol=0)
    torch.testing.assert_close(ours.twists, expected.twists, atol=2e-2, rtol=0)
    numbers = encode_pose(rotations, betas, free_body, "rotations_6d")
    back = decode_pose(mirror_pose(numbers, "rotations_6d"), betas, free_body, "rotations_6d")
    torch.testing.assert_close(back, mirrored, atol=1e-5, rtol=0)
