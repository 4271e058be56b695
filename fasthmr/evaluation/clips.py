"""What is evaluated of a set: which clips and frames, whose labels, and where the network looks."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from datamodules.encoding import TrueFrames, cut_chunks
from datamodules.samples import middle_window
from fasthmr.body import BodyModel
from fasthmr.data.batch import ClipBatch
from fasthmr.data.schema import Clip, Gender
from fasthmr.data.shards import ClipStore
from fasthmr.evaluation.bodies import require_true_body
from fasthmr.evaluation.boxes import Detections
from fasthmr.evaluation.config import TRUTH, EvaluationConfig
from fasthmr.evaluation.lenses import Lenses


class Seen(NamedTuple):
    """What systems see of a clip.

    Attributes:
        frames: of the whole clip.
        start: the first one that is evaluated.
        gender: of the body that the labels are of.
        truth: labels of the frames that are evaluated.
        chunks: crops, of which the first `skip` frames come before `start`.
        skip: how many.
    """

    frames: int
    start: int
    gender: Gender
    truth: TrueFrames
    chunks: list[ClipBatch]
    skip: int


class EvaluatedClips(Dataset[Seen]):
    """The clips of a set that are evaluated: of a sample spread evenly over it, those that have labels.

    Every clip's labels are read when this is made, so that what is wrong with one shows before anything is computed. A
    loader's processes decode the pictures.

    Args:
        store: the set.
        config: which clips and frames, the boxes and the intrinsics.
        bodies: by the gender of labels.

    Attributes:
        genders: of each clip's labels.
        without_box, fitted_boxes: how many of the frames that are evaluated had no detected box, and one that was moved
            or shrunk; 0 with the clips' own boxes.

    Raises:
        ValueError: there is no clip, or one whose true mesh cannot be made, or whose detections or focal length
            cannot be used.
    """

    def __init__(self, store: ClipStore, config: EvaluationConfig, bodies: dict[Gender, BodyModel]) -> None:
        if not len(store):
            raise ValueError(f"{store.folder} has no clips")
        self.store, self.frames_per_clip = store, config.frames_per_clip
        self.detections = None if config.boxes == TRUTH else Detections(config.boxes)
        self.lenses = None if config.intrinsics == TRUTH else Lenses(config.intrinsics)
        self.genders: list[Gender] = []
        self.without_box = self.fitted_boxes = 0
        self._numbers: list[int] = []
        count = min(config.max_clips or len(store), len(store))
        for number in np.linspace(0, len(store) - 1, count).round().astype(int).tolist():
            clip = store[number]
            span = slice(*self._span(clip))
            if not TrueFrames.of(clip).valid[span].any():
                continue
            require_true_body(clip, bodies)
            if self.detections is not None:
                placed = self.detections.place(clip)
                self.without_box += int(placed.missing[span].sum())
                self.fitted_boxes += int(placed.fitted[span].sum())
            if self.lenses is not None:
                self.lenses.place(clip)
            self._numbers.append(number)
            self.genders.append(clip.gender)
        if not self._numbers:
            raise ValueError(f"{store.folder} has no pose labels to measure errors with: evaluate on a set that has")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Seen:
        clip = self.clip(index)
        start, stop = self._span(clip)
        chunks, skip = cut_chunks(clip, start, stop)
        return Seen(len(clip), start, clip.gender, TrueFrames.of(clip).rows(start, stop), chunks, skip)

    def clip(self, index: int) -> Clip:
        """Clip `index` of those that are evaluated, with the boxes and intrinsics that the network is shown."""
        clip = self.store[self._numbers[index]]
        clip = clip if self.detections is None else self.detections.place(clip).clip
        return clip if self.lenses is None else self.lenses.place(clip)

    def find(self, option: str, clip: int | str | None) -> int | None:
        """Where an option's clip is among those that are evaluated, of which it is the number or the key.

        Raises:
            ValueError: it is not; names the option.
        """
        if clip is None:
            return None
        keys = [key for key, _ in self.store.lengths()]
        evaluated = [keys[number] for number in self._numbers]
        if isinstance(clip, str) and clip in evaluated:
            return evaluated.index(clip)
        if isinstance(clip, int) and 0 <= clip < len(self):
            return clip
        raise ValueError(
            f"{option} must be the key of a clip that is evaluated, or a number below the {len(self)} of them, "
            f"got {clip!r}"
        )

    def clips_by_gender(self) -> dict[Gender, int]:
        """How many clips have labels of each body."""
        return dict(Counter(self.genders))

    def _span(self, clip: Clip) -> tuple[int, int]:
        """First frame, and last + 1, of those that are evaluated."""
        index = middle_window(len(clip), min(self.frames_per_clip or len(clip), len(clip)))
        return int(index[0]), int(index[-1]) + 1
