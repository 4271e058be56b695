"""`python -m fasthmr.fit` as a user meets it: every config runs, overrides reach, errors name the key, runs resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fasthmr.checkpoint import load_encoder, load_prior, read_header

ROOT = Path(__file__).parents[1]
ONE_STAGE = sorted(p for p in (ROOT / "conf").glob("*.yaml") if "stages" not in yaml.safe_load(p.read_text()))
ENCODERS = [p for p in ONE_STAGE if "MergedEncoderModule" in p.read_text()]
PRIORS = [p for p in ONE_STAGE if "MotionPriorModule" in p.read_text()]

#: sizes that make any encoder config run in seconds
TINY_NET = [
    f"--model.init_args.net.{k}={v}"
    for k, v in dict(
        vit_dim=32, vit_depth=2, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_dim_head=16, head_mlp_dim=32
    ).items()
]
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.enable_progress_bar=false",
    "--trainer.check_val_every_n_epoch=1",
]


def tiny_data(shards: Path) -> list[str]:
    return [
        f"--data.init_args.train={shards}", f"--data.init_args.val={shards}",
        "--data.init_args.make_train=null", "--data.init_args.make_val=null",
        "--data.init_args.batch_size=2", "--data.init_args.frames_per_clip=2",
        "--data.init_args.val_frames=8", "--data.init_args.workers=0",
    ]  # fmt: skip


def run_fit(*arguments: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "fasthmr.fit", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        **kwargs,
    )


@pytest.mark.parametrize("config", ENCODERS, ids=lambda p: p.name)
def test_every_config_trains_through_the_entry_point(config, tiny_shards, tmp_path):
    steps = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=1"]
    if "streaming: true" in config.read_text():
        steps.append("--data.init_args.clips_per_epoch=6")
    if "init_from" in config.read_text():  # of another size; deeper than it is to be merged to
        steps += ["--model.init_args.init_from=null", "--model.init_args.net.vit_depth=9"]
    done = run_fit("-c", str(config), *TINY_NET, *QUICK, *tiny_data(tiny_shards), *steps, "--run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "val/mpjpe_mm" in done.stdout and "tensorboard --logdir" in done.stdout
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["model"]["init_args"]["net"]["vit_dim"] == 32
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    header = read_header(tmp_path / "run/checkpoints/last.ckpt")
    assert header.body.startswith("free@")
    image, mask = torch.zeros(1, 3, 256, 256), torch.zeros(1, 256, 256, dtype=torch.bool)
    assert load_encoder(tmp_path / "run/checkpoints/last.ckpt").eval()(image, mask).rotations.shape == (1, 24, 3, 3)


@pytest.mark.parametrize("config", PRIORS, ids=lambda p: p.name)
def test_every_prior_trains_through_the_entry_point(config, tmp_path):
    sizes = {
        "model.init_args.vae.dim": 32, "model.init_args.vae.window": 20, "data.init_args.window": 20,
        "data.init_args.windows_per_epoch": 8, "data.init_args.val_windows": 2, "data.init_args.batch_size": 4,
        "data.init_args.workers": 0, "trainer.max_epochs": 1,
    }  # fmt: skip
    keys = [f"--{key}={value}" for key, value in sizes.items()]
    done = run_fit("-c", str(config), *QUICK, *keys, "--run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "val/mpjpe_mm" in done.stdout
    prior, body = load_prior(tmp_path / "run/checkpoints/last.ckpt")
    assert body.startswith("free@") and prior.config.window == 20


def test_every_config_is_tested():
    assert {*ENCODERS, *PRIORS} == set(ONE_STAGE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.init_args.net.vit_detph=3"], "unknown key 'net.vit_detph'; did you mean 'vit_depth'"),
        (["--data.init_args.batch_sise=3"], "unknown key 'batch_sise'; did you mean 'batch_size'"),
        (["--trainer.max_epocs=3"], "unknown key 'trainer.max_epocs'; did you mean 'max_epochs'"),
        (["--model.init_args.optimizer.lr=fast"], "fast"),
        (["--model.init_args.protocol=best"], "protocol must be one of"),
        (["--ckpt_path=last", "--run_dir=nowhere"], "there is no checkpoint at nowhere/checkpoints/last.ckpt"),
        (["-c", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message, tmp_path):
    done = run_fit("-c", str(ROOT / "conf/encoder_tiny.yaml"), *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = run_fit("-c", str(ROOT / "conf/encoder_tiny.yaml"), "--run_dir=file/run", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot write to run_dir file/run" in done.stderr and "Traceback" not in done.stderr


def test_two_processes_validate_to_the_same_numbers_as_one(tiny_shards, tmp_path):
    """With a learning rate of nothing the weights stay: metrics can differ only by how clips are shared out."""
    still = ["--model.init_args.optimizer.lr=1e-30", "--trainer.max_epochs=1", "--trainer.precision=32"]
    metrics = []
    for processes in (1, 2):
        arguments = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), *still, "--data.init_args.val_batch_size=1"]
        if processes == 2:
            arguments += ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=1"]
        done = run_fit(
            "-c", str(ROOT / "conf/encoder_tiny.yaml"), *arguments, f"--run_dir=run{processes}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads((tmp_path / f"run{processes}/done.json").read_text())["metrics"])
    assert "val/accel_m_s2" in metrics[0]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


def test_print_config_shows_resolved_interpolations(tmp_path):
    done = run_fit("-c", str(ROOT / "conf/encoder_tiny.yaml"), "--run_dir=elsewhere", "--print_config", cwd=tmp_path)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["trainer"]["logger"]["init_args"]["save_dir"] == "elsewhere"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_bit_for_bit(workers, tiny_shards, tmp_path):
    """kill -9 in mid-epoch, then --ckpt_path last: weights, average and optimiser equal an uninterrupted run's."""
    checkpoints = tmp_path / "every_step.yaml"
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": "${run_dir}/checkpoints",
            "every_n_train_steps": 1,
            "save_top_k": 1,
            "save_last": True,
        },
    }
    checkpoints.write_text(yaml.safe_dump({"trainer": {"callbacks": [save]}}))
    kill = tmp_path / "kill.yaml"
    kill.write_text(
        yaml.safe_dump({"trainer": {"callbacks+": {"class_path": "helpers.kill.KillAtStep", "init_args": {"step": 8}}}})
    )

    def run(run_dir: str, *more: str) -> subprocess.CompletedProcess:
        steps = ["--trainer.max_epochs=4", "--trainer.limit_val_batches=1"]  # 3 steps an epoch: step 8 is in mid-epoch
        arguments = [
            *TINY_NET,
            *QUICK,
            *tiny_data(tiny_shards),
            f"--data.init_args.workers={workers}",
            *steps,
            f"--run_dir={run_dir}",
        ]
        return run_fit(
            "-c", str(ROOT / "conf/encoder_tiny.yaml"), "-c", str(checkpoints), *more, *arguments, cwd=tmp_path
        )

    assert run("whole").returncode == 0
    assert run("killed", "-c", str(kill)).returncode == -signal.SIGKILL
    interrupted = torch.load(tmp_path / "killed/checkpoints/last.ckpt", weights_only=True)
    assert interrupted["global_step"] == 7
    refused = run("killed")
    assert refused.returncode == 2 and "already holds a run" in refused.stderr
    resumed = run("killed", "--ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr

    one, other = (torch.load(tmp_path / d / "checkpoints/last.ckpt", weights_only=True) for d in ("whole", "killed"))
    assert one["global_step"] == other["global_step"] == 12
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    moments, others = (c["optimizer_states"][0]["state"] for c in (one, other))
    assert all(torch.equal(v["exp_avg_sq"], others[k]["exp_avg_sq"]) for k, v in moments.items())


def test_resume_refuses_a_checkpoint_of_another_config(tiny_shards, tmp_path):
    common = [
        *QUICK,
        *tiny_data(tiny_shards),
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=1",
        "--run_dir=run",
    ]
    config = str(ROOT / "conf/encoder_tiny.yaml")
    assert run_fit("-c", config, *TINY_NET, *common, cwd=tmp_path).returncode == 0
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    wider = run_fit(
        "-c", config, *TINY_NET, "--model.init_args.net.vit_dim=64", *common, "--ckpt_path=last", cwd=tmp_path
    )
    assert wider.returncode == 2 and "another encoder (vit_dim: 32 -> 64)" in wider.stderr
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_the_clips(tiny_shards, tmp_path):
    arguments = [
        *TINY_NET,
        *QUICK,
        *tiny_data(tiny_shards),
        "--trainer.max_epochs=1",
        "--model.init_args.loss.joints3d=.inf",
    ]
    done = run_fit("-c", str(ROOT / "conf/encoder_tiny.yaml"), *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert "not finite at step 0" in done.stderr and "clips: " in done.stderr
    assert not (tmp_path / "runs/encoder_tiny/checkpoints/last.ckpt").exists()
