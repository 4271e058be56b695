"""Frames and masks from disk, videos that are written whole, and masks by background difference."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from fasthmr.video.background import StaticBackground
from fasthmr.video.reading import Frames, Masks, VideoError
from fasthmr.video.writing import written_video


def moving_square(frames: int = 12, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, H, W, 3) with an orange square that moves over blue, and its masks (T, H, W)."""
    images = np.full((frames, height, width, 3), (20, 40, 160), np.uint8)
    masks = np.zeros((frames, height, width), bool)
    for number, mask in enumerate(masks):
        mask[16:32, 2 * number : 2 * number + 16] = True
    images[masks] = (240, 140, 20)
    return images, masks


def write_pictures(folder: Path, pictures: np.ndarray, ending: str = ".png", first: int = 8) -> Path:
    folder.mkdir()
    for number, picture in enumerate(pictures, first):  # 8, 9, 10: as text, 10 would come first
        if picture.ndim == 3:
            picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / f"frame_{number}{ending}"), picture.astype(np.uint8))
    return folder


def write_video(path: Path, pictures: np.ndarray, fps: float = 12.0) -> Path:
    with written_video(path, fps) as add:
        for picture in pictures:
            add(picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1).astype(np.uint8) * 255)
    return path


class TestFrames:
    def test_of_a_video(self, tmp_path):
        images, _ = moving_square()
        frames = Frames(write_video(tmp_path / "video.mp4", images))
        assert frames.fps == 12 and frames.expected == 12
        for _ in range(2):  # as often as one likes
            read = np.stack(list(frames))
            assert read.shape == images.shape and np.abs(read.astype(int) - images).mean() < 8

    def test_of_a_folder_in_the_order_of_numbers(self, tmp_path):
        images, _ = moving_square()
        frames = Frames(write_pictures(tmp_path / "pictures", images))
        (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
        assert frames.fps is None and frames.expected == 12
        assert np.array_equal(np.stack(list(frames)), images)

    def test_mistakes(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.mp4").write_text("not a video")
        broken = write_pictures(tmp_path / "broken", moving_square(2)[0])
        (broken / "frame_9.png").write_bytes(b"not a picture")
        for name, message in (
            ("nowhere", "there is no video or folder of pictures at"),
            ("empty", "holds no pictures"),
            ("text.mp4", "cannot be read as a video"),
            ("broken", "frame_9.png cannot be read as a picture"),
        ):
            with pytest.raises(VideoError, match=message):
                list(Frames(tmp_path / name))


class TestMasks:
    @pytest.mark.parametrize("kind", ["png", "dark png", "jpg", "npz", "video", "coloured png"])
    def test_say_where_the_person_is(self, tmp_path, kind):
        _, masks = moving_square()
        if kind == "npz":
            path = tmp_path / "masks.npz"
            np.savez(path, masks=masks)
        elif kind == "video":
            path = write_video(tmp_path / "masks.mp4", masks)
        else:
            values = masks * (1 if kind == "dark png" else 255)
            if kind == "coloured png":
                values = values[..., None] * np.array([0, 1, 0])
            path = write_pictures(tmp_path / "masks", values.astype(np.uint8), ".jpg" if kind == "jpg" else ".png")
        for _ in range(2):
            read = np.stack(list(Masks(path)))
            assert read.dtype == np.bool_ and (read != masks).mean() < (0.01 if kind in ("jpg", "video") else 1e-9)

    def test_labels(self, tmp_path):
        labels = moving_square()[1] * np.uint8(3)
        labels[:, 40:] = 7
        np.savez(tmp_path / "labels.npz", masks=labels)
        write_pictures(tmp_path / "labels", labels)
        for name in ("labels.npz", "labels"):
            assert np.array_equal(np.stack(list(Masks(tmp_path / name, subject=3))), labels)

    def test_mistakes(self, tmp_path):
        _, masks = moving_square()
        np.savez(tmp_path / "other.npz", frames=masks)
        np.savez(tmp_path / "floats.npz", masks=masks / 2)
        (tmp_path / "broken.npz").write_bytes(b"not a zip")
        write_video(tmp_path / "video.mp4", masks)
        write_pictures(tmp_path / "coloured", (masks[..., None] * np.array([0, 200, 0])).astype(np.uint8))
        for name, subject, message in (
            ("nowhere", None, "there are no masks at"),
            ("other.npz", None, "has no `masks`, only frames"),
            ("floats.npz", None, r"masks must be \(T, H, W\), bool or labels, got \(12, 48, 64\) float64"),
            ("broken.npz", None, "cannot be read as npz"),
            ("video.mp4", 1, "labels cannot be read from compressed pictures"),
            ("coloured", 1, "is coloured: labels are grey values"),
        ):
            with pytest.raises(VideoError, match=message):
                list(Masks(tmp_path / name, subject))


class TestWriting:
    def test_a_failure_leaves_what_was_there(self, tmp_path):
        images, _ = moving_square()
        path = write_video(tmp_path / "video.mp4", images)
        before = path.read_bytes()
        with pytest.raises(KeyboardInterrupt), written_video(path, 12.0) as add:
            add(images[0])
            raise KeyboardInterrupt
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["video.mp4"]

    def test_to_nowhere(self, tmp_path):
        with pytest.raises(OSError, match="cannot be written"), written_video(tmp_path / "no" / "v.mp4", 12.0) as add:
            add(moving_square()[0][0])


def scene(frames: int = 40, away: slice = slice(0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """A person of a head, a shirt and trousers, who sways in place before a noisy lawn and a house, and their masks."""
    rng = np.random.default_rng(0)
    height, width = 120, 160
    plate = np.full((height, width, 3), (70, 110, 50), np.float32)
    plate[:50] = (190, 190, 200)
    plate += cv2.GaussianBlur(rng.normal(0, 60, plate.shape), (0, 0), 2)
    images, masks = [], []
    for number in range(frames):
        image, mask = plate.copy(), np.zeros((height, width), np.uint8)
        x = int(80 + 12 * np.sin(number / 6))  # less than the width of the person
        if not away.start <= number < away.stop:
            for top, bottom, half, colour in ((20, 34, 7, (180, 120, 90)), (34, 66, 14, (60, 60, 110))):
                cv2.rectangle(image, (x - half, top), (x + half, bottom), colour, -1)
                cv2.rectangle(mask, (x - half, top), (x + half, bottom), 1, -1)
            for leg in (-8, 8):
                cv2.rectangle(image, (x + leg - 5, 66), (x + leg + 5, 110), (25, 20, 35), -1)
                cv2.rectangle(mask, (x + leg - 5, 66), (x + leg + 5, 110), 1, -1)
        images.append(np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8))
        masks.append(mask > 0)
    return np.stack(images), np.stack(masks)


def overlap(ours: np.ndarray, true: np.ndarray) -> float:
    return float((ours & true).sum() / (ours | true).sum())


class TestBackground:
    def test_of_a_person_who_hardly_moves(self):
        images, masks = scene()
        background = StaticBackground.learn(iter(images))
        ours = np.stack([background.person_mask(image) for image in images])
        assert overlap(ours, masks) > 0.8 and min(map(overlap, ours, masks)) > 0.7
        # What makes it work: the median, which is the usual background, has the person in it.
        usual = np.abs(images - np.median(images, 0)).max(-1) > 25
        assert overlap(usual, masks) < 0.5

    def test_nobody_there(self):
        images, masks = scene(60, away=slice(40, 60))
        background = StaticBackground.learn(images)
        assert not background.person_mask(images[50]).any()
        assert overlap(background.person_mask(images[10]), masks[10]) > 0.8

    def test_large_and_long_videos_are_looked_at_small_and_thinned_out(self):
        images, masks = scene(100)
        large = (cv2.resize(i, (640, 480), interpolation=cv2.INTER_NEAREST) for i in images)
        background = StaticBackground.learn(large)
        assert background.plate.shape == (240, 320, 3)
        mask = background.person_mask(cv2.resize(images[7], (640, 480), interpolation=cv2.INTER_NEAREST))
        true = cv2.resize(masks[7].astype(np.uint8), (640, 480), interpolation=cv2.INTER_NEAREST) > 0
        assert overlap(mask, true) > 0.8

    def test_the_same_every_time(self):
        images, _ = scene(12)
        plates = [StaticBackground.learn(images).plate for _ in range(2)]
        assert np.array_equal(*plates)

    def test_where_it_cannot_work(self):
        images, _ = scene(12)
        moving = np.stack([np.roll(image, 9 * number, axis=1) for number, image in enumerate(images)])
        for frames, message in (
            (moving, "of the picture changes: .* the camera stands still"),
            (np.repeat(images[:1], 12, 0), "nothing moves"),
            (images[:1], "is learnt from a video, got 1 frames"),
            (images[:0], "is learnt from a video, got 0 frames"),
        ):
            with pytest.raises(ValueError, match=message):
                StaticBackground.learn(frames)


def test_of_a_real_video():
    folder = os.environ.get("FASTHMR_TEST_DATA")
    video = Path(folder or "nowhere") / "media" / "video_juggle.mp4"
    if not video.exists():
        pytest.skip("set FASTHMR_TEST_DATA to a folder with media/video_juggle.mp4, 247 frames of a man with a ball")
    frames = Frames(video)
    assert frames.expected == 247
    background = StaticBackground.learn(frames)
    for number, frame in enumerate(frames):
        if number % 12:
            continue
        rows, columns = np.nonzero(background.person_mask(frame))
        assert 540 < np.ptp(rows) < 700 and 130 < np.ptp(columns) < 400  # he is some 600 px tall
        assert 600 < np.median(columns) < 800
