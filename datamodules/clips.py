"""ClipDataModule: training and validation clips from shards, made on first use, in an order that resumes exactly."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.order import ResumableLoader, SampleId, TrainOrder, ValidationOrder
from datamodules.samples import TrainSamples, TrainSampling, ValidationSamples
from datamodules.stream import StreamLoader
from fasthmr.body import BodyModel, load_body, require_same_body
from fasthmr.data.batch import ClipSample, collate
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ClipStore, ShardError, ensure_shards
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.data.transforms import CROP_SCALE, Augmentation

log = logging.getLogger(__name__)


class ClipDataModule(L.LightningDataModule):
    """Clips in shards, for training and for validation.

    Training reads clips at random through the shards' index by default: which clip, frames and augmentation make up
    batch n is a function of (seed, n, rank) alone, so a run resumed from any checkpoint, also one from the middle of an
    epoch, sees exactly what it would have seen. With `streaming` shards are read in sequence, for sets that are too
    large or too far away to be read at random: reproducible, but a resumed run draws anew (`datamodules.stream`).

    Validation always reads through the index: every clip once over all ranks, none twice, its middle window of
    consecutive frames, no augmentation. A rank may have no validation clip at all.

    The trainer must run with `use_distributed_sampler=False`: the ranks' shares are dealt out here.

    Args:
        train: directory of the training shards.
        val: directory of the validation shards.
        body: "free", or path of an SMPL-format body file; the shards' labels must belong to it.
        make_train: what to make if `train` holds no finished shards yet; null: they must be there.
        make_val: the same for `val`.
        batch_size: clips per training batch and rank.
        frames_per_clip: frames taken from a clip for training, one at random from each of as many equal parts.
        val_batch_size: clips per validation batch and rank.
        val_frames: consecutive frames taken from a clip for validation; at least 3, or there is no acceleration.
        workers: loader processes per rank and loader, and processes that make shards.
        seed: of order, frames and augmentation.
        augmentation: of training samples.
        crop_scale: side of the network's crop over that of the tight person box.
        streaming: read training shards in sequence.
        clips_per_epoch: clips of an epoch over all ranks when streaming (an index knows how many there are; a stream
            does not end); null: as many as the set has.
        shuffle_buffer: clips each worker holds back for shuffling when streaming.
    """

    def __init__(
        self,
        train: str | Path,
        val: str | Path,
        body: str = "free",
        make_train: SynthConfig | None = None,
        make_val: SynthConfig | None = None,
        batch_size: int = 8,
        frames_per_clip: int = 8,
        val_batch_size: int = 4,
        val_frames: int = 16,
        workers: int = 2,
        seed: int = 0,
        augmentation: Augmentation = Augmentation(),  # noqa: B008  (frozen, so sharing it is safe)
        crop_scale: float = CROP_SCALE,
        streaming: bool = False,
        clips_per_epoch: int | None = None,
        shuffle_buffer: int = 64,
    ) -> None:
        super().__init__()
        # a rank without validation clips is fine: ranks only meet at the end of validation
        self.allow_zero_length_dataloader_with_multiple_devices = True
        at_least = {
            "batch_size": (batch_size, 1),
            "frames_per_clip": (frames_per_clip, 1),
            "val_batch_size": (val_batch_size, 1),
            "val_frames": (val_frames, 3),
            "workers": (workers, 0),
            "seed": (seed, 0),
            "shuffle_buffer": (shuffle_buffer, 1),
        }
        for name, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if clips_per_epoch is not None and not streaming:
            raise ValueError("clips_per_epoch is for streaming: true; otherwise limit trainer.limit_train_batches")
        self.train_dir, self.val_dir, self.body = Path(train), Path(val), body
        self.make_train, self.make_val = make_train, make_val
        self.batch_size, self.val_batch_size, self.val_frames = batch_size, val_batch_size, val_frames
        self.sampling = TrainSampling(frames_per_clip, augmentation, crop_scale)
        self.workers, self.seed = workers, seed
        self.streaming, self.clips_per_epoch, self.shuffle_buffer = streaming, clips_per_epoch, shuffle_buffer
        self._train_store: ClipStore | None = None
        self._val_store: ClipStore | None = None
        self._resumed_order: dict[str, Any] | None = None

    # ---- Lightning's stages ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the shards that are missing; called by one process per machine, before any other opens them.

        Raises:
            BodyMismatchError: the model that is to be trained has another body.
            ShardError: a folder holds something else than what is to be made there.
            OSError, ValueError: motion or backgrounds cannot be read; nothing has been made by then.
        """
        self._require_body_of_model()
        to_make = [
            (role, key, directory, SynthSource(config, load_body(self.body)))
            for role, key, directory, config in (
                ("training", "train", self.train_dir, self.make_train),
                ("validation", "val", self.val_dir, self.make_val),
            )
            if config is not None
        ]
        for role, key, directory, source in to_make:
            log.info("%s set: %d clips in %s (made now as far as they are missing)", role, len(source), directory)
            try:
                ensure_shards(source, directory, workers=max(1, self.workers))
            except ShardError as error:
                raise ShardError(f"{error} (--data_dir, or data.init_args.{key}, says which)") from error

    def setup(self, stage: str | None = None) -> None:
        """Open the shards.

        Raises:
            ShardError: no finished set of shards, or a damaged one.
            BodyMismatchError: labels, or a model, of another body.
            ValueError: a clip that is shorter than the frames to be taken from it, or no validation clip at all.
        """
        self._require_body_of_model()
        if stage in (None, "fit") and self._train_store is None:
            self._train_store = self._open(self.train_dir, self.sampling.frames, "frames_per_clip")
        if self._val_store is None:
            self._val_store = self._open(self.val_dir, self.val_frames, "val_frames")
            if len(self._val_store) == 0:
                raise ValueError(
                    f"there are no validation clips in {self.val_dir}: make some (make_val.clips), or give another "
                    "folder with data.init_args.val"
                )

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        store = self._opened(self._train_store)
        rank, world_size = self._process()
        if self.streaming:
            clips = self.clips_per_epoch or len(store)
            return StreamLoader(
                store.shards,
                self.sampling,
                self.batch_size,
                batches=clips // (self.batch_size * world_size),
                buffer=self.shuffle_buffer,
                seed=self.seed,
                batches_done=self._batches_done,
                rank=rank,
                workers=self.workers,
                pin_memory=torch.cuda.is_available(),
            )
        self._check_resumed_order(store)
        order = TrainOrder(len(store), self.batch_size, self.seed, self._batches_done, rank, world_size)
        order.epoch_length = self._epoch_length(len(order))
        return ResumableLoader(
            _Located(TrainSamples(store, self.sampling, self.seed), store),
            batch_sampler=order,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or each epoch would advance torch's global generator
        )

    def val_dataloader(self) -> DataLoader[Any]:
        store = self._opened(self._val_store)
        rank, world_size = self._process()
        return DataLoader(
            _Located(ValidationSamples(store, self.val_frames, self.sampling.crop_scale), store),
            batch_sampler=ValidationOrder(len(store), self.val_batch_size, rank, world_size),
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    # ---- what a checkpoint says about the order -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the order of the training data follows from; the position in it is among the trainer's own counters."""
        return {} if self._train_store is None else {"order": self._order(self._train_store)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_order = state_dict["order"]

    def _order(self, store: ClipStore) -> dict[str, Any]:
        checksums = store.manifest.shards
        return {
            "streaming": self.streaming,
            "seed": self.seed,
            "clips": hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:16],
            "batch_size": self.batch_size,
            "ranks": self._process()[1],
        }

    def _check_resumed_order(self, store: ClipStore) -> None:
        ours, theirs = self._order(store), self._resumed_order or {}
        changed = [f"{k}: {v} -> {ours[k]}" for k, v in theirs.items() if ours[k] != v]
        if changed:
            raise ValueError(
                f"the checkpoint's order of training data cannot be continued ({'; '.join(changed)}): resume with "
                "the run's own settings, or start a new run from its weights"
            )

    # ---- internals ------------------------------------------------------------------------------------------------

    def _require_body_of_model(self) -> None:
        """Refuse a model of another body: losses and metrics would compare the joints of two bodies."""
        body = None if self.trainer is None else getattr(self.trainer.lightning_module, "body", None)
        if isinstance(body, BodyModel):
            require_same_body(body.id, load_body(self.body).id, where=f"the data (data.init_args.body={self.body})")

    def _open(self, directory: Path, frames: int, setting: str) -> ClipStore:
        store = ClipStore(directory)
        store.require_body(load_body(self.body).id)
        for key, length in store.lengths():
            if length < frames:
                raise ValueError(
                    f"clip {key} in {directory} has {length} frames, fewer than {setting}={frames}: "
                    f"lower {setting}, or make longer clips"
                )
        return store

    @staticmethod
    def _opened(store: ClipStore | None) -> ClipStore:
        if store is None:
            raise RuntimeError("call setup() before asking for a loader")
        return store

    def _process(self) -> tuple[int, int]:
        """(rank, world size) of this process; (0, 1) without a trainer."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _epoch_length(self, batches: int) -> int:
        """Batches that Lightning takes from an iteration of the training loader (`limit_train_batches`)."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return max(1, min(batches, limit if isinstance(limit, int) else int(batches * limit)))

    def _batches_done(self) -> int:
        """Training batches finished since the run began, also before it was resumed.

        `processed` counts a batch before the hooks that write checkpoints after it, and is not reset between epochs.
        """
        if self.trainer is None or self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            return 0  # overfit_batches, Lightning's debugging aid: every iteration is the first one again
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


class _Located(Dataset[ClipSample]):
    """Samples of a store; when a clip's pictures turn out to be damaged, the error names the shard, too."""

    def __init__(self, samples: TrainSamples | ValidationSamples, store: ClipStore) -> None:
        self.samples, self.store = samples, store

    def __getitem__(self, sample: SampleId | int) -> ClipSample:
        try:
            return self.samples[sample]  # type: ignore[index]
        except ClipError as error:
            shard = self.store.shard_of(sample.clip if isinstance(sample, SampleId) else sample)
            if str(shard) in str(error):
                raise
            raise ClipError(f"{shard}: {error}; `python -m fasthmr.shard verify {shard.parent}` finds all") from error
