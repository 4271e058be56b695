"""Samples cut from clips: labels lie on what is in the picture, also when it is jittered and flipped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_clips import COLORS, IMAGE_SIZE, drawn_clip, forward_kinematics, project, side

from fasthmr.conventions import CROP_PX, IMAGE_MEAN, IMAGE_STD, JOINTS29, MASK_SUBJECT
from fasthmr.data.batch import ClipBatch, ClipSample, collate, flatten_frames, person_mask
from fasthmr.data.schema import ClipError
from fasthmr.data.transforms import CROP_SCALE, Augmentation, make_sample

OFF = Augmentation.off()
FLIP = replace(OFF, flip=1.0)
JITTER = replace(OFF, scale=0.2, shift=0.1, frame_jitter=0.05)


def sample_of(augmentation: Augmentation, seed: int = 0, **clip_args: object) -> ClipSample:
    clip = drawn_clip(**clip_args)
    return make_sample(clip, range(len(clip.valid)), np.random.default_rng(seed), augmentation)


def dots_under_labels(sample: ClipSample) -> float:
    """Share of joints (inside the crop) whose labelled pixel has the colour of the side the label names."""
    hits, count = 0, 0
    for image, joints in zip(sample.images, sample.joints2d, strict=True):
        for name, (x, y, _) in zip(JOINTS29, joints, strict=True):
            column, row = np.rint((np.array([x, y]) + 0.5) * CROP_PX).astype(int)
            if 0 <= column < CROP_PX and 0 <= row < CROP_PX:
                hits += np.abs(image[:, row, column].astype(int) - COLORS[side(name)]).max() < 60
                count += 1
    assert count > 100
    return hits / count


def as_mirror_image_labels(sample: ClipSample) -> ClipSample:
    """Blue and red exchanged: a mirrored picture shows the left arm's colour where the label says right."""
    return replace(sample, images=sample.images[:, ::-1])


@pytest.mark.parametrize("augmentation", [OFF, JITTER], ids=["plain", "jittered"])
def test_labels_lie_on_the_dots(augmentation: Augmentation) -> None:
    # a few dots are painted over by later ones of another side
    assert dots_under_labels(sample_of(augmentation)) > 0.85


@pytest.mark.parametrize("augmentation", [FLIP, replace(JITTER, flip=1.0)], ids=["flipped", "flipped and jittered"])
def test_flipped_labels_lie_on_the_flipped_dots_of_the_other_side(augmentation: Augmentation) -> None:
    sample = sample_of(augmentation)
    assert dots_under_labels(as_mirror_image_labels(sample)) > 0.85
    assert dots_under_labels(sample) < 0.5


def test_flip_is_exact_to_a_fraction_of_a_pixel() -> None:
    # white pictures of the person mask: its centroid must mirror about the crop's centre line exactly as labels do
    plain, flipped = sample_of(OFF), sample_of(FLIP)
    columns = np.arange(CROP_PX)

    def centroid(image: np.ndarray) -> float:
        weight = np.abs(image.astype(float) - 128).sum((0, 1))
        return float((weight * columns).sum() / weight.sum())

    for a, b in zip(plain.images, flipped.images, strict=True):
        assert centroid(a) + centroid(b) == pytest.approx(CROP_PX, abs=0.05)
    np.testing.assert_allclose(
        plain.joints2d[..., 0].sum(1), -flipped.joints2d[..., 0].sum(1), atol=1e-4
    )  # crop-normalised x changes its sign, so pixels x and 256 - x correspond


@pytest.mark.parametrize("augmentation", [OFF, FLIP, replace(JITTER, flip=1.0)])
def test_every_label_of_a_sample_describes_the_same_body(augmentation: Augmentation) -> None:
    sample = sample_of(augmentation)
    # SMPL parameters -> 3D joints
    joints = forward_kinematics(sample.rotations, sample.translation)
    np.testing.assert_allclose(joints, sample.joints3d[..., :3], atol=1e-5)
    # 3D joints -> full image -> crop
    in_image = project(sample.joints3d[..., :3], sample.intrinsics)
    in_crop = (in_image - sample.box_center[:, None]) / sample.box_size[:, None, None]
    np.testing.assert_allclose(in_crop, sample.joints2d[..., :2], atol=1e-4)
    assert np.allclose(np.linalg.det(sample.rotations), 1, atol=1e-5)


def test_crop_without_jitter_is_hmr2s_box_around_the_person() -> None:
    clip = drawn_clip()
    sample = make_sample(clip, [1, 4], np.random.default_rng(0), OFF)
    np.testing.assert_allclose(sample.box_size, CROP_SCALE * clip.box_size[[1, 4]], rtol=1e-6)
    np.testing.assert_allclose(sample.box_center, clip.box_center[[1, 4]])
    assert sample.frame_index.tolist() == [1, 4]


def test_same_generator_state_same_sample() -> None:
    a, b, c = (sample_of(Augmentation(), seed) for seed in (3, 3, 4))
    for name in ("images", "masks", "joints2d", "rotations", "box_center"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert not np.array_equal(a.images, c.images)


def test_validation_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    make_sample(drawn_clip(), [0], rng, OFF)
    assert rng.bit_generator.state == before


def test_occluders_are_not_person() -> None:
    plain, occluded = sample_of(OFF), sample_of(replace(OFF, occlusion=1.0))
    assert occluded.masks.dtype == np.uint8
    for a, b, mask_a, mask_b in zip(plain.images, occluded.images, plain.masks, occluded.masks, strict=True):
        covered = (a != b).any(0)
        assert covered.any()
        assert not mask_b[covered].any()
        np.testing.assert_array_equal(mask_a[~covered] == MASK_SUBJECT, mask_b[~covered] == MASK_SUBJECT)


def test_colours_change_alike_in_all_frames_and_leave_labels_alone() -> None:
    plain, coloured = sample_of(OFF), sample_of(replace(OFF, brightness=0.3, contrast=0.3, gamma=0.3, channel_gain=0.2))
    grey = (plain.images == 128).all(1)
    values = coloured.images.transpose(0, 2, 3, 1)[grey]
    assert (values == values[0]).all()
    assert not np.array_equal(plain.images, coloured.images)
    np.testing.assert_array_equal(plain.joints2d, coloured.joints2d)


def test_outside_the_stored_crop_is_black() -> None:
    clip = drawn_clip()
    sample = make_sample(clip, [0], np.random.default_rng(0), OFF, crop_scale=1.8)
    assert (sample.images[0, :, :, 0] == 0).all()
    assert (sample.masks[0, :, 0] == 0).all()
    assert sample.images[0, :, 128, 128].any()


def test_missing_and_invalid_labels_have_no_confidence() -> None:
    clip = drawn_clip()
    clip = replace(
        clip,
        valid=np.arange(6) != 2,
        status={**clip.status, "joints3d": "missing", "pose": "missing"},
    )
    sample = make_sample(clip, range(6), np.random.default_rng(0), OFF)
    assert sample.joints2d[..., 2].sum(1).tolist() == [29, 29, 0, 29, 29, 29]
    assert not sample.joints3d[..., 3].any()
    assert (sample.has_pose, sample.has_betas) == (False, True)
    assert not make_sample(drawn_clip(body=None), [0], np.random.default_rng(0), OFF).has_betas


def test_making_a_sample_leaves_the_clip_as_it_was() -> None:
    clip, untouched = drawn_clip(), drawn_clip()
    make_sample(clip, range(6), np.random.default_rng(0), Augmentation(flip=1.0))
    for name in ("joints2d", "joints3d", "pose", "translation", "box_center", "intrinsics"):
        np.testing.assert_array_equal(getattr(clip, name), getattr(untouched, name))


def test_strongly_shrunk_pictures_are_blurred_first() -> None:
    # a one-pixel checkerboard has a mean of 128; interpolated without a blur it would alias to strong patterns
    clip = drawn_clip(frames=1, crop_px=1536)
    board = np.indices((1536, 1536)).sum(0) % 2 * 255
    stored = np.repeat(board.astype(np.uint8)[..., None], 3, -1)
    clip = replace(clip, frames=type(clip.frames).encode_jpeg([stored], quality=100))
    images = make_sample(clip, [0], np.random.default_rng(0), OFF).images
    assert np.abs(images.astype(float) - 128).max() < 25


def test_a_damaged_frame_is_named() -> None:
    clip = drawn_clip(key="broken")
    zeros = replace(clip.frames, data=bytes(len(clip.frames.data)))
    with pytest.raises(ClipError, match="clip broken: frames: frame 3"):
        make_sample(replace(clip, frames=zeros), [3], np.random.default_rng(0), OFF)
    with pytest.raises(ClipError, match="clip broken: frames: frame 3 must have 3 dimensions"):
        make_sample(replace(clip, frames=clip.masks), [3], np.random.default_rng(0), OFF)


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"scale": -0.1}, {"scale": 1.0}, {"occlusion_size": 0.05}])
def test_impossible_augmentation_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


# ---- ClipBatch ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return collate([sample_of(OFF, key="a"), sample_of(FLIP, key="b", seed=1)])


def test_collate_stacks_samples(batch: ClipBatch) -> None:
    assert batch.keys == ["a", "b"]
    assert batch.images.shape == (2, 6, 3, 256, 256)
    assert batch.joints2d.dtype == torch.float32
    assert batch.has_pose.tolist() == [True, True]
    assert (batch.image_size == torch.tensor(IMAGE_SIZE)).all()


def test_a_clip_without_masks_is_not_one_without_a_person(batch: ClipBatch) -> None:
    clip = drawn_clip(key="bare")
    bare = make_sample(
        replace(clip, status={**clip.status, "masks": "missing"}), range(6), np.random.default_rng(0), OFF
    )
    mixed = collate([sample_of(OFF, key="a"), bare]).to("cpu")
    assert (batch.has_masks, mixed.has_masks) == ([True, True], [True, False])
    assert person_mask(batch, required=True).any() and person_mask(mixed) is None
    with pytest.raises(ValueError, match="these clips have no masks: bare"):
        person_mask(mixed, required=True)
    with pytest.raises(ValueError, match="has_masks must hold 2 values, one a clip, got 1"):
        replace(mixed, has_masks=[True])


def test_network_input_is_normalised_rgb(batch: ClipBatch) -> None:
    images = batch.network_input()
    assert images.shape == (12, 3, 256, 256)
    expected = (batch.images[1, 2, 0].float() / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
    torch.testing.assert_close(images[8, 0], expected)


def test_per_frame_values_line_up_with_flattened_frames(batch: ClipBatch) -> None:
    assert torch.equal(flatten_frames(batch.frame_index), torch.arange(6).repeat(2))
    assert torch.equal(batch.per_frame(torch.tensor([10, 20])), torch.tensor([10] * 6 + [20] * 6))


def test_moving_a_batch_keeps_everything(batch: ClipBatch) -> None:
    moved = batch.to("cpu")
    assert moved is not batch and moved.keys == batch.keys
    assert torch.equal(moved.joints3d, batch.joints3d)
    assert batch.to("meta").images.device.type == "meta"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "images",
            torch.zeros(2, 6, 3, 224, 224, dtype=torch.uint8),
            r"\(2, 6, 3, 256, 256\) uint8, got \(2, 6, 3, 224",
        ),
        ("images", torch.zeros(2, 6, 3, 256, 256), "uint8, got .* float32"),
        ("images", torch.zeros(12, 3, 256, 256), r"images must have shape \(B, T, 3, 256, 256\) uint8"),
        ("betas", torch.zeros(2, 6, 10), r"betas must have shape \(2, 10\) float32, got \(2, 6, 10\)"),
        ("valid", torch.zeros(2, 6), "valid must .* bool, got"),
        ("keys", ["a"], "2 clips of the batch, got 1"),
    ],
)
def test_wrong_fields_are_named(batch: ClipBatch, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(batch, **{field: value})


def test_clips_of_different_lengths_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="a: 6, b: 4"):
        collate([sample_of(OFF, key="a"), sample_of(OFF, key="b", frames=4)])
    with pytest.raises(ValueError, match="no samples"):
        collate([])
