"""docs/study_merging.py makes every table, on an encoder and clips of seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from fasthmr.body import load_body
from fasthmr.checkpoint import save_encoder
from fasthmr.models.hmr import HMR, HMRConfig

ROOT = Path(__file__).parents[1]


def test_every_table_of_the_study_is_made(tiny_shards, tmp_path):
    torch.manual_seed(0)
    sizes = {"head_dim": 24, "head_depth": 1, "head_heads": 2, "head_dim_head": 8, "head_mlp_dim": 16}
    save_encoder(tmp_path / "a.ckpt", HMR(HMRConfig(vit_dim=32, vit_depth=12, vit_heads=2, **sizes)), load_body().id)
    command = [sys.executable, "docs/study_merging.py", str(tmp_path / "a.ckpt"), "--data", str(tiny_shards)]
    command += ["--calibration", str(tiny_shards), "--clips=2", "--frames_per_clip=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 9) + (2 + 7) + (2 + 8)
    assert "chosen on 4 frames, measured on 4, body-24:" in done.stdout
    tau = {row[0].strip(): row for row in rows[2:11]}
    assert tau["un-merged"][1].strip() == "12"
    assert float(tau["un-merged"][3]) > 0 and int(tau["10"][1]) <= 12
