"""The real YOLO11-seg and RF-DETR-seg, with random weights, behind `python -m fasthmr.shard masks`.

Their read-outs are set so that every place of the picture is a person, or a dog: then a random network makes masks.
YOLO's file is saved by ultralytics, RF-DETR's here, in the layout that rfdetr reads.
Skipped where the extras `yolo` and `rfdetr` are not installed: `make test-segmenters` installs them.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clips import drawn_clip

from fasthmr.conventions import MASK_SUBJECT
from fasthmr.data.convert.reading import ConvertError
from fasthmr.data.masks import RfDetr
from fasthmr.data.schema import Clip, PackedImages
from fasthmr.data.shards import ClipStore, verify_shards, write_shards
from fasthmr.shard import main

os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")  # as the command does; these tests import ultralytics before it
FRAMES, CROP_PX = 2, 384
CERTAIN = 5.0


class WithoutMasks:
    """A drawn clip that has no masks."""

    def __len__(self) -> int:
        return 1

    def make(self, index: int) -> Clip:
        clip = drawn_clip("clip", FRAMES)
        empty = PackedImages.encode_png([np.zeros((CROP_PX, CROP_PX), np.uint8)] * FRAMES)
        return replace(clip, masks=empty, status={**clip.status, "masks": "missing"})

    def describe(self) -> dict[str, Any]:
        return {"kind": "without", "body": "stick@0"}


def masked(folder: Path, by: str, weights: Path, workers: int = 1) -> list[np.ndarray]:
    """The masks that the command writes of the clip."""
    write_shards(WithoutMasks(), folder / "bare", progress=False)
    command = ["masks", str(folder / "bare"), "--out", str(folder / "out"), "--by", by, "--source", str(weights)]
    assert main([*command, "--workers", str(workers)]) == 0
    assert verify_shards(folder / "out") == []
    (clip,) = ClipStore(folder / "out")
    assert clip.status["masks"] == "pseudo"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    described = {"segmenter": by, "weights": weights.name, "sha256": sha256}
    assert ClipStore(folder / "out").manifest.source["masks"] == described
    return [clip.masks.decode(frame) for frame in range(FRAMES)]


@torch.no_grad()
def yolo_file(path: Path, class_name: str, network: str = "yolo11n-seg.yaml") -> Path:
    """Everything is `class_name`, and everything in its box is its mask."""
    yolo = pytest.importorskip("ultralytics").YOLO(network)
    yolo.model.names |= {0: "person", 16: "dog"}  # COCO's, which one without weights does not know
    head = yolo.model.model[-1]
    for scores in head.cv3:
        scores[-1].bias.fill_(-CERTAIN)
    # boxes of the coarsest places are about as large as the person's
    head.cv3[-1][-1].bias[[number for number, name in yolo.names.items() if name == class_name]] = CERTAIN
    for coefficients in getattr(head, "cv4", ()):
        coefficients[-1].weight.zero_()
        coefficients[-1].bias.fill_(1.0)
    if hasattr(head, "proto"):
        head.proto.cv3.bn.bias.fill_(CERTAIN)
    yolo.save(path)
    return path


@pytest.mark.parametrize(("class_name", "found"), [("person", True), ("dog", False)])
def test_yolo11_seg(tmp_path: Path, class_name: str, found: bool) -> None:
    masks = masked(tmp_path, "yolo", yolo_file(tmp_path / "yolo11n-seg.pt", class_name), workers=1 + found)
    assert all((mask == MASK_SUBJECT).any() == found for mask in masks)
    for mask in masks if found else ():  # one person's mask, all within a box
        rows, columns = np.nonzero(mask == MASK_SUBJECT)
        assert (mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == MASK_SUBJECT).mean() > 0.95


def test_a_yolo_that_only_finds_boxes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = yolo_file(tmp_path / "yolo11n.pt", "person", "yolo11n.yaml")
    write_shards(WithoutMasks(), tmp_path / "bare", progress=False)
    command = ["masks", str(tmp_path / "bare"), "--out", str(tmp_path / "out"), "--by", "yolo"]
    assert main([*command, "--source", str(weights)]) == 2
    assert "is a network to detect 80 classes: it takes one to segment" in capsys.readouterr().err


def rf_detr_file(path: Path, category: int, **args: Any) -> Path:
    """Everything is of `category`, and everything is its mask."""
    rfdetr = pytest.importorskip("rfdetr")
    torch.manual_seed(0)
    network = rfdetr.RFDETRSegNano(pretrain_weights=None, device="cpu").model.model
    with torch.no_grad():
        network.class_embed.bias.fill_(-CERTAIN)
        network.class_embed.bias[category] = CERTAIN
        network.segmentation_head.bias.fill_(CERTAIN)
    torch.save({"model": network.state_dict(), "args": {"num_classes": 90, **args}}, path)
    return path


@pytest.mark.parametrize(("category", "found"), [(1, True), (18, False)])
def test_rf_detr_seg(tmp_path: Path, category: int, found: bool) -> None:
    """COCO's category 1 is people, 18 dogs."""
    weights = rf_detr_file(tmp_path / "rf-detr-seg-nano.pt", category)
    masks = masked(tmp_path, "rfdetr", weights, workers=1 + found)
    assert all((mask == MASK_SUBJECT).any() == found for mask in masks)


def test_an_rf_detr_goes_to_other_processes_after_it_ran(tmp_path: Path) -> None:
    segmenter = RfDetr(str(rf_detr_file(tmp_path / "rf-detr-seg-nano.pt", 1)))
    clip = drawn_clip("clip", FRAMES)
    here, there = (
        one.people(clip, 0, clip.frames.decode(0)) for one in (segmenter, pickle.loads(pickle.dumps(segmenter)))
    )
    assert here.any() and np.array_equal(here, there)


def test_an_rf_detr_that_does_not_know_people_is_refused(tmp_path: Path) -> None:
    weights = rf_detr_file(tmp_path / "rf-detr-seg-nano.pt", 1, class_names=["dog", "cat"])
    with pytest.raises(ConvertError, match="knows the classes dog, cat: it takes a network one of whose classes is"):
        RfDetr(str(weights))


class Hostile:
    """A pickle that makes a file when it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(("by", "package"), [("yolo", "ultralytics"), ("rfdetr", "rfdetr")])
@pytest.mark.parametrize("what", ["junk", "hostile"])
def test_bad_weights_end_in_one_line_and_nothing_of_them_is_run(
    tmp_path: Path, by: str, package: str, what: str
) -> None:
    pytest.importorskip(package)
    weights = tmp_path / "rf-detr-seg-nano.pt"
    torch.save({"model": Hostile(tmp_path / "it ran"), "args": {}}, weights)
    if what == "junk":
        weights.write_bytes(b"no weights at all")
    write_shards(WithoutMasks(), tmp_path / "bare", progress=False)
    command = ["masks", str(tmp_path / "bare"), "--out", str(tmp_path / "out"), "--by", by, "--source", str(weights)]
    # in a process that has not imported the package: then it is set to be safe
    ended = subprocess.run([sys.executable, "-m", "fasthmr.shard", *command], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"error: the weights '{weights}' could not be loaded: ")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "it ran").exists() and not (tmp_path / "out").exists()
