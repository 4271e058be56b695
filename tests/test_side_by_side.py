"""A clip and what systems make of it, side by side: what is drawn where, as an mp4 and in TensorBoard."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_sets import gendered_body_files
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_clips import drawn_clip
from torch.utils.tensorboard import SummaryWriter

from fasthmr.body import BodyMismatchError, load_body
from fasthmr.data.transforms import Augmentation, make_sample
from fasthmr.side_by_side import PosedMotion, log_video, side_by_side, write_side_by_side
from fasthmr.video.reading import Frames

FRAMES = 3
#: rows of the pictures: a name of 24 px above each row of panels of 256 px
OVER, BESIDE = slice(24, 280), slice(304, 560)


@pytest.fixture(scope="module")
def clip(free_body):
    return drawn_clip(frames=FRAMES, body=free_body.id)


def standing(scales: tuple[float, ...] = (0.9, 0.8, 0.7), turn: float = np.pi, valid: bool = True) -> PosedMotion:
    """A body in the rest pose, upright in the camera's frame, that gets smaller in the crop but does not move."""
    rotations = torch.eye(3).expand(len(scales), 24, 3, 3).clone()
    cosine, sine = np.cos(turn), np.sin(turn)
    rotations[:, 0] = torch.tensor([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    camera = torch.tensor([[scale, 0, 0] for scale in scales])
    return PosedMotion(rotations, torch.zeros(len(scales), 10), camera, torch.full((len(scales),), valid))


def panel(frame: np.ndarray, rows: slice, column: int) -> np.ndarray:
    return frame[rows, 256 * column : 256 * (column + 1)]


def test_input_overlay_and_side_view_of_every_system(clip, free_body):
    leaning = standing(turn=np.pi + 0.3)
    frames = list(side_by_side(clip, {"upright": standing(), "leaning": leaning}, free_body))
    crops = make_sample(clip, range(FRAMES), np.random.default_rng(0), Augmentation.off()).images
    assert len(frames) == FRAMES and all(frame.shape == (560, 768, 3) and frame.dtype == np.uint8 for frame in frames)
    heights = []
    for frame, crop in zip(frames, crops, strict=True):
        assert np.array_equal(panel(frame, OVER, 0), crop.transpose(1, 2, 0))
        rows, _ = np.nonzero((panel(frame, OVER, 1) != panel(frame, OVER, 0)).any(-1))
        heights.append(np.ptp(rows))
    # The crop's camera: 1.7 m at a scale of 0.9 are 1.7 * 0.9 * 128 px.
    assert heights[0] > 150 and np.allclose(heights, np.array((0.9, 0.8, 0.7)) * heights[0] / 0.9, atol=3)
    beside = [[panel(frame, BESIDE, column) for frame in frames] for column in (1, 2)]
    for still in beside:  # only the crop's camera moves
        assert (still[0] != 255).any() and all(np.array_equal(still[0], later) for later in still[1:])
    assert (beside[0][0] != 255).any(-1).sum() > 1000 and not np.array_equal(beside[0][0], beside[1][0])


def test_camerahmrs_mesh_is_where_the_full_images_lens_sees_it(clip, free_body):
    """In a wide lens, off its middle, and leaning. The pinhole alone says where: what is near is larger."""
    focal, middle = 400, np.array([120, 236])
    clip = replace(clip, intrinsics=np.array([[focal, 0, 120], [0, focal, 236], [0, 0, 1]], np.float32))
    center, size = clip.box_center[:, None], 1.2 * clip.box_size[:, None, None]
    away = 2 * focal / (0.6 * size)  # the body's own middle is seen in that of the crop
    place = np.concatenate([away * (center - middle) / focal, away], -1)
    motion = replace(standing((0.6, 0.6, 0.6), turn=np.pi + 0.6), full_image=True)
    points = free_body(motion.rotations, motion.betas).vertices.numpy() + place
    pixels = focal * points[..., :2] / points[..., 2:] + middle
    for frame, seen in zip(side_by_side(clip, {"a": motion}, free_body), (pixels - center) / size, strict=True):
        rows, columns = np.nonzero((panel(frame, OVER, 1) != panel(frame, OVER, 0)).any(-1))
        drawn = [columns.min(), rows.min(), columns.max(), rows.max()]
        np.testing.assert_allclose(drawn, 256 * (np.append(seen.min(0), seen.max(0)) + 0.5), atol=1.5)


def test_the_truth_is_shown_from_the_side(clip, free_body):
    (frame, *_) = side_by_side(clip, {}, free_body)
    green = panel(frame, BESIDE, 0)[(panel(frame, BESIDE, 0) != 255).any(-1)].mean(0)
    assert green[1] > green[0] + 10 and green[1] > green[2] + 10
    unlabelled = drawn_clip(frames=1, body=free_body.id)
    unlabelled.status["pose"] = "pseudo"
    (frame,) = side_by_side(unlabelled, {}, free_body)
    assert (panel(frame, BESIDE, 0) == 255).all()


def test_the_truth_is_of_the_body_of_its_labels(free_body, tmp_path):
    male = load_body(gendered_body_files(tmp_path)["male"])
    own, gendered = drawn_clip(frames=1, body=free_body.id), drawn_clip(frames=1, body=male.id)
    columns = {"upright": standing((0.9,))}
    (neutral_frame,), (male_frame,) = (
        side_by_side(own, columns, free_body),
        side_by_side(gendered, columns, free_body, male),
    )
    drawn = [(panel(frame, BESIDE, 0) != 255).any(-1).sum() for frame in (neutral_frame, male_frame)]
    assert drawn[1] > 1.02 * drawn[0]
    assert np.array_equal(panel(neutral_frame, OVER, 1), panel(male_frame, OVER, 1))  # the system's is the neutral one
    with pytest.raises(BodyMismatchError):
        side_by_side(gendered, columns, free_body)


def test_nothing_is_drawn_in_frames_that_are_not_valid(clip, free_body):
    (frame, *_) = side_by_side(clip, {"blind": standing(valid=False)}, free_body)
    assert np.array_equal(panel(frame, OVER, 1), panel(frame, OVER, 0))
    assert (panel(frame, BESIDE, 1) == 255).all()


def test_names_are_written_and_long_ones_fit(clip, free_body):
    (frame, *_) = side_by_side(clip, {"a name that is far too long to be written at full size": standing()}, free_body)
    ink = np.flatnonzero((panel(frame, slice(0, 24), 1) < 128).any((0, 2)))
    assert ink.min() > 2 and ink.max() < 253 and np.ptp(ink) > 200


def test_an_mp4(clip, free_body, tmp_path):
    write_side_by_side(tmp_path / "a.mp4", clip, {"upright": standing()}, free_body)
    write_side_by_side(tmp_path / "slow.mp4", clip, {"upright": standing()}, free_body, fps=5)
    written = Frames(tmp_path / "a.mp4")
    assert written.fps == clip.fps and Frames(tmp_path / "slow.mp4").fps == 5
    drawn = np.stack(list(side_by_side(clip, {"upright": standing()}, free_body)))
    assert np.abs(np.stack(list(written)).astype(int) - drawn).mean() < 8


def test_a_moving_picture_in_tensorboard(tmp_path):
    frames = [np.full((20, 30, 3), colour, np.uint8) for colour in ((250, 10, 10), (10, 250, 10), (10, 10, 250))]
    with SummaryWriter(str(tmp_path)) as writer:
        log_video(writer, "side_by_side", iter(frames), 25.0, step=7)
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("side_by_side")
    assert (event.step, event.width, event.height) == (7, 30, 20)
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert (picture.format, picture.n_frames, picture.info["duration"], picture.info["loop"]) == ("GIF", 3, 40, 0)
    for number, frame in enumerate(frames):
        picture.seek(number)
        assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - frame).max() < 8


def test_mistakes(clip, free_body):
    with pytest.raises(ValueError, match="'short' must have the clip's 3 frames, got 1"):
        side_by_side(clip, {"short": standing((0.9,))}, free_body)
    with pytest.raises(BodyMismatchError, match="clip clip belongs to body 'stick@0'"):
        side_by_side(drawn_clip(frames=1), {}, free_body)
    with pytest.raises(ValueError, match=r"camera must have shape \(3, 3\), got \(3, 2\)"):
        PosedMotion(standing().rotations, torch.zeros(3, 10), torch.zeros(3, 2), torch.ones(3, dtype=torch.bool))
