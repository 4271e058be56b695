"""Features computed once: a file beside the run for every shard, written whole, resumed, refused for anything else.

    <folder>/<hash>/shard-000000.pt     what an encoder says about the frames of shard-000000.tar, and their labels

The hash is of all that the numbers depend on: the encoder (`encoder_id`: its weights, merge plan and token merging),
whose tokens are protected, the precision, the crop's scale, and the checksums of the shards. So another encoder has
another folder, and every file says inside what it belongs to. A file is a checkpoint file (`fasthmr.checkpoint_files`)
of the kind "features": its header has `of`, that mapping, and `keys` and `frames` of the shard's clips; its tensors are
those of `EncodedFrames` and of `TrueFrames` (with `true_` before their names), all frames of the shard behind one
another.
"""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.encoding import EncodedFrames, FrameEncoder, TrueFrames, cut_chunks
from fasthmr.checkpoint_files import (
    FORMAT_VERSION,
    HEADER_KEY,
    CheckpointError,
    raw_header,
    read_checkpoint,
    require_fields,
    verify_checksums,
    write_checkpoint,
)
from fasthmr.data.batch import ClipBatch
from fasthmr.data.shards import ClipStore

_KIND = "features"


class FeatureCacheError(ValueError):
    """Cached features are missing, damaged, or of something else than what they are wanted for."""


class FeatureCache:
    """The cached features of one set of clips.

    Args:
        folder: where caches are.
        store: the clips.
        encoder: computes the features.
        crop_scale: side of the network's crop over that of the tight person box.
    """

    def __init__(self, folder: str | Path, store: ClipStore, encoder: FrameEncoder, crop_scale: float) -> None:
        shards = json.dumps(store.manifest.shards, sort_keys=True)
        self.of = {
            "encoder": encoder.id,
            "mask_people": encoder.mask_people,
            "precision": encoder.precision,
            "crop_scale": crop_scale,
            "data": hashlib.sha256(shards.encode()).hexdigest()[:16],
        }
        self.store, self.encoder, self.crop_scale = store, encoder, crop_scale
        self.folder = Path(folder) / hashlib.sha256(json.dumps(self.of, sort_keys=True).encode()).hexdigest()[:16]

    def fill(self, device: torch.device | str, workers: int = 0, progress: bool = True) -> None:
        """Compute what is missing, shard by shard.

        Args:
            device: where the encoder runs.
            workers: processes that decode pictures.
            progress: show a progress bar with rate and remaining time.

        Raises:
            FeatureCacheError: a file that is there belongs to something else.
            OSError: a file cannot be written.
        """
        lengths = [frames for _, frames in self.store.lengths()]
        todo = {shard: clips for shard, clips in self._clips().items() if not self._is_there(shard)}
        missing = sum(lengths[clip] for clips in todo.values() for clip in clips)
        with tqdm(
            total=sum(lengths), initial=sum(lengths) - missing, unit="frame", desc=f"encoding {self.store.folder}",
            disable=not progress or not todo,
        ) as bar:  # fmt: skip
            for shard, clips in todo.items():
                self._write(shard, clips, device, workers, bar)

    def open(self) -> CachedFrames:
        """The features, whose files are compared with their checksums.

        Raises:
            FeatureCacheError: one is missing, damaged, or belongs to something else.
        """
        for shard in self._clips():
            if not self._is_there(shard):
                raise FeatureCacheError(f"{self.path(shard)} is missing: features have not been computed; run again")
            try:
                verify_checksums(self.path(shard), weights=True)
            except CheckpointError as error:
                raise FeatureCacheError(f"{error}; remove it to compute it again") from error
        return CachedFrames([self.path(shard) for shard in self._clips()])

    def path(self, shard: Path) -> Path:
        """File of a shard's features."""
        return self.folder / f"{shard.stem}.pt"

    def _clips(self) -> dict[Path, list[int]]:
        """Numbers of each shard's clips."""
        clips: dict[Path, list[int]] = {shard: [] for shard in self.store.shards}
        for number in range(len(self.store)):
            clips[self.store.shard_of(number)].append(number)
        return clips

    def _is_there(self, shard: Path) -> bool:
        path = self.path(shard)
        if not path.exists():
            return False
        try:
            header = raw_header(path, read_checkpoint(path), _KIND)
            require_fields(path, header, of=dict, keys=list, frames=list)
        except CheckpointError as error:
            raise FeatureCacheError(f"{error}; remove it to compute it again") from error
        changed = [f"{k}: {header['of'].get(k)} -> {v}" for k, v in self.of.items() if header["of"].get(k) != v]
        if changed:
            raise FeatureCacheError(
                f"{path} holds features of something else ({'; '.join(changed)}): remove it, or choose another folder"
            )
        return True

    def _write(self, shard: Path, clips: list[int], device: torch.device | str, workers: int, bar: tqdm) -> None:
        loader = DataLoader(
            _WholeClips(self.store, clips, self.crop_scale),
            batch_size=None,
            num_workers=min(workers, len(clips)),
            generator=torch.Generator(),  # or it would advance torch's global generator
        )
        truths: list[TrueFrames] = []
        encoded: list[EncodedFrames] = []
        for truth, chunks in loader:
            truths.append(truth)
            parts = []
            for chunk in chunks:
                parts.append(EncodedFrames(*(tensor.cpu() for tensor in self.encoder([chunk], device))))
                bar.update(chunk.valid.numel())
            encoded.append(EncodedFrames(*map(torch.cat, zip(*parts, strict=True))))
        header = {
            "format_version": FORMAT_VERSION,
            "kind": _KIND,
            "of": self.of,
            "keys": [truth.key for truth in truths],
            "frames": [len(truth.pose) for truth in truths],
        }
        tensors = dict(zip(EncodedFrames._fields, map(torch.cat, zip(*encoded, strict=True)), strict=True))
        tensors |= {
            "true_pose": torch.cat([truth.pose for truth in truths]),
            "true_betas": torch.stack([truth.betas for truth in truths]),
            "true_valid": torch.cat([truth.valid for truth in truths]),
            "true_fps": torch.stack([truth.fps for truth in truths]),
        }
        write_checkpoint(self.path(shard), {HEADER_KEY: header, **tensors})


class CachedFrames:
    """Frames of clips with their features, read from cache files by the number of the clip.

    Files are opened when they are first needed, in each process anew, and mapped: what is not asked for is not read.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._opened: dict[int, dict[str, Any]] = {}
        self._places: list[tuple[int, int, int, int]] = []  # of each clip: file, row in it, first frame, last frame + 1
        for number in range(len(files)):
            ends = list(accumulate(self._content(number)[HEADER_KEY]["frames"]))
            starts = [0, *ends[:-1]]
            self._places += [(number, row, *span) for row, span in enumerate(zip(starts, ends, strict=True))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def frames(self, clip: int, start: int, stop: int) -> tuple[TrueFrames, EncodedFrames]:
        """Frames `start` to `stop` of a clip."""
        file, row, first, end = self._places[clip]
        content = self._content(file)
        span = slice(first + start, min(first + stop, end))

        def rows(name: str) -> Tensor:
            return content[name][span]

        truth = TrueFrames(
            content[HEADER_KEY]["keys"][row],
            rows("true_pose"),
            content["true_betas"][row],
            rows("true_valid"),
            content["true_fps"][row],
        )
        return truth, EncodedFrames(*map(rows, EncodedFrames._fields))

    def _content(self, file: int) -> dict[str, Any]:
        if file not in self._opened:
            self._opened[file] = read_checkpoint(self.files[file])
        return self._opened[file]


class _WholeClips(Dataset[tuple[TrueFrames, list[ClipBatch]]]):
    """Labels and crops of whole clips, for a loader's processes to decode."""

    def __init__(self, store: ClipStore, clips: list[int], crop_scale: float) -> None:
        self.store, self.clips, self.crop_scale = store, clips, crop_scale

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> tuple[TrueFrames, list[ClipBatch]]:
        clip = self.store[self.clips[number]]
        return TrueFrames.of(clip), cut_chunks(clip, 0, len(clip), self.crop_scale)[0]
