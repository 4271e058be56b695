"""Cameras: equal to HMR2.0's and CameraHMR's own functions, and consistent with each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fasthmr.geometry.cameras import crop_camera_translation, full_image_translation, project

FIXTURE = Path(__file__).parent / "fixtures" / "geometry.npz"


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the original code; see tests/fixtures/README.md."""
    with np.load(FIXTURE, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_projection_equals_camerahmr(original):
    intrinsics = original["cam_int"]
    pixels = project(original["proj_pts"], original["proj_transl"], intrinsics[:, 0, 0], intrinsics[:, :2, 2])
    torch.testing.assert_close(pixels, original["proj_out"])


def test_full_image_translation_equals_camerahmr(original):
    translation = full_image_translation(
        original["cam32_in"],
        original["cam32_box_center"],
        original["cam32_box_size"],
        original["cam32_img_wh"],
        original["cam32_focal"],
    )
    torch.testing.assert_close(translation, original["cam32_out"], rtol=1e-6, atol=1e-6)


def test_full_image_translation_equals_hmr2(original):
    translation = full_image_translation(
        original["crop_cam"],
        original["center"],
        original["hmr2_box_size"],
        original["hmr2_full_cam_in_wh"],
        float(original["hmr2_full_cam_focal"]),
    )
    torch.testing.assert_close(translation, original["hmr2_full_cam"], rtol=1e-6, atol=1e-6)


def test_crop_camera_is_the_full_image_camera_of_the_crop_itself():
    camera = torch.tensor([[0.9, 0.1, -0.2], [1.3, 0.0, 0.3]])
    in_full = full_image_translation(
        camera, torch.full((2, 2), 128.0), torch.full((2,), 256.0), torch.full((2, 2), 256.0), 5000.0
    )
    torch.testing.assert_close(crop_camera_translation(camera), in_full)
    torch.testing.assert_close(crop_camera_translation(torch.tensor([1.0, 0, 0])), torch.tensor([0, 0, 39.0625]))


def test_a_body_lands_on_the_same_pixels_through_the_crop_and_through_the_full_image():
    # The crop camera looks straight at the box, the full one from the image centre; far away both agree.
    camera, points = torch.tensor([[0.9, 0.05, 0.1]]), torch.tensor([[[0.2, -0.7, 0.0], [-0.3, 0.8, 0.0]]])
    center, size, image_size = torch.tensor([[700.0, 300.0]]), torch.tensor([400.0]), torch.tensor([[1280.0, 720.0]])
    in_crop = project(points, crop_camera_translation(camera), 5000.0, torch.tensor([[128.0, 128.0]]))
    full = full_image_translation(camera, center, size, image_size, 5000.0 * 400 / 256)
    in_full = project(points, full, 5000.0 * 400 / 256, image_size / 2)
    torch.testing.assert_close((in_crop - 128) * 400 / 256 + center[:, None], in_full, rtol=0, atol=1e-2)


def test_projection_of_a_known_point_with_each_kind_of_focal_length():
    point, center = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[50.0, 60.0]])
    expected = torch.tensor([[[75.0, 110.0]]])
    torch.testing.assert_close(project(point, None, 100.0, center), expected)
    torch.testing.assert_close(project(point, None, torch.tensor([100.0]), center), expected)
    torch.testing.assert_close(project(point, None, torch.tensor([[100.0, 200.0]]), center)[0, 0, 1].item(), 160.0)


def test_gradients():
    points = torch.tensor([[[0.2, -0.7, 0.1], [-0.3, 0.8, 0.0]]], dtype=torch.float64, requires_grad=True)
    camera = torch.tensor([[0.9, 0.05, 0.1]], dtype=torch.float64, requires_grad=True)
    center = torch.zeros(1, 2, dtype=torch.float64)
    assert gradcheck(lambda p, c: project(p, crop_camera_translation(c, 5.0, 1.0), 5.0, center), (points, camera))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"points must have shape \(B, N, 3\), got \(2, 3\)"):
        project(torch.zeros(2, 3), None, 1.0, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"camera must have shape \(\.\.\., 3\)"):
        crop_camera_translation(torch.zeros(2, 4))
