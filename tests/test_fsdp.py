"""FSDP2: an encoder that is distributed over processes trains, averages, validates and resumes as under DDP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_run import NET
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from test_fit import QUICK, ROOT, tiny_data

from fasthmr.checkpoint import load_encoder, save_encoder
from fasthmr.data.shards import write_shards
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.lit.collapse import require_mergeable
from fasthmr.lit.prior import MotionPriorModule
from fasthmr.lit.sharding import FSDP2Strategy, require_supported
from fasthmr.merging import LayerMergePlan
from fasthmr.models.hmr import HMR
from fasthmr.models.motion_vae import MotionVAEConfig

#: what the order of sums makes of weights and moments in a few steps; it depends on the CPU
ROUNDING = 1e-5


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def runs(tiny_shards, free_body, tmp_path_factory) -> Path:
    """A folder of trainings on two processes, which have two validation clips and one."""
    out = tmp_path_factory.mktemp("runs")
    source = SynthSource(SynthConfig(clips=3, frames=4, seed=6), free_body)
    write_shards(source, out / "val", workers=1, progress=False)
    merged = HMR(NET)
    merged.merge_layers(LayerMergePlan(NET.vit_depth).merged(1, 2))
    save_encoder(out / "merged.ckpt", merged, free_body.id)
    jobs = [
        {"out": "ddp", "strategy": "ddp"},
        {"out": "fsdp"},
        {"out": "fsdp_went_on", "resume": "fsdp/step4.ckpt"},
        {"out": "ddp_went_on", "strategy": "ddp", "resume": "fsdp/step4.ckpt"},
        {"out": "fsdp_after_ddp", "resume": "ddp/step4.ckpt"},
        {"out": "no_average", "ema_decay": None},
        {"out": "merged", "init_from": "merged.ckpt", "steps": 2},
        {"out": "merged_went_on", "resume": "merged/step2.ckpt", "steps": 4},
    ]
    (out / "jobs.json").write_text(json.dumps(jobs))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = run(*torchrun, ROOT / "tests/fsdp_run.py", tiny_shards, "val", "jobs.json", cwd=out)
    assert done.returncode == 0, done.stderr
    return out


def states(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and averages, and Adam's states, by name."""
    content = torch.load(checkpoint, weights_only=True)
    (optimizer,) = content["optimizer_states"]
    moments = {f"{i} {name}": value for i, state in optimizer["state"].items() for name, value in state.items()}
    return content["state_dict"], moments


def told(out: Path, rank: int = 0) -> dict:
    return json.loads((out / f"rank{rank}.json").read_text())


def assert_same(one: Path, two: Path, tolerance: float) -> None:
    for first, second in zip(states(one), states(two), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.allclose(value, second[name], rtol=0, atol=tolerance), name


def test_each_process_holds_a_share_and_ends_with_the_weights_of_ddp(runs):
    parameters = sum(p.numel() for p in HMR(NET).parameters())
    copied, shared = ([told(runs / name, rank)["held"] for rank in (0, 1)] for name in ("ddp", "fsdp"))
    assert copied == [parameters, parameters]
    assert sum(shared) == parameters and min(shared) > 0.4 * parameters
    for step in (2, 4, 6):
        assert_same(runs / f"fsdp/step{step}.ckpt", runs / f"ddp/step{step}.ckpt", ROUNDING)


def test_processes_validate_together_though_one_has_fewer_clips(runs):
    copied, shared = (told(runs / name)["metrics"] for name in ("ddp", "fsdp"))
    assert shared == pytest.approx(copied, rel=1e-4, nan_ok=True) and "val/mpjpe_mm" in shared


def test_checkpoints_are_as_any_other(runs):
    hmr = load_encoder(runs / "fsdp/step6.ckpt")
    weights, _ = states(runs / "fsdp/step6.ckpt")
    assert all(torch.equal(value, weights[f"ema.module.{name}"]) for name, value in hmr.state_dict().items())


def test_a_run_goes_on_bit_for_bit_and_under_either_strategy(runs):
    assert_same(runs / "fsdp_went_on/step6.ckpt", runs / "fsdp/step6.ckpt", 0.0)
    assert_same(runs / "ddp_went_on/step6.ckpt", runs / "ddp/step6.ckpt", ROUNDING)
    assert_same(runs / "fsdp_after_ddp/step6.ckpt", runs / "fsdp/step6.ckpt", ROUNDING)


def test_without_an_average_the_weights_that_validate_go_on_training(runs):
    with_average, moments = states(runs / "fsdp/step6.ckpt")
    weights, same_moments = states(runs / "no_average/step6.ckpt")
    assert weights.keys() == {name for name in with_average if not name.startswith("ema.")}
    assert all(torch.equal(value, with_average[name]) for name, value in weights.items())
    assert all(torch.equal(value, moments[name]) for name, value in same_moments.items())


def test_an_encoder_that_was_merged_before_is_distributed_as_it_is(runs):
    assert list(load_encoder(runs / "merged_went_on/step4.ckpt").backbone.blocks) == ["0", "1"]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FSDP2Strategy, ModelParallelStrategy, FSDPStrategy])
def test_layers_are_not_merged_while_they_are_distributed(strategy):
    with pytest.raises(ValueError, match=f"not under {strategy.__name__}: set trainer.strategy to auto or ddp"):
        require_mergeable(strategy())


def test_other_ways_to_distribute_are_refused():
    for strategy in (ModelParallelStrategy(), FSDPStrategy()):
        with pytest.raises(ValueError, match=f"{type(strategy).__name__} is not supported: set it to ddp, or to fsdp2"):
            require_supported(strategy)
    require_supported(FSDP2Strategy())
    require_supported(DDPStrategy())


def test_only_encoders_are_distributed():
    strategy = FSDP2Strategy()
    strategy.connect(MotionPriorModule(MotionVAEConfig(dim=32, window=20)))
    with pytest.raises(ValueError, match="fsdp2 is for MergedEncoderModule, got MotionPriorModule: set"):
        strategy.configure_ddp()


# ---- the command ---------------------------------------------------------------------------------


def test_all_processes_go_on_from_what_the_first_one_chose(runs, tiny_shards, tmp_path):
    """The second process sees no checkpoint at first, and would start anew if it chose for itself."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy(runs / "fsdp/step4.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    keys = {
        "model.init_args.net": json.dumps(NET.as_dict()), "model.init_args.loss.token_joints": 0.5,
        "data.init_args.batch_size": 1, "data.init_args.streaming": "false", "data.init_args.clips_per_epoch": "null",
        "seed_everything": 3, "trainer.devices": 2, "trainer.strategy": "fsdp2", "trainer.max_epochs": 2,
        "trainer.limit_val_batches": 1, "ckpt_path": "auto", "run_dir": "run",
    }  # fmt: skip
    common = [*QUICK, *tiny_data(tiny_shards), *(f"--{key}={value}" for key, value in keys.items())]
    done = run("helpers.sees_late", "-c", ROOT / "conf/encoder_vith.yaml", *common, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert load_encoder(tmp_path / "run/checkpoints/best.ckpt").config == NET
