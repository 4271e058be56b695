"""From a store of clips to single samples: which frames of a clip are taken, and from which seed they are varied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from datamodules.order import SampleId
from fasthmr.data.batch import ClipSample
from fasthmr.data.schema import Clip
from fasthmr.data.transforms import CROP_SCALE, Augmentation, make_sample


class Clips(Protocol):
    """Clips by position: one set (`ClipStore`), or several as one (`datamodules.mixture`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...

    def shard_of(self, index: int) -> Path: ...


@dataclass(frozen=True)
class TrainSampling:
    """How a training sample is taken from a clip: how many frames, how augmented."""

    frames: int
    augmentation: Augmentation
    crop_scale: float = CROP_SCALE


class TrainSamples(Dataset[ClipSample]):
    """Training samples; `samples[SampleId(epoch, clip)]` depends on (seed, epoch, clip) and on nothing else."""

    def __init__(self, clips: Clips, sampling: TrainSampling, seed: int) -> None:
        self.clips, self.sampling, self.seed = clips, sampling, seed

    def __getitem__(self, sample: SampleId) -> ClipSample:
        clip = self.clips[sample.clip]
        rng = np.random.default_rng([self.seed, sample.epoch, sample.clip])
        frame_index = stratified_frames(len(clip.frames), self.sampling.frames, rng)
        return make_sample(clip, frame_index, rng, self.sampling.augmentation, self.sampling.crop_scale)


class ValidationSamples(Dataset[ClipSample]):
    """Validation samples: the middle window of each clip, consecutive frames, nothing random."""

    def __init__(self, clips: Clips, window: int, crop_scale: float = CROP_SCALE) -> None:
        self.clips, self.window, self.crop_scale = clips, window, crop_scale

    def __getitem__(self, index: int) -> ClipSample:
        clip = self.clips[index]
        frame_index = middle_window(len(clip.frames), self.window)
        return make_sample(clip, frame_index, np.random.default_rng(0), Augmentation.off(), self.crop_scale)


def stratified_frames(length: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame from each of `frames` equal parts of a clip: (frames,) int64, strictly increasing.

    Neighbouring frames look alike, so spreading them shows a network more per decoded frame than a window would.
    A worked number: 81 frames in 8 parts gives one of frames 0..9, one of 10..19, ..., one of 70..80.

    Raises:
        ValueError: the clip has fewer frames than parts.
    """
    _require_length(length, frames)
    edges = np.arange(frames + 1, dtype=np.int64) * length // frames
    return rng.integers(edges[:-1], edges[1:])


def middle_window(length: int, window: int) -> np.ndarray:
    """`window` consecutive frames from the middle of a clip: (window,) int64.

    Raises:
        ValueError: the clip is shorter than the window.
    """
    _require_length(length, window)
    start = (length - window) // 2
    return np.arange(start, start + window, dtype=np.int64)


def _require_length(length: int, frames: int) -> None:
    if not 0 < frames <= length:
        raise ValueError(f"cannot take {frames} frames from a clip of {length}")
