"""CameraHMR and its network for the intrinsics: equal to the originals on small random weights, and of their sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthmr.data.crops import cut_image, normalised
from fasthmr.data.letterbox import letterboxed
from fasthmr.geometry.boxes import crop_affine
from fasthmr.geometry.cameras import box_info, focal_of_fov, full_image_translation, project_into_crop
from fasthmr.models.adapters import hmr_state_dict
from fasthmr.models.hmr import HMR, HMRConfig, middle_columns
from fasthmr.models.human_fov import HumanFoV
from fasthmr.pipeline import MotionEstimate, Pipeline, PipelineConfig, estimate_intrinsics

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = HMRConfig(
    architecture="camerahmr",
    vit_dim=64, vit_depth=4, vit_heads=4, head_dim=128, head_depth=2, head_heads=8, head_dim_head=16, head_mlp_dim=96,
)  # fmt: skip
TINY = HMRConfig(
    architecture="camerahmr",
    vit_dim=32, vit_depth=2, vit_heads=2, head_dim=24, head_depth=1, head_heads=2, head_dim_head=8, head_mlp_dim=16,
)  # fmt: skip


def numbers(name: str) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the originals' own code; see tests/fixtures/README.md."""
    with np.load(FIXTURES / name, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    return numbers("camerahmr_small_io.npz")


@pytest.fixture(scope="module")
def small() -> HMR:
    hmr = HMR(SMALL).eval()
    foreign = torch.load(FIXTURES / "camerahmr_small.ckpt", weights_only=True)["state_dict"]
    hmr.load_state_dict(hmr_state_dict(foreign, "camerahmr"))
    return hmr


def where(original: dict[str, torch.Tensor]) -> torch.Tensor:
    size = original["img_size"].flip(-1)  # theirs is height, width
    return box_info(original["box_center"], original["box_size"], size, original["cam_int"][:, 0, 0])


def assert_same(ours: torch.Tensor, original: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest number."""
    original = original.reshape(ours.shape)
    torch.testing.assert_close(ours, original, rtol=0, atol=1e-5 * original.abs().max().item())


class TestParity:
    @torch.no_grad()
    def test_the_head_is_told_where_the_crop_was(self, small, original):
        token = small.smpl_head._token(original["features"], where(original))
        assert_same(token, original["token_in"])

    @torch.no_grad()
    def test_whole_network(self, small, original):
        image = torch.full((1, 3, 256, 256), 7.0)
        middle_columns(image).copy_(original["img"])
        output = small(image, box_info=where(original))
        assert_same(output.tokens, original["features"])
        assert_same(output.feature, original["decoder_token"])
        assert_same(output.pose6d, original["pose6d"])
        assert_same(output.rotations, torch.cat([original["global_orient"], original["body_pose"]], dim=1))
        assert_same(output.betas, original["betas"])
        assert_same(output.camera, original["pred_cam"])

    @torch.no_grad()
    def test_keypoints(self, small, original):
        keypoints = small.smpl_head(original["features"], where(original)).keypoints
        assert keypoints.shape == (1, 44, 2)
        assert_same(keypoints, original["kp_out"])

    def test_camera_of_the_full_image(self, original):
        size = original["img_size"].flip(-1)
        place = (original["box_center"], original["box_size"], size, original["focal"])
        assert_same(full_image_translation(original["pred_cam"], *place), original["cam_t_full"])

    def test_a_body_lands_in_the_crop_where_it_is_in_the_image(self):
        points = torch.tensor([[[0.2, -0.5, 0.1], [-0.3, 0.4, -0.2]]])
        there, focal = torch.tensor([[0.8, -0.3, 6.0]]), 1200.0
        lens = torch.tensor([[[focal, 0, 620], [0, focal, 380], [0, 0, 1]]])
        center, size = torch.tensor([[790.0, 300.0]]), torch.tensor([420.0])
        # The network's camera of that place, by the inverse of the full image's camera.
        scale = 2 * focal / (size * there[:, 2])
        camera = torch.cat((scale[:, None], there[:, :2] - 2 * (center - lens[:, :2, 2]) / (scale * size)), dim=1)
        pixels = torch.einsum("bij,bnj->bni", lens, points + there[:, None])
        expected = (pixels[..., :2] / pixels[..., 2:] - center[:, None]) / size
        torch.testing.assert_close(project_into_crop(points, camera, center, size, lens), expected)

    def test_focal_length_of_a_field_of_view(self):
        original = numbers("human_fov.npz")
        torch.testing.assert_close(focal_of_fov(original["vfov"], original["img_h"]), original["focal"])

    def test_letterbox_equals_the_originals_pixel_by_pixel(self):
        original = numbers("human_fov.npz")
        np.testing.assert_array_equal(letterboxed(original["picture"].numpy()), original["letterboxed"].numpy())

    def test_crop_equals_the_originals_pixel_by_pixel(self):
        original = numbers("human_fov.npz")
        affine = crop_affine(original["patch_center"].numpy(), original["patch_box"].numpy(), 256)
        crop = np.empty((3, 256, 256), np.uint8)
        cut_image(original["picture"].numpy(), affine, crop)
        np.testing.assert_array_equal(crop.transpose(1, 2, 0), original["patch_256"].numpy())


class TestConditioning:
    @torch.no_grad()
    def test_the_box_changes_the_answer(self):
        torch.manual_seed(0)
        hmr = HMR(TINY).eval()
        images = torch.randn(1, 3, 256, 256).expand(2, -1, -1, -1)
        there = torch.tensor([[0.0, 0.0, 0.3], [0.5, 0.1, 0.3]])
        feature = hmr(images, box_info=there).feature
        assert (feature[0] - feature[1]).abs().max() > 1e-3
        # HMR2.0 takes it, so that callers need not ask, and does not look at it.
        same = HMR(HMRConfig.from_dict({**TINY.as_dict(), "architecture": "hmr2"})).eval()(images, box_info=there)
        torch.testing.assert_close(same.feature[0], same.feature[1])

    def test_it_must_be_given(self):
        with pytest.raises(ValueError, match="this model is CameraHMR's and is told where the crop was: pass box_info"):
            HMR(TINY)(torch.zeros(1, 3, 256, 256))

    def test_every_trained_weight_gets_a_gradient(self):
        hmr = HMR(TINY).train()
        output = hmr(torch.randn(1, 3, 256, 256), box_info=torch.rand(1, 3))
        (output.rotations.square().sum() + output.pose6d.sum() + output.betas.sum() + output.camera.sum()).backward()
        assert [n for n, p in hmr.named_parameters() if p.grad is None] == [
            "smpl_head.deckp.weight",
            "smpl_head.deckp.bias",
        ]

    def test_an_unknown_architecture_is_named(self):
        with pytest.raises(ValueError, match=r"architecture must be one of \('hmr2', 'camerahmr'\), got 'hmr3'"):
            HMRConfig(architecture="hmr3")


class TestPipeline:
    """CameraHMR on the frames of a video."""

    @pytest.fixture
    def told(self, free_body):
        """Calls a pipeline on two frames of a person in a box, and gives what its encoder was told."""

        def run(**settings) -> tuple[torch.Tensor, MotionEstimate]:
            hmr = HMR(TINY).eval()
            seen = []
            hmr.register_forward_pre_hook(lambda _, args, named: seen.append(named["box_info"]), with_kwargs=True)
            masks = np.zeros((2, 200, 400), bool)
            masks[:, 50:150, 250:300] = True
            pipeline = Pipeline(hmr, None, free_body, PipelineConfig(precision="32", batch=1))
            motion = pipeline(np.zeros((2, 200, 400, 3), np.uint8), masks, [[250, 50, 300, 150]] * 2, **settings)
            return torch.cat(seen), motion

        return run

    def test_boxes_and_lens_reach_the_head(self, told):
        lens = np.array([[500.0, 0, 190], [0, 500, 105], [0, 0, 1]])
        where, motion = told(intrinsics=lens)
        assert len(where) == 2
        size, center = motion.box_size[0], motion.box_center[0]
        expected = torch.tensor([(center[0] - 200) / 500, (center[1] - 100) / 500, size / 500])
        torch.testing.assert_close(where[1], expected)

    def test_without_a_lens_its_focal_length_is_the_diagonal(self, told):
        where, motion = told()
        assert float(where[0, 2]) == pytest.approx(float(motion.box_size[0]) / np.hypot(200, 400))

    def test_one_lens_for_a_video_from_the_median_of_its_frames(self):
        torch.manual_seed(0)
        fov = HumanFoV(width=2).eval()
        frames = [np.full((90, 160, 3), value, np.uint8) for value in (0, 120, 255)]
        pictures = torch.stack([torch.from_numpy(letterboxed(frame)).permute(2, 0, 1) for frame in frames])
        with torch.no_grad():
            angle = fov(normalised(pictures)).sort().values[1]
        lens = estimate_intrinsics(fov, frames)
        focal_px = float(focal_of_fov(angle, 90))
        torch.testing.assert_close(
            lens, torch.tensor([[focal_px, 0, 80], [0, focal_px, 45], [0, 0, 1]]), rtol=1e-3, atol=0
        )
        with pytest.raises(ValueError, match=r"of one size, got \[\(8, 4\), \(160, 90\)\]"):
            estimate_intrinsics(fov, [frames[0], np.zeros((4, 8, 3), np.uint8)])
        with pytest.raises(ValueError, match="of one size, got no frames"):
            estimate_intrinsics(fov, [])


class TestHumanFoV:
    @torch.no_grad()
    def test_one_angle_a_picture_and_no_randomness_in_use(self):
        torch.manual_seed(0)
        fov = HumanFoV(width=4).eval()
        pictures = torch.randn(2, 3, 256, 256)
        angles = fov(pictures)
        assert angles.shape == (2,)
        torch.testing.assert_close(fov(pictures[:1]), angles[:1], rtol=1e-4, atol=1e-5)
        # It is the second of the two numbers that the network computes.
        fov.fc3.bias[1] += 1.0
        torch.testing.assert_close(fov(pictures), angles + 1.0)

    def test_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"pictures must be \(B, 3, 256, 256\), .*; got \(1, 3, 224, 224\)"):
            HumanFoV(width=4)(torch.zeros(1, 3, 224, 224))


class TestLetterbox:
    @pytest.mark.parametrize("shape, box", [((90, 30), (85, 0, 170, 256)), ((2, 1000), (0, 127, 256, 127))])
    def test_the_picture_is_centred_and_the_rest_is_white(self, shape, box):
        square = letterboxed(np.zeros((*shape, 3), np.uint8))
        rows, columns = np.nonzero((square == 0).all(-1))
        assert (columns.min(), rows.min()) == box[:2]
        assert set(np.unique(square)) == {0, 255}

    def test_what_is_no_picture_is_refused(self):
        with pytest.raises(ValueError, match=r"a picture must be \(H, W, 3\) uint8, got \(4, 4\) of float64"):
            letterboxed(np.zeros((4, 4)))
