"""Masks that data sets bring along: BEDLAM's layers of each person."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fasthmr.conventions import MASK_OTHER, MASK_SUBJECT
from fasthmr.data.convert.reading import ConvertError, Picture, read_picture

_NAME = re.compile(r"(?P<stem>.+)_(?P<who>..)_(body|clothing|hair)\.png", re.DOTALL)


@dataclass(frozen=True)
class Layers:
    """BEDLAM's masks: for each picture STEM the files STEM_NN_LAYER.png, white where that layer of person NN shows.

    NN counts people, and nothing in the labels says whom: the tracked person is the one whose layers lie on most of the
    labelled joints.

    Args:
        folder: of the scene.
        stems: of the T pictures, with their folder.
        points: (T,J,2) the person's joints, px of the upright picture.
        quarter_turns: clockwise turns that bring the pictures upright.
    """

    folder: Path
    stems: Sequence[str]
    points: np.ndarray
    quarter_turns: int

    def __call__(self, frame: int) -> np.ndarray:
        """Instances (H,W) uint8 of the upright picture.

        Raises:
            ConvertError: the picture has no masks, or they differ in size.
        """
        stem = Path(self.stems[frame])
        people: dict[str, np.ndarray] = {}
        size: tuple[int, ...] | None = None
        for who, path in self._files.get(stem, ()):
            shown = read_picture(self.folder, Picture(path.relative_to(self.folder).as_posix()))[..., 0] > 127
            size = shown.shape if size is None else size
            if shown.shape != size:
                raise ConvertError(f"{path} has {shown.shape} px, other masks of the picture have {size}")
            people[who] = people[who] | shown if who in people else shown
        if not people:
            raise ConvertError(f"{self.folder / stem}_*_body.png are missing: the scene has masks, this picture none")
        upright = {who: np.rot90(shown, -self.quarter_turns) for who, shown in people.items()}
        on_joints = {who: share_on(shown, self.points[frame]) for who, shown in upright.items()}
        subject = max(on_joints, key=lambda who: on_joints[who])
        label = np.zeros(next(iter(upright.values())).shape, np.uint8)
        for who, shown in upright.items():
            label[shown] = MASK_SUBJECT if who == subject and on_joints[who] > 0 else MASK_OTHER
        return label

    @cached_property
    def _files(self) -> dict[Path, list[tuple[str, Path]]]:
        """(NN, file) of each layer, by STEM: one look at each folder, which holds those of all its pictures."""
        files: dict[Path, list[tuple[str, Path]]] = {}
        for parent in dict.fromkeys(Path(stem).parent for stem in self.stems):
            for path in sorted((self.folder / parent).glob("*.png")):
                if found := _NAME.fullmatch(path.name):
                    files.setdefault(parent / found["stem"], []).append((found["who"], path))
        return files


def share_on(shown: np.ndarray, points: np.ndarray) -> float:
    """Share of points (J,2) px that lie on a mask."""
    if not len(points):
        return 0.0
    x, y = np.rint(points).astype(int).T
    height, width = shown.shape
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    return float(shown[y[inside], x[inside]].sum() / len(points))
