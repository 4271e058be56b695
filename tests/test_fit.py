"""`python -m fasthmr.fit` as a user meets it: every config runs, overrides reach, errors name the key, runs resume."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_decoder import WINDOW, make_clips, make_encoder, make_prior

from fasthmr.body import load_body
from fasthmr.body.files import FREE_BODY
from fasthmr.checkpoint import encoder_id, load_decoder, load_encoder, load_prior, read_header
from fasthmr.cli import UsageError
from fasthmr.data.index import ShardIndex
from fasthmr.data.shards import ClipStore
from fasthmr.fit import fit, main, print_results
from fasthmr.lit.checkpoint_io import AtomicCheckpointIO
from fasthmr.resume import require_resumable

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "conf/encoder_tiny.yaml")
ONE_STAGE = sorted(p for p in (ROOT / "conf").glob("*.yaml") if "model" in yaml.safe_load(p.read_text()))
MIXTURES = [p for p in ONE_STAGE if "weights:" in p.read_text()]  # of sets: tested in test_mixture.py
ENCODERS = [p for p in ONE_STAGE if "MergedEncoderModule" in p.read_text() and p not in MIXTURES]
PRIORS = [p for p in ONE_STAGE if "MotionPriorModule" in p.read_text()]
DECODERS = [p for p in ONE_STAGE if "DiffusionDecoderModule" in p.read_text()]

#: sizes that make any encoder config run in seconds
TINY_NET = [
    f"--model.init_args.net.{k}={v}"
    for k, v in dict(
        vit_dim=32, vit_depth=2, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_dim_head=16, head_mlp_dim=32
    ).items()
]
#: for configs that start from other sizes, and merge layers: random weights, and more layers than are to be left
START_TINY = ["--model.init_args.init_from=null", "--model.init_args.net.vit_depth=9"]
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


def default_recipe(shards: Path) -> list[str]:
    """Keys that make conf/fasthmr.yaml run in seconds, all of its stages."""
    of_stages = {
        "prior": [
            "--data.init_args.windows_per_epoch=16", "--data.init_args.val_windows=2", "--data.init_args.workers=0",
        ],
        "encoder": [*TINY_NET, *START_TINY, *tiny_data(shards)],
        # a decoder of another encoder's sizes cannot start from the shipped one
        "decoder": [
            "--model.init_args.init_from=null", f"--data.init_args.train={shards}", f"--data.init_args.val={shards}",
            "--data.init_args.make_train=null", "--data.init_args.make_val=null", "--data.init_args.workers=0",
            "--data.init_args.batch_size=2",
        ],
        "evaluation": [f"--data={shards}", "--max_clips=2", "--rounds=1", "--workers=0"],
    }  # fmt: skip
    keys = [f"--{stage}.{key.removeprefix('--')}" for stage, own in of_stages.items() for key in own]
    return [*keys, *QUICK, "--trainer.max_epochs=1"]


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


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, which is much faster than in one of its own, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["fit", *map(str, arguments)])
        capsys.readouterr()
        code = main()
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("config", ENCODERS, ids=lambda p: p.name)
def test_every_config_trains_through_the_entry_point(config, tiny_shards, tmp_path, here):
    steps = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=1"]
    if "streaming: true" in config.read_text():
        steps.append("--data.init_args.clips_per_epoch=6")
    if "init_from" in config.read_text():
        steps += START_TINY
    done = here("-c", str(config), *TINY_NET, *QUICK, *tiny_data(tiny_shards), *steps, "--run_dir=run")
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
def test_every_prior_trains_through_the_entry_point(config, tmp_path, here):
    sizes = {
        "model.init_args.vae.dim": 32, "model.init_args.vae.window": 20, "data.init_args.window": 20,
        "data.init_args.windows_per_epoch": 8, "data.init_args.val_windows": 2, "data.init_args.batch_size": 4,
        "data.init_args.workers": 0, "trainer.max_epochs": 1,
    }  # fmt: skip
    keys = [f"--{key}={value}" for key, value in sizes.items()]
    done = here("-c", str(config), *QUICK, *keys, "--run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "val/mpjpe_mm" in done.stdout
    prior, body = load_prior(tmp_path / "run/checkpoints/last.ckpt")
    assert body.startswith("free@") and prior.config.window == 20


@pytest.mark.parametrize("config", DECODERS, ids=lambda p: p.name)
def test_every_decoder_trains_through_the_entry_point(config, tmp_path, here):
    keys = {
        "model.init_args.prior": make_prior(tmp_path / "prior.ckpt"),
        "model.init_args.encoder": make_encoder(tmp_path / "encoder.ckpt"),
        "model.init_args.denoiser.mlp_dim": 32,
        "data.init_args.train": make_clips(tmp_path / "clips"), "data.init_args.val": "${data.init_args.train}",
        "data.init_args.make_train": "null", "data.init_args.make_val": "null", "data.init_args.window": WINDOW,
        "data.init_args.batch_size": 2, "data.init_args.workers": 0, "trainer.max_epochs": 1,
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in keys.items()]
    done = here("-c", str(config), *QUICK, *arguments, "--run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "val/mpjpe_mm" in done.stdout and "val/per_frame_mpjpe_mm" in done.stdout
    decoder, header = load_decoder(tmp_path / "run/checkpoints/best.ckpt")
    assert header.body.startswith("free@") and decoder.encoder == encoder_id(load_encoder(tmp_path / "encoder.ckpt"))
    assert list((tmp_path / "run/features").glob("*/shard-000000.pt"))


def test_every_config_is_tested():
    assert {*ENCODERS, *PRIORS, *DECODERS, *MIXTURES} == set(ONE_STAGE)


# ---- mistakes: one line, exit code 2, nothing written --------------------------------------------


@pytest.fixture
def told(here):
    """As `here`: only its exit code and what it says on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        done = here(*arguments)
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.init_args.net.vit_detph=3"], "unknown key 'net.vit_detph'; did you mean 'vit_depth'"),
        (["--data.init_args.batch_sise=3"], "unknown key 'batch_sise'; did you mean 'batch_size'"),
        (["--trainer.max_epocs=3"], "unknown key 'trainer.max_epocs'; did you mean 'max_epochs'"),
        (["--optimizer=SGD"], "unknown key 'optimizer'"),
        (["--model.init_args.optimizer.lr=fast"], "error: optimizer.lr must be float, got fast\n"),
        (["--trainer.max_epochs=many"], "error: trainer.max_epochs must be int, got many\n"),
        (["--model.init_args.mask_people=none"], "error: mask_people must be one of 'subject', 'all', got none\n"),
        (["--model.init_args.optimizer.lr=-1"], "error: optimizer.lr must be positive, got -1.0\n"),
        (["--model.init_args.protocol=best"], "error: protocol must be one of"),
        (["--model.init_args.body=missing.npz"], "error: there is no body file missing.npz. "),
        (["--model.init_args.init_from=missing.ckpt"], "error: no checkpoint at missing.ckpt\n"),
        (["--data.init_args.batch_size=0"], "error: batch_size must be at least 1, got 0\n"),
        (["--trainer.callbacks.init_args.samples=2", "--trainer.callbacks=callbacks.pictures.Picture"], "'Picture'"),
        (["--ckpt_path=last", "--run_dir=nowhere"], "there is no checkpoint at nowhere/checkpoints/last.ckpt"),
        (["--trainer.val_check_interval=2.5"], "error: You have passed invalid value 2.5 for val_check_interval"),
        (["--run_dir=/proc"], "error: cannot write to run_dir /proc "),
        (["-c", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message, told, tmp_path):
    code, said = told("-c", TINY, *arguments)
    assert code == 2
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_as_such_says_one_line(tmp_path):
    done = run_fit("-c", TINY, "--model.init_args.optimizer.lr=-1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: optimizer.lr must be positive, got -1.0\n"


def test_a_run_folder_that_cannot_be_written_is_named(told, tmp_path):
    (tmp_path / "file").touch()
    code, said = told("-c", TINY, "--run_dir=file/run")
    assert code == 2 and said == (
        "error: cannot write to run_dir file/run (Not a directory); choose another with --run_dir\n"
    )


def test_a_run_is_not_overwritten_from_the_checkpoint_of_another(told, tmp_path):
    for name in ("run/checkpoints/last.ckpt", "other/checkpoints/last.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    code, said = told("-c", TINY, "--run_dir=run", "--ckpt_path=other/checkpoints/last.ckpt")
    assert code == 2 and said.startswith("error: run already holds a run (run/checkpoints/last.ckpt): ")


def other_body(path: Path) -> Path:
    """A body file with longer legs and everything else."""
    arrays = dict(np.load(FREE_BODY))
    arrays["v_template"] = arrays["v_template"] * 1.1
    np.savez(path, **arrays)
    return path


def test_a_model_of_another_body_than_the_datas_is_refused_before_clips_are_made(told, tmp_path):
    body = other_body(tmp_path / "other.npz")
    few = ["--data.init_args.make_train.clips=8", "--data.init_args.make_val.clips=1", "--trainer.max_epochs=1"]
    code, said = told("-c", TINY, *TINY_NET, *QUICK, *few, f"--model.init_args.body={body}", "--data_dir=clips")
    assert code == 2 and said.count("error: ") == 1
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert load_body("free").id in line and load_body(body).id in line and "data.init_args.body=free" in line
    assert not (tmp_path / "clips").exists() and not (tmp_path / "runs").exists()


def test_an_encoder_of_another_body_to_start_from_is_named_in_one_line(told, tmp_path):
    start = make_encoder(tmp_path / "other.ckpt", body="other@0123456789abcdef")
    code, said = told("-c", TINY, *TINY_NET, f"--model.init_args.init_from={start}")
    assert code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: {start} belongs to body 'other@0123456789abcdef', but this run uses body 'free@")


def damage(shards: Path, member: str, start: int) -> tuple[Path, str]:
    """Zero a member of a clip from byte `start` of each picture on; returns the shard and the clip's key."""
    store = ClipStore(shards)
    tar, clip = store.shard_of(3), store[3]
    (sample,) = (s for s in ShardIndex.read(tar).samples if s.key == clip.key)
    offset, _ = sample.files[member]
    pictures = clip.frames if member == "frames.jpgs" else clip.masks
    with tar.open("r+b") as file:
        for begin, end in itertools.pairwise(pictures.offsets.tolist()):
            file.seek(offset + begin + start)
            file.write(bytes(end - begin - start))
    return tar, clip.key


@pytest.mark.parametrize(
    ("member", "start", "message"),
    [
        ("frames.jpgs", 0, "frames[0] is neither a JPEG nor a PNG"),
        ("masks.pngs", 64, "masks: frame "),  # found only when it is decoded
    ],
)
def test_a_damaged_picture_is_named_with_its_shard_and_clip(member, start, message, tiny_shards, told, tmp_path):
    """It is found in a loader process, whose traceback is of no help."""
    shutil.copytree(tiny_shards, tmp_path / "shards")
    tar, key = damage(tmp_path / "shards", member, start)
    code, said = told("-c", TINY, *TINY_NET, *QUICK, *tiny_data(tmp_path / "shards"), "--data.init_args.workers=1")
    assert code == 2
    assert said.splitlines()[-1].startswith(f"error: {tar}: clip {key}: {message}"), said


def test_a_full_disk_is_named_with_the_checkpoint_and_what_to_do(tiny_shards, tmp_path):
    """Simulated: no file of the run may grow beyond 100 kB, which a checkpoint does."""
    arguments = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), "-c", every_step(tmp_path), "--run_dir=run"]
    done = run_fit(
        "-c", TINY, *arguments, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5,) * 2)
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: cannot write the checkpoint") and "run/checkpoints/" in error
    assert "File too large" in error and "make room and go on with --ckpt_path last" in error
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(3)}, tmp_path / "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*last\.ckpt \(File too large; \d+ MB are free"):
            AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(10**5)}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_the_clips(tiny_shards, told, tmp_path):
    arguments = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), "--model.init_args.loss.joints3d=.inf"]
    code, said = told("-c", TINY, *arguments)
    assert code == 2
    assert "\nerror: the loss is not finite at step 0: " in f"\n{said}" and "clips: " in said.splitlines()[-1]
    assert not (tmp_path / "runs/encoder_tiny/checkpoints/last.ckpt").exists()


# ---- what a run ends with ------------------------------------------------------------------------


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


def test_print_config_shows_resolved_interpolations(here, capsys):
    with pytest.raises(SystemExit) as left:
        here("-c", str(ROOT / "conf/encoder_tiny.yaml"), "--run_dir=elsewhere", "--print_config")
    assert left.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]["init_args"]["save_dir"] == "elsewhere"


def with_callback(tmp_path: Path, class_path: str, **init_args) -> str:
    """A config file that appends a callback."""
    file = tmp_path / f"{class_path.rpartition('.')[2]}.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"callbacks+": {"class_path": class_path, "init_args": init_args}}}))
    return str(file)


def every_step(tmp_path: Path) -> str:
    """A config file whose only callback saves a checkpoint after every step."""
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": "${run_dir}/checkpoints", "every_n_train_steps": 1, "save_top_k": 1, "save_last": True,
            "enable_version_counter": False,
        },
    }  # fmt: skip
    file = tmp_path / "every_step.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": [save]}}))
    return str(file)


def validations(run: Path, metric: str = "val/mpjpe_mm") -> list[float]:
    """A metric of every validation, in order, those of resumed runs once."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [value for _, value in sorted({e.step: e.value for e in events.Scalars(metric)}.items())]


def test_the_table_is_of_the_best_checkpoint_and_under_its_protocol(tiny_shards, tmp_path, told, capsys):
    worse = ["--model.init_args.optimizer.lr=0.3", "--model.init_args.ema_decay=null", "--trainer.precision=32"]
    arguments = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), *worse, "--trainer.max_epochs=4", "--run_dir=run"]
    arguments.append("--trainer.enable_progress_bar=true")
    results = fit(["-c", TINY, *arguments])
    mpjpe = validations(tmp_path / "run")
    assert len(mpjpe) == 4 and min(mpjpe) < mpjpe[-1], "the last validation is not the best one"
    assert results["fit"].metrics["val/mpjpe_mm"] == pytest.approx(min(mpjpe))
    done = json.loads((tmp_path / "run/done.json").read_text())
    assert done["metrics"] == results["fit"].metrics and done["checkpoint"] == "run/checkpoints/best.ckpt"
    assert re.search(r"run_left:\s+0:00:0", capsys.readouterr().out)
    print_results(results)
    shown = capsys.readouterr().out
    assert shown.index("protocol     body-24: 24 joints; ") < shown.index("metrics of best.ckpt")
    assert f"{min(mpjpe):.2f}" in shown and f"{mpjpe[-1]:.2f}" not in shown


def test_the_table_says_when_its_metrics_are_of_an_earlier_step(tiny_shards, tmp_path, monkeypatch, capsys):
    """An epoch has 3 steps; the only checkpoint is of step 4."""
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), "--trainer.limit_val_batches=1", "--trainer.max_steps=4"]
    results = fit(["-c", TINY, *arguments, "-c", every_step(tmp_path), "--run_dir=run"])
    assert json.loads((tmp_path / "run/done.json").read_text())["validated_step"] == 3
    print_results(results)
    assert "fit: finished; last.ckpt, last validated at step 3" in " ".join(capsys.readouterr().out.split())


def run_every_step(folder: Path, shards: Path, run_dir: str, *more: str) -> subprocess.CompletedProcess:
    """4 epochs of 3 steps, with a checkpoint after every step."""
    arguments = [*TINY_NET, *QUICK, *tiny_data(shards), "--trainer.max_epochs=4", "--trainer.limit_val_batches=1"]
    arguments += ["-c", every_step(folder), *more, f"--run_dir={run_dir}"]
    return run_fit("-c", TINY, *arguments, cwd=folder, start_new_session=True)


@pytest.fixture(scope="module")
def unbroken(tiny_shards, tmp_path_factory) -> dict:
    """The last checkpoint of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run_every_step(folder, tiny_shards, "run")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(("ended", "workers"), [("KillAtStep", 0), ("InterruptAtStep", 2)])
def test_a_run_that_was_ended_resumes_bit_for_bit(ended, workers, unbroken, tiny_shards, tmp_path):
    """kill -9 or Ctrl-C in mid-epoch, then --ckpt_path last: weights, average and optimiser equal an unbroken run's."""
    end = with_callback(tmp_path, f"helpers.{'kill' if ended == 'KillAtStep' else 'interrupt'}.{ended}", step=8)

    def run(*more: str) -> subprocess.CompletedProcess:
        return run_every_step(tmp_path, tiny_shards, "run", f"--data.init_args.workers={workers}", *more)

    broken = run("-c", end)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    if ended == "KillAtStep":
        assert broken.returncode == -signal.SIGKILL and saved == 7
        refused = run()
        assert refused.returncode == 2 and "already holds a run" in refused.stderr
    else:
        assert broken.returncode == 130 and saved == 8
        assert broken.stderr.splitlines()[-1].startswith("[fit] interrupted; ") and "Traceback" not in broken.stderr
    resumed = run("--ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr

    other = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert unbroken["global_step"] == other["global_step"] == 12
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in unbroken["state_dict"].items())
    moments, others = (c["optimizer_states"][0]["state"] for c in (unbroken, other))
    assert all(torch.equal(v["exp_avg_sq"], others[k]["exp_avg_sq"]) for k, v in moments.items())


def test_a_killed_run_that_goes_on_has_one_best_checkpoint(tiny_shards, tmp_path):
    """The last checkpoint is of step 3, from before the validation that wrote best.ckpt; the kill is at step 4."""
    callbacks = yaml.safe_load(Path(TINY).read_text())["trainer"]["callbacks"]
    for callback in callbacks:
        if "every_n_train_steps" in callback.get("init_args", {}):
            callback["init_args"]["every_n_train_steps"] = 3
    often = tmp_path / "often.yaml"
    often.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    kill = with_callback(tmp_path, "helpers.kill.KillAtStep", step=4)
    arguments = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), "--trainer.max_epochs=3", "--run_dir=run"]
    assert run_fit("-c", TINY, "-c", str(often), "-c", kill, *arguments, cwd=tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "run/checkpoints/best.ckpt").exists()
    (tmp_path / "run/checkpoints/.last.ckpt.123.tmp").touch()  # killed while it was writing
    resumed = run_fit("-c", TINY, "-c", str(often), *arguments, "--ckpt_path=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step000009.ckpt"]
    metrics = json.loads((tmp_path / "run/done.json").read_text())["metrics"]
    assert metrics["val/mpjpe_mm"] == pytest.approx(min(validations(tmp_path / "run")))
    step = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["global_step"]
    assert step == 3 * (1 + int(np.argmin(validations(tmp_path / "run"))))


@pytest.mark.parametrize("config", ONE_STAGE, ids=lambda p: p.name)
def test_no_config_lets_checkpoints_take_other_names(config):
    for callback in yaml.safe_load(config.read_text())["trainer"]["callbacks"]:
        if callback["class_path"].endswith("ModelCheckpoint"):
            assert callback["init_args"]["enable_version_counter"] is False


# ---- resuming with another config ----------------------------------------------------------------


def test_resuming_with_another_config_is_refused_by_key_and_leaves_the_run_alone(tiny_shards, told, tmp_path):
    common = [*TINY_NET, *QUICK, *tiny_data(tiny_shards), "--trainer.limit_val_batches=1", "--run_dir=run"]
    assert told("-c", TINY, *common, "--trainer.max_epochs=1")[0] == 0
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for key, old, new in (
        ("model.init_args.net.vit_dim", "32", "64"),
        ("model.init_args.ema_decay", "0.998", "null"),
        ("model.init_args.loss.token_joints", "2.0", "0.0"),
        ("model.init_args.optimizer.lr", "0.0005", "0.1"),
        ("data.init_args.batch_size", "2", "1"),
        ("trainer.gradient_clip_val", "1.0", "2.0"),
        ("seed_everything", "0", "1"),
    ):
        code, said = told("-c", TINY, *common, "--trainer.max_epochs=2", f"--{key}={new}", "--ckpt_path=last")
        assert code == 2 and said.count("\n") == 1
        assert f"{key}: {old} -> {new.replace('null', 'None')}" in said and "max_epochs" not in said
    # What may change as a key, but turns out to be other clips when they are opened:
    clips = make_clips(tmp_path / "clips", lengths=(12, 12))
    other = [f"--data.init_args.train={clips}", "--ckpt_path=last"]
    code, said = told("-c", TINY, *common, "--trainer.max_epochs=2", *other)
    assert code == 2 and "order of training data cannot be continued (clips: " in said
    assert {path: path.read_bytes() for path in before} == before

    longer = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--data.init_args.workers=1"]
    assert told("-c", TINY, *common, *longer, "--ckpt_path=last")[0] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_callbacks_may_change_but_for_those_that_train(tmp_path):
    def callbacks(budget_mm: float, *more: str, calibration: str = "a") -> dict:
        merging = {
            "class_path": "callbacks.progressive.ProgressiveMerging",
            "init_args": {"calibration": calibration, "budget_mm": budget_mm},
        }
        return {"trainer": {"callbacks": [{"class_path": name} for name in more] + [merging]}}

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(callbacks(5.0)))
    checkpoint = tmp_path / "checkpoints/last.ckpt"
    require_resumable(checkpoint, callbacks(5.0, "callbacks.pictures.Pictures", calibration="b"), dict)
    with pytest.raises(UsageError, match=r"\(trainer\.callbacks\.budget_mm: 5\.0 -> 6\.0\)"):
        require_resumable(checkpoint, callbacks(6.0), dict)


def test_help_keeps_the_lines_of_its_examples(told, capsys):
    with pytest.raises(SystemExit):
        told("--help")
    assert "\n`--ckpt_path last` goes on from the newest checkpoint of `run_dir`; " in capsys.readouterr().out
