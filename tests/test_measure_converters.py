"""docs/measure_converters.py measures every format that the command reads."""

from __future__ import annotations

import re
from pathlib import Path

import measure_converters
import pytest

from fasthmr.data.convert import SETS

DOCS = Path(__file__).parents[1] / "docs"
TABLE = (DOCS / "convert.md").read_text()
#: sets of which one split is as fast as another
SPLITS_ARE_ALIKE = {"threedpw", "emdb", "h36m"}


def rows(table: str) -> list[list[str]]:
    """The cells of each row, without the head."""
    return [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if re.match(r"\| \w+ \|", line)][1:]


def test_every_set_of_the_command_and_every_kind_of_labels_is_measured() -> None:
    measured = {(format.name, format.split or "all") for format in measure_converters.FORMATS}
    assert {name for name, _ in measured} == {*SETS, "amass"}
    for name, made in SETS.items():
        splits = set(made.splits)
        assert splits & {split for of, split in measured if of == name}
        assert name in SPLITS_ARE_ALIKE or splits <= {split for of, split in measured if of == name}


def test_the_documented_table_has_what_the_command_prints() -> None:
    section = TABLE.partition("**Speed.**")[2].partition("**What is kept**")[0]
    measured = [[f.name, f.labels or "-", f.pictures] for f in measure_converters.FORMATS]
    assert [row[:3] for row in rows(section)] == measured


def test_a_row_says_what_one_frame_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure_converters.main([str(tmp_path), "--frames", "16", "--runs", "1", "camerahmr"])
    told = capsys.readouterr().out
    assert "one core" in told.splitlines()[0]
    ((name, labels, pictures, read, frames, rate, decoding, written, _),) = rows(told)
    assert (name, labels, pictures, frames) == ("camerahmr", "-", "640x480 JPEG", "16")
    assert 100 < float(read) < 300 and 20 < float(written) < 100
    assert float(rate) > 0 and 0 < float(decoding.removesuffix(" %")) < 100
    assert not any(tmp_path.iterdir())


def test_a_set_that_the_command_does_not_know_is_named(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        measure_converters.main([str(tmp_path), "coco"])
    assert "SET must be of threedpw, emdb, bedlam" in capsys.readouterr().err
