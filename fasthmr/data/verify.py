"""Verifying a set of shards: every checksum, every label and every image."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from fasthmr.data.index import Manifest, ShardError, ShardIndex
from fasthmr.data.schema import ClipError
from fasthmr.data.store import ClipStore


def verify_shards(folder: str | Path, progress: bool = False) -> list[str]:
    """Compare every shard with its index and the manifest, and decode every image; the problems found, in words.

    A problem names the shard and, where it can be told, the clip, the field and the frame.

    Raises:
        ShardError: there is no finished set at all.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    problems = [problem for name in sorted(manifest.shards) for problem in _shard_problems(folder / name, manifest)]
    problems += [
        f"{tar} is not in the manifest" for tar in sorted(folder.glob("*.tar")) if tar.name not in manifest.shards
    ]
    try:
        store = ClipStore(folder)
    except ShardError as error:
        return problems or [str(error)]
    found = (len(store), sum(frames for _, frames in store.lengths()))
    if found != (manifest.clips, manifest.frames):
        told = (manifest.clips, manifest.frames)
        problems.append(f"{folder}: (clips, frames) are {found} by the indices and {told} by the manifest")
    for index in tqdm(range(len(store)), unit="clip", desc=f"verifying {folder}", disable=not progress):
        problems += _clip_problems(store, index)
    return problems


def _shard_problems(tar: Path, manifest: Manifest) -> list[str]:
    if not tar.is_file():
        return [f"{tar} is missing"]
    try:
        told = ShardIndex.read(tar)
        found = ShardIndex.of(tar)
    except (ShardError, ClipError, OSError) as error:
        return [str(error) if str(tar) in str(error) else f"{tar}: {error}"]
    problems = []
    if not found.sha256 == told.sha256 == manifest.shards[tar.name]:
        sums = f"is {found.sha256[:16]}..., its index says {told.sha256[:16]}..."
        problems.append(f"{tar}: its checksum {sums}, the manifest {manifest.shards[tar.name][:16]}...")
    if found.samples != told.samples:
        problems.append(f"{tar}: its members are not those of its index")
    return problems


def _clip_problems(store: ClipStore, index: int) -> list[str]:
    try:
        clip = store[index]
        clip.check_images()
        if clip.body is not None and clip.body not in store.manifest.bodies:
            raise ClipError(f"clip {clip.key} belongs to body {clip.body!r}, the set to {store.manifest.bodies}")
    except ValueError as error:
        tar = str(store.shard_of(index))
        return [str(error) if str(error).startswith(tar) else f"{tar}: {error}"]
    return []
