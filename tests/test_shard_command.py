"""`python -m fasthmr.shard`: makes, shows and verifies sets; mistakes end in one line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_clips import drawn_clip

from fasthmr.conventions import MASK_OTHER
from fasthmr.data.schema import PackedImages
from fasthmr.data.shards import ClipStore
from fasthmr.data.sheet import contact_sheet
from fasthmr.shard import main


def test_a_set_is_made_with_the_options_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "walkers"
    command = ["make", "--out", str(folder), "--clips", "3", "--frames", "2", "--seed", "9", "--workers", "1"]
    assert main([*command, "--clips_per_shard", "2"]) == 0
    assert "3 clips, 6 frames, 2 shards, body free@" in capsys.readouterr().out
    assert ClipStore(folder).manifest.source["seed"] == 9


def test_inspecting_tells_and_shows(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_shards), "--show", str(tmp_path / "sheet.png"), "--clips", "4"]) == 0
    told = capsys.readouterr().out
    assert "6 clips, 96 frames, 2 shards" in told
    assert "synth-5-000005" in told
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (4 * 256, 6 * 256, 3)


def test_verifying_tells_by_its_exit_code(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_shards)]) == 0
    assert "no problems" in capsys.readouterr().out
    for file in tiny_shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "shard-000001.tar").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert "shard-000001.tar is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make --out OUT --clips 0", "clips must be"),
        ("make --out OUT --motion nowhere.npz", "nowhere.npz"),
        ("make --out OUT --backgrounds nowhere", "nowhere"),
        ("make --out OUT --body nowhere.pkl", "nowhere.pkl"),
        ("convert bedlam --root OUT --out OUT --crop_px 120", "--crop_px must be 384 to 8192, got 120"),
        ("convert bedlam --root OUT --out OUT --frames -3", "--frames must be 0 or more, got -3"),
        ("convert bedlam --root OUT --out OUT --max_missing -0.1", "--max_missing must be a share from 0 to 1"),
        ("convert amass --root OUT --out OUT --max_unusable 7", "a share from 0 to 1, such as 0.01, got 7"),
        ("convert amass --root OUT --out OUT --split x --crop_px 512", "so --split, --crop_px would do nothing"),
        ("inspect OUT", "there is no set of shards in"),
        ("verify OUT", "there is no set of shards in"),
    ],
)
def test_mistakes_end_in_one_line(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.replace("OUT", str(tmp_path / "out")).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["make", "--out", "out", "--clip_count", "3"])
    assert stop.value.code == 2
    assert "--clip_count" in capsys.readouterr().err


def test_the_help_of_convert_lists_sets_and_splits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "mpi_inf_3dhp: neural_annot, hybrik, spin, raw" in told
    assert "{threedpw,emdb," in told and "lambda" not in told


def test_the_contact_sheet_draws_masks_and_joints_where_they_are() -> None:
    clip = drawn_clip(frames=3)
    masks = [np.zeros((384, 384), np.uint8) for _ in range(3)]
    for mask in masks:
        mask[20:60, 20:60] = MASK_OTHER
    masked = type(clip)(**{**vars(clip), "masks": PackedImages.encode_png(masks)})
    sheet = contact_sheet([clip, masked], columns=2, tile_px=384).astype(int)
    assert sheet.shape == (2 * 384, 2 * 384, 3)
    tile = sheet[384:, :384]  # the second clip's first frame
    red = (tile[..., 0] > 180) & (tile[..., 1] < 110) & (tile[..., 2] < 110)
    assert red[30:50, 20].all()
    pelvis = np.append(clip.joints2d[0, 0, :2], 1) @ clip.crop_from_image[0].T
    x, y = np.rint(pelvis).astype(int)
    yellow = np.abs(tile[y - 1 : y + 2, x - 1 : x + 2] - [255, 220, 0]).max()
    assert yellow < 40
