"""`python -m fasthmr.shard masks`: a set without masks gets them, from a folder or a segmenter."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny_clips import IMAGE_SIZE, drawn_clip

import fasthmr.data.masks
from fasthmr.conventions import MASK_OTHER, MASK_SUBJECT
from fasthmr.data.convert.reading import ConvertError
from fasthmr.data.masks import MaskedSource, MaskFolder, RfDetr, Segmenter, Yolo, clips_id, tell_apart
from fasthmr.data.schema import Clip, PackedImages
from fasthmr.data.shards import ClipStore, verify_shards, write_shards
from fasthmr.geometry.boxes import invert_affine
from fasthmr.shard import main

FRAMES, CROP_PX = 2, 384


class WithoutMasks:
    """Two drawn clips; the second has masks."""

    def __len__(self) -> int:
        return 2

    def make(self, index: int) -> Clip:
        clip = drawn_clip(f"clip-{index}", FRAMES, seed=index)
        if index:
            return clip
        empty = PackedImages.encode_png([np.zeros((CROP_PX, CROP_PX), np.uint8)] * FRAMES)
        return replace(clip, masks=empty, status={**clip.status, "masks": "missing"})

    def describe(self) -> dict[str, Any]:
        return {"kind": "without", "body": "stick@0"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "bare"
    write_shards(WithoutMasks(), folder, progress=False)
    return folder


def true_mask(frame: int) -> np.ndarray:
    return drawn_clip("clip-0", FRAMES).masks.decode(frame) == MASK_SUBJECT


@pytest.mark.parametrize("of", ["crop", "full image"])
def test_masks_of_a_folder_come_into_the_set(bare: Path, tmp_path: Path, of: str) -> None:
    clip = ClipStore(bare)[0]
    (tmp_path / "masks/clip-0").mkdir(parents=True)
    for frame in range(FRAMES):
        mask = 255 * true_mask(frame).astype(np.uint8)
        if of == "full image":
            mask = cv2.warpAffine(mask, invert_affine(clip.crop_from_image[frame]), tuple(IMAGE_SIZE.tolist()))
        cv2.imwrite(str(tmp_path / f"masks/clip-0/{frame:05d}.png"), mask)
    command = ["masks", str(bare), "--out", str(tmp_path / "out"), "--by", "folder"]
    assert main([*command, "--source", str(tmp_path / "masks")]) == 0
    assert verify_shards(tmp_path / "out") == []
    masked, untouched = ClipStore(tmp_path / "out")
    before, after = (ClipStore(folder).manifest for folder in (bare, tmp_path / "out"))
    assert clips_id(before) == clips_id(after) and before.shards != after.shards
    assert masked.status["masks"] == "pseudo" and untouched.status["masks"] == "ground_truth"
    for frame in range(FRAMES):
        both = np.stack([masked.masks.decode(frame) == MASK_SUBJECT, true_mask(frame)])
        assert both.all(0).sum() / both.any(0).sum() > (0.999 if of == "crop" else 0.75)  # dots are a few pixels small


def test_frames_in_which_nobody_was_found_are_counted(bare: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "masks/clip-0").mkdir(parents=True)
    for frame in range(FRAMES):  # in the first, nobody
        cv2.imwrite(str(tmp_path / f"masks/clip-0/{frame:05d}.png"), 255 * frame * true_mask(frame).astype(np.uint8))
    command = ["masks", str(bare), "--out", str(tmp_path / "out"), "--by", "folder"]
    assert main([*command, "--source", str(tmp_path / "masks")]) == 0
    assert "the person was not found in 1 of 4 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "message"), [(None, "cannot be read"), ((100, 90), "is 90x100 px; it must have the size")]
)
def test_a_missing_or_ill_fitting_mask_is_named(
    bare: Path, tmp_path: Path, shape: tuple[int, int] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "masks/clip-0").mkdir(parents=True)
    if shape:
        cv2.imwrite(str(tmp_path / "masks/clip-0/00000.png"), np.zeros(shape, np.uint8))
    command = ["masks", str(bare), "--out", str(tmp_path / "out"), "--by", "folder"]
    assert main([*command, "--source", str(tmp_path / "masks")]) == 2
    error = capsys.readouterr().err
    assert message in error and "00000.png" in error


def test_what_is_not_installed_is_said_with_its_licence(bare: Path, tmp_path: Path, capsys) -> None:
    for name, licence in (("yolo", "AGPL-3.0"), ("rfdetr", "Apache-2.0")):
        try:
            __import__({"yolo": "ultralytics"}.get(name, name))
        except ImportError:
            assert main(["masks", str(bare), "--out", str(tmp_path / "out"), "--by", name, "--source", "w.pt"]) == 2
            assert licence in capsys.readouterr().err


def test_the_person_of_the_box_is_the_subject() -> None:
    people = np.zeros((3, 100, 100), bool)
    people[0, 10:40, 10:20] = True
    people[1, 30:90, 40:70] = True
    people[2, :5, :5] = True
    label = tell_apart(people, np.array([35.0, 30, 95, 90]))
    assert (label[people[1]] == MASK_SUBJECT).all() and (label[people[0]] == MASK_OTHER).all()
    assert (tell_apart(people[:1], np.array([60.0, 60, 99, 99])) != MASK_SUBJECT).all()
    assert not tell_apart(people[:0], np.array([0.0, 0, 9, 9])).any()


class FakeYolo:
    """Answers as ultralytics does: a list of a result, whose masks are a tensor (N,H,W), or None."""

    def __init__(self, task: str = "segment", names: tuple[str, ...] = ("dog", "person")) -> None:
        self.task, self.names = task, dict(enumerate(names))

    def predict(self, image: np.ndarray, classes: list[int], retina_masks: bool, verbose: bool) -> list[Any]:
        assert classes == [1] and retina_masks
        red = image[..., 2] > 180  # it takes BGR
        masks = torch.from_numpy(np.stack([red, np.zeros_like(red)])).float()
        return [SimpleNamespace(masks=SimpleNamespace(data=masks) if red.any() else None)]


class FakeRfDetr:
    """Answers as supervision's Detections: `mask` (N,H,W) bool or None, and the classes by name."""

    def __init__(self, names: tuple[str, ...] = ("cat", "person")) -> None:
        self.class_names = list(names)

    def predict(self, image: np.ndarray, threshold: float) -> Any:
        red = image[..., 0] > 180
        return SimpleNamespace(mask=np.stack([~red, red]), data={"class_name": np.array(["cat", "person"], object)})


def fake_yolo(weights: str) -> FakeYolo:
    return FakeYolo()


def fake_rfdetr(weights: str) -> FakeRfDetr:
    return FakeRfDetr()


@pytest.mark.parametrize("segmenter", [Yolo("n.pt", fake_yolo), RfDetr("w", fake_rfdetr)])
def test_adapters_ask_their_networks_for_people_only(bare: Path, segmenter: Segmenter) -> None:
    clip = MaskedSource(bare, segmenter).make(0)
    image, mask = clip.frames.decode(0), clip.masks.decode(0)
    assert clip.status["masks"] == "pseudo"
    assert np.array_equal(mask == MASK_SUBJECT, image[..., 0] > 180) and (mask == MASK_SUBJECT).any()
    blank = np.zeros((CROP_PX, CROP_PX, 3), np.uint8)
    assert not segmenter.people(clip, 0, blank).any()
    in_another_process = pickle.loads(pickle.dumps(segmenter))
    assert np.array_equal(in_another_process.people(clip, 0, image), segmenter.people(clip, 0, image))


@pytest.mark.parametrize("network", [FakeYolo(task="detect"), FakeYolo(names=("dog", "cat"))])
def test_a_network_that_makes_no_masks_of_people_is_refused(network: FakeYolo) -> None:
    with pytest.raises(ConvertError, match=r"n\.pt is a network to \w+ 2 classes: it takes one to segment"):
        Yolo("n.pt", lambda _: network)


def test_an_rf_detr_that_does_not_know_people_is_refused() -> None:
    with pytest.raises(ConvertError, match=r"w\.pt knows the classes dog, cat: it takes .* classes is 'person'"):
        RfDetr("w.pt", lambda _: FakeRfDetr(names=("dog", "cat")))


def test_an_rf_detr_that_only_finds_boxes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = SimpleNamespace(model_config=SimpleNamespace(segmentation_head=False))
    package = SimpleNamespace(RFDETR=SimpleNamespace(from_checkpoint=lambda _: network), RFDETRSegMedium=None)
    monkeypatch.setitem(sys.modules, "rfdetr", package)
    with pytest.raises(ConvertError, match=r"boxes\.pt finds boxes only: it takes a network with masks"):
        RfDetr("boxes.pt")


@pytest.mark.parametrize(("segmenter", "load"), [(Yolo, fake_yolo), (RfDetr, fake_rfdetr)])
def test_other_weights_of_the_same_name_are_told_apart(segmenter: Any, load: Any, tmp_path: Path) -> None:
    """Or a set that goes on with them would be of both."""
    weights = tmp_path / "n.pt"
    weights.write_bytes(b"one")
    one = segmenter(str(weights), load).describe()
    assert one["weights"] == "n.pt" and one == segmenter(str(weights), load).describe()
    weights.write_bytes(b"two")
    assert segmenter(str(weights), load).describe() != one
    assert segmenter("elsewhere.pt", load).describe()["sha256"] is None


def test_other_masks_in_a_folder_are_told_apart(tmp_path: Path) -> None:
    mask = tmp_path / "clip/00000.png"
    mask.parent.mkdir()
    mask.write_bytes(b"one")
    before = MaskFolder(tmp_path).describe()
    mask.write_bytes(b"longer")
    assert MaskFolder(tmp_path).describe() != before and before["files"] == 1


@pytest.mark.parametrize("by", ["yolo", "rfdetr"])
@pytest.mark.parametrize("error", [RuntimeError("no zip\nat all"), UnpicklingError("os.system"), KeyError("model")])
def test_whatever_loaders_say_of_bad_weights_is_one_line(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, by: str, error: Exception
) -> None:
    def load(weights: str) -> None:
        raise error

    monkeypatch.setattr(fasthmr.data.masks, {"yolo": "_ultralytics", "rfdetr": "_rfdetr"}[by], load)
    assert main(["masks", str(bare), "--out", str(tmp_path / "out"), "--by", by, "--source", "bad.pt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the weights 'bad.pt' could not be loaded: {type(error).__name__}: ")
    assert not (tmp_path / "out").exists()
