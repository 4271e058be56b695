"""Boxes and crop affines: equal to the originals' crops, and consistent under composition."""

from pathlib import Path

import numpy as np
import pytest

from fasthmr.geometry.boxes import (
    apply_affine,
    compose_affine,
    crop_affine,
    hmr2_box_size,
    invert_affine,
    square_box,
)

FIXTURE = Path(__file__).parent / "fixtures" / "geometry.npz"


@pytest.fixture(scope="module")
def original() -> dict[str, np.ndarray]:
    """Inputs and outputs of the original code; see tests/fixtures/README.md."""
    with np.load(FIXTURE, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_box_sizes_equal_the_originals(original):
    boxes = original["boxes_xyxy"]
    np.testing.assert_allclose(hmr2_box_size(boxes[:, 2:] - boxes[:, :2]), original["hmr2_box_size"], rtol=1e-6)
    center, size = square_box(boxes.reshape(-1, 2, 2))
    np.testing.assert_allclose(center, original["center"], rtol=1e-6)
    np.testing.assert_allclose(size, original["camerahmr_box_size"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["hmr2", "camerahmr"])
def test_affines_equal_the_originals(original, kind):
    affine = crop_affine(original["center"], original[f"{kind}_box_size"], 256)
    np.testing.assert_allclose(affine, original[f"{kind}_affine"], rtol=1e-6, atol=1e-3)


def test_a_wide_box_is_heightened_and_a_tall_one_kept():
    np.testing.assert_allclose(hmr2_box_size([[300, 200], [100, 400]]), [400, 400])


def test_square_box_of_points_and_of_a_clip():
    points = np.array([[0.0, 10.0], [40.0, 30.0], [20.0, 20.0]])
    center, size = square_box(points, padding=1.5)
    np.testing.assert_allclose(center, [20, 20])
    assert size == 60
    centers, sizes = square_box(np.stack([points, points + 7, points * 2]))
    assert centers.shape == (3, 2)
    np.testing.assert_allclose(sizes, [40, 40, 80])


def test_the_box_fills_its_crop():
    affine = crop_affine([300, 200], 80, 256)
    corners = [[260, 160], [340, 240], [300, 200]]
    np.testing.assert_allclose(apply_affine(affine, corners), [[0, 0], [256, 256], [128, 128]])


def test_composition_and_inverse():
    rng = np.random.default_rng(0)
    stored = crop_affine(rng.uniform(0, 500, (5, 2)), rng.uniform(50, 300, 5), 384)
    final = crop_affine(rng.uniform(0, 500, (5, 2)), rng.uniform(50, 300, 5), 256)
    points = rng.uniform(0, 500, (5, 9, 2))
    final_from_stored = compose_affine(final, invert_affine(stored))
    np.testing.assert_allclose(
        apply_affine(final_from_stored, apply_affine(stored, points)), apply_affine(final, points), atol=1e-9
    )


def test_bad_boxes_are_refused():
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        crop_affine([[1, 2], [3, 4]], [10, 0], 256)
    with pytest.raises(ValueError, match=r"got \(0, 2\)"):
        square_box(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="padding must be positive, got 0"):
        square_box(np.zeros((3, 2)), padding=0)
