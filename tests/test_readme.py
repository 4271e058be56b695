"""The README's commands and code do what it says, with sizes that take seconds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_fit import QUICK, START_TINY, TINY_NET, default_recipe, tiny_data
from test_video import scene, write_video

from fasthmr.body.files import FREE_BODY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands(start: str) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def python(command: str, *more: str) -> list[str]:
    return [sys.executable, *shlex.split(command)[1:], *more]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder that looks like the project's, without data and runs."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    return tmp_path


def test_fit_and_merge_commands_and_the_python_example(checkout, tiny_shards):
    for command in commands("python -m fasthmr.fit"):
        keys = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), "--trainer.max_epochs=1"]
        if "progressive_tiny.yaml" in command:
            keys += START_TINY
        if "fasthmr.yaml" in command:
            keys = [*default_recipe(tiny_shards), "--encoder.trainer.max_epochs=1"]
        run(python(command, *keys), checkout)
    (checkout / "data" / "synth_tiny").mkdir(parents=True)
    (checkout / "data" / "synth_tiny" / "val").symlink_to(tiny_shards)
    (command,) = commands("python -m fasthmr.merge")
    assert "multiply-adds" in run(python(command, "--frames_per_clip=2"), checkout).stdout
    (command,) = commands("python -m fasthmr.evaluate")
    assert "PA-MPJPE" in run(python(command, "--max_clips=1", "--rounds=1"), checkout).stdout
    ours, foreign = commands("python -m fasthmr.export")
    assert "written: mine.safetensors" in run(python(ours), checkout).stdout
    shutil.copy(Path(__file__).parent / "fixtures" / "hmr2_small.ckpt", checkout / "hmr2.ckpt")
    converted = run(python(foreign.replace("SMPL_NEUTRAL.pkl", str(FREE_BODY)), "--vit_heads=4"), checkout)
    assert "written: hmr2.safetensors" in converted.stdout
    (example,) = blocks("python")
    printed = run([sys.executable, "-c", example], checkout).stdout
    assert "(1, 6600, 3)" in printed.replace("torch.Size([1, 6600, 3])", "(1, 6600, 3)")


def test_predict_command(checkout):
    write_video(checkout / "walk.mp4", scene(12)[0])
    (command,) = commands("python -m fasthmr.predict")
    assert "12 frames" in run(python(command), checkout).stdout
    assert {f.name for f in (checkout / "walk").iterdir()} == {"motion.npz", "frame_000000.glb", "overlay.mp4"}


def test_shard_commands(checkout):
    for command in commands("python -m fasthmr.shard"):
        more = ["--frames=3", "--workers=1"] if " make " in command else []
        run(python(command.replace("--clips 20", "--clips 2"), *more), checkout)
    assert (checkout / "sheet.png").stat().st_size > 10_000


def test_benchmark_commands(checkout):
    data, encoder = commands("python -m fasthmr.benchmark")
    assert "training step" in run(python(data, "--seconds=0.1"), checkout).stdout
    assert "Mask-ToMe" in run(python(encoder, "--rounds=1", "--batch=1"), checkout).stdout


def test_make_targets_exist():
    for command in commands("make"):
        run([*shlex.split(command), "-n"], ROOT)


def test_every_config_is_in_the_readme():
    for config in (ROOT / "conf").glob("*.yaml"):
        assert f"`conf/{config.name}`" in README
