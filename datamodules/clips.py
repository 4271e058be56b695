"""ClipDataModule: training and validation clips from shards, made on first use, in an order that resumes exactly."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.mixture import Mixture, shares_of
from datamodules.order import MixtureOrder, ResumableLoader, SampleId, TrainOrder, ValidationOrder
from datamodules.samples import TrainSamples, TrainSampling, ValidationSamples
from datamodules.stream import StreamLoader
from fasthmr.body import BodyModel, load_body, require_same_body
from fasthmr.data.batch import ClipSample, collate
from fasthmr.data.index import MANIFEST
from fasthmr.data.remote import ShardCache, is_remote
from fasthmr.data.schema import ClipError
from fasthmr.data.shards import ClipStore, ShardError, ensure_shards, require_writable
from fasthmr.data.store import fetch_shards
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.data.transforms import CROP_SCALE, Augmentation

log = logging.getLogger(__name__)

_Opened = TypeVar("_Opened", ClipStore, Mixture)


class ClipDataModule(L.LightningDataModule):
    """Clips in shards, for training and for validation.

    Training reads clips at random through the shards' index by default: which clip, frames and augmentation make up
    batch n is a function of (seed, n, rank) alone, so a run resumed from any checkpoint, also one from the middle of an
    epoch, sees exactly what it would have seen. With `streaming` shards are read in sequence, for sets that are too
    large or too far away to be read at random; batch n then also depends on the number of workers, and a resumed run
    sees what it would have seen as well (`datamodules.stream`).

    Several sets can be trained on as one, each with its share of the samples (docs/mixtures.md).

    Validation always reads through the index: every clip once over all ranks, none twice, its middle window of
    consecutive frames, no augmentation. A rank may have no validation clip at all.

    The trainer must run with `use_distributed_sampler=False`: the ranks' shares are dealt out here.

    Args:
        train: directory, URL or command of the training shards; or several by the names of their sets, a mixture.
        val: the same of the validation shards.
        body: "free", or path of an SMPL-format body file; the shards' labels must belong to it.
        make_train: what to make if `train` holds no finished shards yet; null: they must be there. Not for mixtures.
        make_val: the same for `val`.
        batch_size: clips per training batch and rank.
        frames_per_clip: frames taken from a clip for training, one at random from each of as many equal parts; with
            stills, which are clips of one frame, it is 1.
        val_batch_size: clips per validation batch and rank.
        val_frames: consecutive frames taken from a clip for validation; at least 3, or there is no acceleration.
        workers: loader processes per rank and loader, and processes that make shards.
        seed: of order, frames and augmentation.
        augmentation: of training samples.
        crop_scale: side of the network's crop over that of the tight person box.
        streaming: read training shards in sequence; not for mixtures.
        clips_per_epoch: clips of an epoch over all ranks, of a mixture or when streaming, which have no end of their
            own; null: as many as all sets have.
        shuffle_buffer: when streaming, clips that each worker reads ahead and shuffles together.
        resample: when streaming, each worker draws shards with replacement; off: in each pass they are dealt out to the
            workers of all ranks, and there must be one for each.
        max_damaged: when streaming, damaged clips that a rank may skip in an epoch; one more is an error. Another
            of its shard is shown in its place. A run that goes on in the midst of an epoch counts from there.
        shard_cache: where shards are kept that `train` or `val` name by URL or by a command (docs/shards.md).
        weights: of the sets of a mixture, by name; their shares of the samples are proportional.
    """

    def __init__(
        self,
        train: dict[str, str] | str | Path,  # in this order, or a parser makes text of a mapping
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
        weights: dict[str, float] | None = None,
        resample: bool = True,
        max_damaged: int = 0,
        shard_cache: ShardCache = ShardCache(),  # noqa: B008  (frozen, too)
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
            "max_damaged": (max_damaged, 0),
            "clips_per_epoch": (1 if clips_per_epoch is None else clips_per_epoch, 1),
        }
        for name, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not streaming and (max_damaged or not resample):
            raise ValueError("max_damaged and resample are for streaming: true; at random a damaged clip is an error")
        mixed = isinstance(train, dict)
        if clips_per_epoch is not None and not (mixed or streaming):
            raise ValueError(
                "clips_per_epoch is for mixtures and streaming: true; otherwise limit trainer.limit_train_batches"
            )
        if mixed and (streaming or make_train is not None):
            raise ValueError(
                "the sets of a mixture are read by position, and not made: set streaming to false and make_train to "
                "null, or give train one folder"
            )
        if weights is not None and not mixed:
            raise ValueError("weights are for mixtures: give train a folder for each of them, or set weights to null")
        folders: Mapping[str, str | Path] = train if isinstance(train, dict) else {"train": train}
        self.shares = shares_of(folders, (weights or {}) if mixed else {"train": 1.0})
        self.weights = weights
        self.train_dirs = {name: _place(folders[name]) for name in self.shares}
        self.val_dir, self.body = _place(val), body
        self.make_train, self.make_val = make_train, make_val
        for name, made, places in (
            ("train", make_train, self.train_dirs.values()),
            ("val", make_val, [self.val_dir]),
        ):
            if made is not None and any(map(is_remote, places)):
                raise ValueError(f"{name} is not a folder, so nothing can be made there: set make_{name} to null")
        self.batch_size, self.val_batch_size, self.val_frames = batch_size, val_batch_size, val_frames
        self.sampling = TrainSampling(frames_per_clip, augmentation, crop_scale)
        self.workers, self.seed = workers, seed
        self.streaming, self.clips_per_epoch, self.shuffle_buffer = streaming, clips_per_epoch, shuffle_buffer
        self.resample, self.max_damaged, self.shard_cache = resample, max_damaged, shard_cache
        self._mixture: Mixture | None = None
        self._val_store: ClipStore | None = None
        self._resumed_order: dict[str, Any] | None = None

    # ---- Lightning's stages ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make or fetch the shards that are missing; called by one process per machine, before any other opens them.

        Raises:
            BodyMismatchError: the model that is to be trained has another body.
            ShardError: a folder cannot be written, or holds something else than what is to be made there; or a remote
                set cannot be fetched.
            OSError, ValueError: motion or backgrounds cannot be read; nothing has been made by then.
        """
        self._require_body_of_model()
        to_make = [
            (role, key, directory, SynthSource(config, load_body(self.body)))
            for role, key, directory, config in (
                *(("training", "train", directory, self.make_train) for directory in self.train_dirs.values()),
                ("validation", "val", self.val_dir, self.make_val),
            )
            if config is not None
        ]
        for _, key, directory, _ in to_make:  # all of them before hours are spent on the first
            if not (Path(directory) / MANIFEST).exists():
                with _chosen_by(key):
                    require_writable(Path(directory))
        for role, key, directory, source in to_make:
            log.info("%s set: %d clips in %s (made now as far as they are missing)", role, len(source), directory)
            with _chosen_by(key):
                ensure_shards(source, directory, workers=max(1, self.workers))
        train = [self._store(place, self.streaming) for place in self.train_dirs.values() if is_remote(place)]
        fetch_shards([*train, *([self._store(self.val_dir)] if is_remote(self.val_dir) else [])])

    def setup(self, stage: str | None = None) -> None:
        """Open the shards.

        Raises:
            ShardError: no finished set of shards, or a damaged one.
            BodyMismatchError: labels, or a model, of another body.
            ValueError: a clip that is shorter than the frames to be taken from it, no validation clip at all, or sets
                that are no mixture.
        """
        self._require_body_of_model()
        if stage in (None, "fit") and self._mixture is None:
            stores = {name: self._store(place, self.streaming) for name, place in self.train_dirs.items()}
            self._mixture = Mixture(stores, self.shares)
            for store in stores.values():
                self._require(store, self.sampling.frames, "frames_per_clip")
        if self._val_store is None:
            self._val_store = self._open(self.val_dir, self.val_frames, "val_frames")
            if len(self._val_store) == 0:
                raise ValueError(
                    f"there are no validation clips in {self.val_dir}: make some (make_val.clips), or give another "
                    "folder with data.init_args.val"
                )

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        mixture = self._opened(self._mixture)
        if self.streaming:
            self._check_resumed_order()
            rank, world_size = self._process()
            batches = (self.clips_per_epoch or len(mixture)) // (self.batch_size * world_size)
            (store,) = mixture.stores.values()
            return StreamLoader(
                store,
                self.sampling,
                self.batch_size,
                batches,
                window=self.shuffle_buffer,
                seed=self.seed,
                batches_done=self._batches_done,
                rank=rank,
                world_size=world_size,
                workers=self.workers,
                resample=self.resample,
                max_damaged=self.max_damaged,
                epoch_length=self._epoch_length(batches),
                pin_memory=torch.cuda.is_available(),
            )
        return ResumableLoader(
            _Located(TrainSamples(mixture, self.sampling, self.seed)),
            batch_sampler=self._train_order(mixture),
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
            _Located(ValidationSamples(store, self.val_frames, self.sampling.crop_scale)),
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
        return {} if self._mixture is None else {"order": self._order(self._mixture)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_order = state_dict["order"]

    def _order(self, mixture: Mixture) -> dict[str, Any]:
        checksums = [store.manifest.shards for store in mixture.stores.values()]
        described = json.dumps(checksums if len(checksums) > 1 else checksums[0], sort_keys=True)
        order = {
            "streaming": self.streaming,
            "seed": self.seed,
            "clips": hashlib.sha256(described.encode()).hexdigest()[:16],
            "batch_size": self.batch_size,
            "ranks": self._process()[1],
        }
        if self.streaming:
            order |= {
                "workers": max(1, self.workers),  # one stream each
                "shuffle_buffer": self.shuffle_buffer,
                "resample": self.resample,
            }
        if self.weights is not None:
            order |= {"shares": mixture.shares, "clips_per_epoch": self.clips_per_epoch}
        return order

    def _train_order(self, mixture: Mixture) -> TrainOrder:
        """What batch n holds on this rank.

        Raises:
            ValueError: it is not what it was in the checkpoint that the run goes on from; or an epoch is too short.
        """
        self._check_resumed_order()
        rank, world_size = self._process()
        settings = (self.batch_size, self.seed, self._batches_done, rank, world_size)
        if len(mixture.stores) == 1 and self.clips_per_epoch is None:
            order = TrainOrder(len(mixture), *settings)
        else:
            clips = self.clips_per_epoch or len(mixture)
            order = mixed = MixtureOrder(mixture.sizes, mixture.shares, clips, *settings)
            if rank == 0:
                log.info("a mixture; an epoch is %d steps:\n%s", len(mixed), mixture.describe(mixed.counts))
        order.epoch_length = self._epoch_length(len(order))
        return order

    def _check_resumed_order(self) -> None:
        ours = self._order(self._opened(self._mixture))
        theirs = ours if self._resumed_order is None else self._resumed_order
        keys = dict.fromkeys((*theirs, *ours))
        changed = [f"{k}: {theirs.get(k)} -> {ours.get(k)}" for k in keys if ours.get(k) != theirs.get(k)]
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

    def _store(self, place: str | Path, in_sequence: bool = False) -> ClipStore:
        return ClipStore(place, self.shard_cache, in_sequence)

    def _open(self, directory: str | Path, frames: int, setting: str) -> ClipStore:
        store = self._store(directory)
        self._require(store, frames, setting)
        return store

    def _require(self, store: ClipStore, frames: int, setting: str) -> None:
        """Refuse labels of another body than the run's, and clips of fewer frames than are to be taken from them."""
        store.require_body(load_body(self.body).id)
        for key, length in store.lengths():
            if length < frames:
                raise ValueError(
                    f"clip {key} in {store.folder} has {length} frames, fewer than {setting}={frames}: "
                    f"lower {setting}, or make longer clips"
                )

    @staticmethod
    def _opened(opened: _Opened | None) -> _Opened:
        if opened is None:
            raise RuntimeError("call setup() before asking for a loader")
        return opened

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


def _place(place: str | Path) -> str | Path:
    return place if is_remote(place) else Path(place)


@contextmanager
def _chosen_by(key: str) -> Iterator[None]:
    """Says of trouble with a folder where it was chosen."""
    try:
        yield
    except ShardError as error:
        raise ShardError(f"{error} (--data_dir, or data.init_args.{key}, says which)") from error


class _Located(Dataset[ClipSample]):
    """Samples of clips; when a clip's pictures turn out to be damaged, the error names the shard, too."""

    def __init__(self, samples: TrainSamples | ValidationSamples) -> None:
        self.samples = samples

    def __getitem__(self, sample: SampleId | int) -> ClipSample:
        try:
            return self.samples[sample]  # type: ignore[index]
        except ClipError as error:
            shard = self.samples.clips.shard_of(sample.clip if isinstance(sample, SampleId) else sample)
            if str(shard) in str(error):
                raise
            raise ClipError(f"{shard}: {error}; `python -m fasthmr.shard verify {shard.parent}` finds all") from error
