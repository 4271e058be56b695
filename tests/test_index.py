"""The index of a large set in memory: it takes little of it, and says what the files say."""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import pytest

from fasthmr.data.index import MANIFEST, IndexedSample, Samples
from fasthmr.data.schema import SCHEMA_VERSION
from fasthmr.data.shards import ClipStore

# docs/shards.md has what this prints (-s) for a million
CLIPS, CLIPS_PER_SHARD = int(os.environ.get("CLIPS", 20_000)), 100
MEMBERS = {"meta.json": 300, "labels.npz": 10_000, "frames.jpgs": 40_000, "masks.pngs": 2_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of stills of which there is nothing but the index; the shards are holes of the right size."""
    folder = tmp_path_factory.mktemp("sets") / "large"
    folder.mkdir()
    names = [f"shard-{i:06d}.tar" for i in range(CLIPS // CLIPS_PER_SHARD)]
    for number, name in enumerate(names):
        samples, end = [], 0
        for clip in range(number * CLIPS_PER_SHARD, (number + 1) * CLIPS_PER_SHARD):
            files = {}
            for extension, size in MEMBERS.items():
                files[extension] = [end + 512, size]
                end += 512 + size
            samples.append({"key": f"hmr2-coco-train2014-{clip:012d}", "frames": 1, "files": files})
        with (folder / name).open("wb") as file:
            file.truncate(end)
        (folder / f"{name}.idx").write_text(json.dumps({"bytes": end, "sha256": "0", "samples": samples}))
    content = {"schema_version": SCHEMA_VERSION, "body": "free@0", "clips": CLIPS, "frames": CLIPS, "source": {}}
    (folder / MANIFEST).write_text(json.dumps({**content, "shards": dict.fromkeys(names, "0")}))
    return folder


def test_a_clip_takes_less_than_200_bytes(folder: Path) -> None:
    began = time.process_time()
    ClipStore(folder)
    took_s = time.process_time() - began
    tracemalloc.start()
    store = ClipStore(folder)
    (size, _), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
    print(f"{size / CLIPS:.0f} bytes and {1e6 * took_s / CLIPS:.1f} us a clip")
    assert size < 200 * CLIPS and len(pickle.dumps(store)) < 200 * CLIPS
    assert len(store) == CLIPS == len(list(store.lengths()))
    assert store.shard_of(12_399).name == "shard-000123.tar" and store.clips_of(123) == range(12_300, 12_400)
    assert {name: len(data) for name, data in store.members(12_345).items()} == {**MEMBERS, "__key__": 32}


def test_samples_are_what_was_put_in() -> None:
    put = [
        IndexedSample("one", 3, {"a": [0, 1], "b": [1, 2**40]}),
        IndexedSample("zwei-ü", 2**40, {}),
        IndexedSample("", 1, {"b": [5, 6], "c": [7, 8], "a": [9, 10]}),
    ]
    samples = Samples()
    for sample in put:
        samples.append(sample)
    assert [samples[number] for number in range(len(samples))] == put
    assert list(samples.lengths()) == [("one", 3), ("zwei-ü", 2**40), ("", 1)]
