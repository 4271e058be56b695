"""Fixtures that several tests share: the free body and a tiny set of synthetic clips."""

from __future__ import annotations

import os
import random
from pathlib import Path

# One thread a test process: xdist runs several, and results must not depend on how many cores there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, alone or among others: what fails can be seen again."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def free_body():
    from fasthmr.body import load_body

    return load_body("free")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory, free_body) -> Path:
    """Six clips of 16 frames in two shards, rendered by the real renderer."""
    from fasthmr.data.shards import write_shards
    from fasthmr.data.synth.source import SynthConfig, SynthSource

    folder = tmp_path_factory.mktemp("shards") / "tiny"
    source = SynthSource(SynthConfig(clips=6, frames=16, seed=5), free_body)
    write_shards(source, folder, clips_per_shard=3, workers=1, progress=False)
    return folder
