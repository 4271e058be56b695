"""MotionDataModule: windows of motion without pictures, seen by random cameras, for the motion prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.order import ResumableLoader, SampleId, TrainOrder, ValidationOrder
from fasthmr.conventions import NUM_BETAS
from fasthmr.data.synth.motion import Motion, MotionSource, load_motion_source
from fasthmr.data.synth.scene import random_camera

#: where a person's middle is above SMPL's `transl`, near enough to aim a camera
_MIDDLE_M = np.array([0.0, -0.1, 0.0])
_MOVING_CAMERA_SHARE = 0.5
_MAX_BETA = 2.5


@dataclass
class MotionBatch:
    """B windows of T frames; validated on construction.

    Attributes:
        rotations: (B, T, 24, 3, 3) float32 SMPL rotations, the root's in the camera frame (x right, y down, z forward).
        betas: (B, 10) float32, one body a window.
        valid: (B, T) bool, False for padding.
        fps: (B,) float32 frames a second.
        keys: B names of what is seen, each with the (epoch, number) that a window is drawn by.

    Raises:
        ValueError: a field has the wrong shape, or a number is not finite.
    """

    rotations: Tensor
    betas: Tensor
    valid: Tensor
    fps: Tensor
    keys: list[str]

    def __post_init__(self) -> None:
        batch, frames = self.rotations.shape[:2]
        for name, shape in (
            ("rotations", (batch, frames, 24, 3, 3)),
            ("betas", (batch, NUM_BETAS)),
            ("valid", (batch, frames)),
            ("fps", (batch,)),
        ):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MotionBatch:
        """The batch on another device."""
        rotations, betas, valid, fps = (
            t.to(device, non_blocking=non_blocking) for t in (self.rotations, self.betas, self.valid, self.fps)
        )
        return MotionBatch(rotations, betas, valid, fps, self.keys)


class MotionWindows(Dataset[dict[str, Any]]):
    """Windows that are drawn anew for every (epoch, number); a function of these and the seed.

    Args:
        source: of motions.
        window: frames T.
        fps: frames a second.
        seed: of everything random.
        shortest: windows are cut to a random length from here to `window`, and padded; None: never cut.
        procedural_share: of windows that move procedurally all the same.
    """

    def __init__(
        self,
        source: MotionSource,
        window: int,
        fps: float,
        seed: int,
        shortest: int | None = None,
        procedural_share: float = 0.0,
    ) -> None:
        self.source, self.window, self.fps, self.seed, self.shortest = source, window, fps, seed, shortest
        self.procedural, self.procedural_share = load_motion_source("procedural"), procedural_share

    def __getitem__(self, sample: SampleId | int) -> dict[str, Any]:
        epoch, number = sample if isinstance(sample, tuple) else (0, sample)
        rng = np.random.default_rng([self.seed, epoch, number])
        source = self.procedural if self.procedural_share and rng.random() < self.procedural_share else self.source
        motion = source.sample(rng, self.window, self.fps)
        betas = np.clip(rng.normal(size=NUM_BETAS), -_MAX_BETA, _MAX_BETA)
        frames = self.window if self.shortest is None else int(rng.integers(self.shortest, self.window + 1))
        return {
            "rotations": seen_by_camera(motion, rng),
            "betas": betas.astype(np.float32),
            "valid": np.arange(self.window) < frames,
            "fps": np.asarray(motion.fps, np.float32),
            "keys": f"{motion.name} ({epoch}, {number})",
        }


def seen_by_camera(motion: Motion, rng: np.random.Generator) -> np.ndarray:
    """SMPL rotations of a motion with the root in the frame of a random camera: (T, 24, 3, 3) float32."""
    target = motion.translation.astype(np.float64) + _MIDDLE_M
    camera = random_camera(rng, target, moving=rng.random() < _MOVING_CAMERA_SHARE)
    rotations = Rotation.from_rotvec(motion.pose.reshape(-1, 3)).as_matrix().reshape(*motion.pose.shape[:2], 3, 3)
    rotations[:, 0] = camera.rotation @ rotations[:, 0]
    return rotations.astype(np.float32)


def _collate(samples: list[dict[str, Any]]) -> MotionBatch:
    return MotionBatch(**default_collate(samples))


class MotionDataModule(L.LightningDataModule):
    """Random windows for training, fixed ones for validation.

    Args:
        train: "procedural", or an AMASS-format folder or pack.
        val: the same, for validation.
        procedural_share: of training windows that move procedurally all the same, where `train` is a motion set.
        window: frames of a window.
        fps: frames a second.
        windows_per_epoch: training windows of an epoch over all ranks; every epoch draws others.
        val_windows: validation windows over all ranks.
        batch_size: windows of a batch and rank.
        shortest: train also on windows cut to a random length from here on; null: never.
        workers: loader processes per rank.
        seed: of everything random.

    Raises:
        MotionError: there is no motion set.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        train: str = "procedural",
        val: str = "procedural",
        window: int = 81,
        fps: float = 30.0,
        windows_per_epoch: int = 2048,
        val_windows: int = 128,
        batch_size: int = 32,
        shortest: int | None = None,
        workers: int = 2,
        seed: int = 0,
        procedural_share: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= procedural_share <= 1:
            raise ValueError(f"procedural_share must be in [0, 1], got {procedural_share}")
        self.allow_zero_length_dataloader_with_multiple_devices = True
        for name, value, least in (
            ("window", window, 3),
            ("windows_per_epoch", windows_per_epoch, 1),
            ("val_windows", val_windows, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("shortest", shortest if shortest is not None else 2, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if shortest is not None and shortest > window:
            raise ValueError(f"shortest must be at most the window of {window} frames, got {shortest}")
        self.train, self.val, self.window, self.fps = train, val, window, fps
        self.windows_per_epoch, self.val_windows, self.batch_size = windows_per_epoch, val_windows, batch_size
        self.shortest, self.workers, self.seed = shortest, workers, seed
        self.procedural_share = procedural_share

    def setup(self, stage: str | None = None) -> None:
        self._train = MotionWindows(
            load_motion_source(self.train), self.window, self.fps, self.seed, self.shortest, self.procedural_share
        )
        # Another seed, or a procedural validation set would repeat the first training windows.
        self._val = MotionWindows(load_motion_source(self.val), self.window, self.fps, self.seed + 1_000_003)

    def first_windows(self, count: int) -> MotionBatch:
        """The first training windows, the same on every rank; what normalisation is taken from."""
        return _collate([self._train[i] for i in range(count)])

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = self._process()
        order = TrainOrder(self.windows_per_epoch, self.batch_size, self.seed, self._batches_done, rank, world_size)
        return ResumableLoader(
            self._train,
            batch_sampler=order,
            collate_fn=_collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world_size = self._process()
        return DataLoader(
            self._val,
            batch_sampler=ValidationOrder(self.val_windows, self.batch_size, rank, world_size),
            collate_fn=_collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),
        )

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _batches_done(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
