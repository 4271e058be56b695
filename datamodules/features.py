"""FeatureDataModule: windows of an encoder's features with the true poses, for training the diffusion decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.clips import ClipDataModule
from datamodules.encoding import EncodedFrames, FrameEncoder, People, TrueFrames, cut_chunks
from datamodules.feature_cache import CachedFrames, FeatureCache
from datamodules.mixture import Mixture
from datamodules.order import ResumableLoader, SampleId, ValidationOrder
from fasthmr.body import load_body, require_same_body
from fasthmr.checkpoint import load_encoder, read_header
from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.data.batch import ClipBatch
from fasthmr.data.remote import ShardCache
from fasthmr.data.shards import ClipStore
from fasthmr.data.synth.source import SynthConfig
from fasthmr.data.transforms import CROP_SCALE
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.precision import PrecisionChoice, chosen_precision, require_precision

_TENSORS = ("features", "rotations", "betas", "predicted_rotations", "predicted_betas", "camera", "valid", "fps")


@dataclass
class FeatureBatch:
    """B windows of T frames; validated on construction.

    Attributes:
        keys: the B clips' keys.
        features: (B, T, D) the encoder's, float32.
        rotations: (B, T, 24, 3, 3) true SMPL rotations, the root's in the camera frame (x right, y down, z forward).
        betas: (B, 10) true shape.
        predicted_rotations: (B, T, 24, 3, 3), predicted_betas: (B, T, 10), camera: (B, T, 3) the encoder's.
        valid: (B, T) bool, False for padding, which comes last, and for frames without a pose label.
        fps: (B,) float32 frames a second.

    Raises:
        ValueError: a field has the wrong shape, or a number is not finite (names the clips).
    """

    keys: list[str]
    features: Tensor
    rotations: Tensor
    betas: Tensor
    predicted_rotations: Tensor
    predicted_betas: Tensor
    camera: Tensor
    valid: Tensor
    fps: Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 3:
            raise ValueError(f"features must have shape (B, T, D), got {tuple(self.features.shape)}")
        windows, frames, dim = self.features.shape
        shapes: dict[str, tuple[int, ...]] = {
            "features": (windows, frames, dim),
            "rotations": (windows, frames, NUM_JOINTS, 3, 3),
            "betas": (windows, NUM_BETAS),
            "predicted_rotations": (windows, frames, NUM_JOINTS, 3, 3),
            "predicted_betas": (windows, frames, NUM_BETAS),
            "camera": (windows, frames, 3),
            "valid": (windows, frames),
            "fps": (windows,),
        }
        for name, shape in shapes.items():
            tensor, dtype = getattr(self, name), torch.bool if name == "valid" else torch.float32
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if len(self.keys) != windows:
            raise ValueError(f"keys must name the {windows} clips of the batch, got {len(self.keys)}: {self.keys}")
        for name in _TENSORS:
            finite = getattr(self, name).isfinite().flatten(1 if shapes[name][1:] else 0)
            rows = finite.all(1) if finite.ndim > 1 else finite
            if not rows.all():
                where = ", ".join(key for key, good in zip(self.keys, rows.tolist(), strict=True) if not good)
                raise ValueError(f"{name} holds numbers that are not finite, in the clips: {where}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FeatureBatch:
        """The batch on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return FeatureBatch(list(self.keys), **moved)


class LiveWindow(NamedTuple):
    """A window whose features are still to be computed: labels of its frames, chunks of pictures that hold them, and
    how many frames of the first chunk come before it."""

    truth: TrueFrames
    chunks: list[ClipBatch]
    skip: int


@dataclass
class LiveBatch:
    """Windows on their way to the device where the encoder runs."""

    windows: list[LiveWindow]


class Frames(Protocol):
    """Where windows come from."""

    def window(self, clip: int, start: int, stop: int) -> FeatureBatch | LiveWindow:
        """Frames `start` to `stop` of a clip."""


class Cached:
    """Windows with features from the cache; padded to `length` frames."""

    def __init__(self, frames: CachedFrames, length: int) -> None:
        self.frames, self.length = frames, length

    def window(self, clip: int, start: int, stop: int) -> FeatureBatch:
        """Frames `start` to `stop` of a clip, as a batch of one."""
        return one_window(*self.frames.frames(clip, start, stop), self.length)


class Live:
    """Windows with pictures, read from the shards."""

    def __init__(self, store: ClipStore, crop_scale: float) -> None:
        self.store, self.crop_scale = store, crop_scale

    def window(self, clip: int, start: int, stop: int) -> LiveWindow:
        """Frames `start` to `stop` of a clip."""
        record = self.store[clip]
        return LiveWindow(TrueFrames.of(record).rows(start, stop), *cut_chunks(record, start, stop, self.crop_scale))


class Mixed:
    """Windows of the sets of a mixture, whose clips are numbered through all of them."""

    def __init__(self, mixture: Mixture, frames: Mapping[str, Frames]) -> None:
        self.mixture, self.frames = mixture, frames

    def window(self, clip: int, start: int, stop: int) -> FeatureBatch | LiveWindow:
        """Frames `start` to `stop` of a clip."""
        name, number = self.mixture.place(clip)
        return self.frames[name].window(number, start, stop)


class TrainWindows(Dataset[Any]):
    """One window a clip; which one is a function of (seed, epoch, clip) alone. A clip that fits is taken whole."""

    def __init__(self, frames: Frames, lengths: Sequence[int], length: int, seed: int) -> None:
        self.frames, self.lengths, self.length, self.seed = frames, lengths, length, seed

    def __getitem__(self, sample: SampleId) -> FeatureBatch | LiveWindow:
        rng = np.random.default_rng([self.seed, sample.epoch, sample.clip])
        frames = min(self.length, self.lengths[sample.clip])
        start = int(rng.integers(self.lengths[sample.clip] - frames + 1))
        return self.frames.window(sample.clip, start, start + frames)


class ValidationWindows(Dataset[Any]):
    """All frames of all clips, once, in consecutive windows; a clip's last one may be shorter."""

    def __init__(self, frames: Frames, lengths: Sequence[int], length: int) -> None:
        self.frames = frames
        self.spans = [
            (clip, start, min(start + length, frames_of))
            for clip, frames_of in enumerate(lengths)
            for start in range(0, frames_of, length)
        ]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> FeatureBatch | LiveWindow:
        return self.frames.window(*self.spans[number])


class FeatureDataModule(ClipDataModule):
    """Windows of features of clips in shards, for training and for validation, in `ClipDataModule`'s order.

    Features are of the network's crops without augmentation. With `cache` they are computed once, before training, into
    files (`datamodules.feature_cache`); without, whenever a window is used, on the device that trains. Both give the
    same training, on the CPU bit for bit.

    Args:
        train: directory, URL or command of the training shards; or several by the names of their sets, a mixture
            (docs/mixtures.md).
        val: the same of the validation shards.
        encoder: checkpoint of the encoder.
        folder: where caches are.
        cache: compute features once, or live.
        body: "free", or path of an SMPL-format body file; labels and encoder must belong to it.
        make_train: what to make if `train` holds no finished shards yet; null: they must be there.
        make_val: the same for `val`.
        window: frames of a window, the motion prior's. Shorter clips are padded; of longer ones training takes a random
            window, validation all consecutive ones.
        batch_size: windows per training batch and rank.
        val_batch_size: windows per validation batch and rank.
        mask_people: whose tokens merging protects: the tracked person's, or all people's.
        precision: of the encoder: "bf16", "32", or "auto": bf16 where the device has instructions.
        crop_scale: side of the network's crop over that of the tight person box.
        workers: loader processes per rank and loader, and processes that make shards.
        seed: of order and windows.
        weights, clips_per_epoch: of a mixture, as of `ClipDataModule`; a sample is a window.
        shard_cache: where shards are kept that `train` or `val` name by URL or by a command (docs/shards.md).
    """

    def __init__(
        self,
        train: dict[str, str] | str | Path,  # in this order, or a parser makes text of a mapping
        val: str | Path,
        encoder: str,
        folder: str | Path = "features",
        cache: bool = True,
        body: str = "free",
        make_train: SynthConfig | None = None,
        make_val: SynthConfig | None = None,
        window: int = 81,
        batch_size: int = 32,
        val_batch_size: int = 8,
        mask_people: People = "subject",
        precision: PrecisionChoice = "auto",
        crop_scale: float = CROP_SCALE,
        workers: int = 2,
        seed: int = 0,
        weights: dict[str, float] | None = None,
        clips_per_epoch: int | None = None,
        shard_cache: ShardCache = ShardCache(),  # noqa: B008  (frozen, so sharing it is safe)
    ) -> None:
        super().__init__(
            train, val, body, make_train, make_val, batch_size, frames_per_clip=1, val_batch_size=val_batch_size,
            workers=workers, seed=seed, crop_scale=crop_scale, weights=weights, clips_per_epoch=clips_per_epoch,
            shard_cache=shard_cache,
        )  # fmt: skip
        if window < 3:
            raise ValueError(f"window must be at least 3, or there is no acceleration, got {window}")
        self.encoder, self.folder, self.cache, self.window = encoder, Path(folder), cache, window
        self.mask_people: People = mask_people
        require_precision(precision)
        self.precision: PrecisionChoice = precision
        self._frame_encoder: FrameEncoder | None = None
        self._encoder_id: str | None = None
        self._train_windows: TrainWindows | None = None
        self._val_windows: ValidationWindows | None = None

    @property
    def encoder_id(self) -> str:
        """Of the encoder whose features these are."""
        return self._encoder_id or self._encoder().id

    # ---- Lightning's stages ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the shards and features that are missing; called by one process per machine, before any other opens
        them.

        Raises:
            BodyMismatchError: the encoder, or the labels, belong to another body.
            FeatureCacheError: a file where features are to be written belongs to something else.
        """
        super().prepare_data()
        if self.cache:
            for directory in (*self.train_dirs.values(), self.val_dir):
                self._cache_of(self._open(directory)).fill(self._device(), self.workers)

    def setup(self, stage: str | None = None) -> None:
        """Open shards and features.

        Raises:
            ShardError: no finished set of shards, or a damaged one.
            BodyMismatchError: the encoder, or the labels, belong to another body.
            FeatureCacheError: cached features are missing, damaged, or of something else.
        """
        super().setup(stage)
        self._encoder_id = self.encoder_id
        if self._mixture is not None and self._train_windows is None:
            sets = {name: self._frames_of(store) for name, store in self._mixture.stores.items()}
            frames = Mixed(self._mixture, sets) if len(sets) > 1 else next(iter(sets.values()))
            self._train_windows = TrainWindows(frames, _lengths(self._mixture), self.window, self.seed)
        if self._val_store is not None and self._val_windows is None:
            self._val_windows = ValidationWindows(
                self._frames_of(self._val_store), _lengths(self._val_store), self.window
            )
        if self.cache:
            self._frame_encoder = None  # its memory is of use to others

    def train_dataloader(self) -> ResumableLoader:
        mixture = self._opened(self._mixture)
        assert self._train_windows is not None
        return ResumableLoader(
            self._train_windows,
            batch_sampler=self._train_order(mixture),
            collate_fn=_collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),  # or each epoch would advance torch's global generator
        )

    def val_dataloader(self) -> DataLoader[Any]:
        self._opened(self._val_store)
        assert self._val_windows is not None
        return DataLoader(
            self._val_windows,
            batch_sampler=ValidationOrder(len(self._val_windows), self.val_batch_size, *self._process()),
            collate_fn=_collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> FeatureBatch:
        """Move a batch, and compute its features where they are not cached."""
        return self._encoded(batch, device) if isinstance(batch, LiveBatch) else batch.to(device)

    def first_windows(self, count: int) -> FeatureBatch:
        """Training windows of clips spread evenly over the set, the same on every rank; for statistics."""
        assert self._train_windows is not None
        clips, device = len(self._train_windows.lengths), self._device()
        chosen = np.linspace(0, clips - 1, min(count, clips)).round().astype(int)
        windows = (_collate([self._train_windows[SampleId(0, int(clip))]]) for clip in chosen)
        return _joined([self.transfer_batch_to_device(window, device, 0).to("cpu") for window in windows])

    # ---- internals ------------------------------------------------------------------------------------------------

    def _encoded(self, batch: LiveBatch, device: torch.device) -> FeatureBatch:
        encoder, windows = self._encoder(), []
        for truth, chunks, skip in batch.windows:
            encoded = encoder(chunks, device).rows(skip, skip + len(truth.pose))
            windows.append(one_window(truth.to(device), encoded, self.window))
        return _joined(windows)

    def _open(self, directory: str | Path, frames: int = 1, setting: str = "") -> ClipStore:
        return super()._open(directory, 1, setting)  # clips of any length: what is missing in a window is padded

    def _encoder(self) -> FrameEncoder:
        if self._frame_encoder is None:
            require_same_body(load_body(self.body).id, read_header(self.encoder).body, where=self.encoder)
            precision = chosen_precision(self.precision, self._device())
            self._frame_encoder = FrameEncoder(load_encoder(self.encoder), self.mask_people, precision)
        return self._frame_encoder

    def _cache_of(self, store: ClipStore) -> FeatureCache:
        return FeatureCache(self.folder, store, self._encoder(), self.sampling.crop_scale)

    def _frames_of(self, store: ClipStore) -> Frames:
        if self.cache:
            return Cached(self._cache_of(store).open(), self.window)
        return Live(store, self.sampling.crop_scale)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device


def one_window(truth: TrueFrames, encoded: EncodedFrames, length: int) -> FeatureBatch:
    """A batch of one window of `length` frames; missing ones are padding."""
    missing = length - len(truth.pose)

    def padded(values: Tensor) -> Tensor:
        return F.pad(values, (*[0] * (2 * (values.ndim - 1)), 0, missing))[None]

    def turned(rotations: Tensor) -> Tensor:  # padding must be rotations, too
        still = torch.eye(3, device=rotations.device).expand(missing, NUM_JOINTS, 3, 3)
        return torch.cat((rotations, still))[None]

    return FeatureBatch(
        keys=[truth.key],
        features=padded(encoded.features),
        rotations=turned(axis_angle_to_matrix(truth.pose)),
        betas=truth.betas[None],
        predicted_rotations=turned(encoded.rotations),
        predicted_betas=padded(encoded.betas),
        camera=padded(encoded.camera),
        valid=padded(truth.valid),
        fps=truth.fps[None],
    )


def _collate(windows: list[Any]) -> FeatureBatch | LiveBatch:
    """What the windows of a data set are as a batch."""
    return LiveBatch(windows) if isinstance(windows[0], LiveWindow) else _joined(windows)


def _joined(batches: list[FeatureBatch]) -> FeatureBatch:
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in _TENSORS}
    return FeatureBatch([key for batch in batches for key in batch.keys], **tensors)


def _lengths(clips: ClipStore | Mixture) -> list[int]:
    return [frames for _, frames in clips.lengths()]
