"""The scripts in slurm/ under a real SLURM of two nodes: jobs that are killed, cancelled and requeued lose nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from slurm_lab import slurm, wait_until, why_not
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fit import START_TINY, TINY_NET, default_recipe, tiny_data

from fasthmr.data.shards import ClipStore

ROOT = Path(__file__).parents[1]
#: of one job, from its submission to its end, on a busy machine
PATIENCE_S = float(os.environ.get("FASTHMR_TEST_PATIENCE_S", 180))

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def test_the_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found: apt-get install shellcheck")
    scripts = [str(path) for path in sorted((ROOT / "slurm").glob("*.s*"))]
    assert len(scripts) == 4
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class Cluster:
    """Submits jobs, and says what became of them."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.folder = folder
        self.environment = environment | {
            "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "120",
        }  # fmt: skip

    def run(self, *command: str, cwd: Path = ROOT) -> str:
        return subprocess.run(
            command, cwd=cwd, env=self.environment, check=True, stdout=subprocess.PIPE, text=True, timeout=60
        ).stdout.strip()

    def submit(self, *arguments: str, **environment: str) -> str:
        """Number of the job; it writes to `log(job)`."""
        before = self.environment
        self.environment = before | environment
        try:
            return self.run("sbatch", "--parsable", "--cpus-per-task=1", f"--output={self.folder}/%A.out", *arguments)
        finally:
            self.environment = before

    def log(self, job: str) -> str:
        file = self.folder / f"{job}.out"
        return file.read_text() if file.exists() else ""

    def states(self, job: str) -> list[str]:
        """Of the job, or of each task of an array."""
        return re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))

    def wait_for(self, job: str, *states: str) -> None:
        """Until the job, or all tasks of it, are in one of `states`."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_until(lambda: set(self.states(job)) <= ended, PATIENCE_S, f"the end of job {job}")
        assert set(self.states(job)) <= {*states}, self.log(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # The socket's path must be short.
    folder = tmp_path_factory.mktemp("slurm")
    with slurm(folder / "lab") as environment:
        yield Cluster(environment, folder)


class Training:
    """12 steps on two nodes, with merges at steps 3 and 7, a validation after every third and a checkpoint after
    every second one; it can stand still at some."""

    def __init__(self, cluster: Cluster, shards: Path, name: str, pauses: list[int]) -> None:
        self.cluster, self.folder, self.run_dir = cluster, cluster.folder / name, cluster.folder / name / "run"
        self.folder.mkdir()
        callbacks = {
            "callbacks.progressive.ProgressiveMerging": {
                "calibration": str(shards), "budget_mm": 1000.0, "at_steps": [3, 7], "frames_per_clip": 2,
                "max_clips": 2, "target_layers": 4,
            },
            "helpers.pause.PauseAtSteps": {"folder": str(self.folder / "pauses"), "steps": pauses},
            "helpers.ranks.WriteRanks": {"folder": str(self.folder / "ranks")},
            "lightning.pytorch.callbacks.ModelCheckpoint": {
                "dirpath": "${run_dir}/checkpoints", "filename": "step", "every_n_train_steps": 2, "save_last": True,
                "enable_version_counter": False,
            },
        }  # fmt: skip
        listed = [{"class_path": path, "init_args": values} for path, values in callbacks.items()]
        config = self.folder / "callbacks.yaml"
        config.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
        self.arguments = [
            "--nodes=2", "slurm/fit.sbatch", "-c", "conf/progressive_tiny.yaml", "-c", str(config),
            *TINY_NET, *START_TINY, "--model.init_args.net.vit_depth=6", *tiny_data(shards),
            "--data.init_args.batch_size=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
            "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=4",
            "--trainer.log_every_n_steps=1", f"--run_dir={self.run_dir}",
        ]  # fmt: skip

    def submit(self, *more: str, options: tuple[str, ...] = ()) -> str:
        return self.cluster.submit(*options, *self.arguments, *more)

    def wait_for_pause(self, job: str, step: int) -> list[int]:
        """Until both processes stand still at a step; their process numbers."""
        files = [self.folder / "pauses" / f"{step}-{rank}.txt" for rank in (0, 1)]
        try:
            wait_until(lambda: all(f.exists() and f.read_text() for f in files), PATIENCE_S, f"step {step}")
        except AssertionError as error:
            raise AssertionError(f"{error}; job {job} says:\n{self.cluster.log(job)}") from error
        return [int(file.read_text()) for file in files]

    def ranks(self) -> list[dict]:
        return [json.loads((self.folder / f"ranks/rank{rank}.json").read_text()) for rank in (0, 1)]

    def last(self) -> dict:
        return torch.load(self.run_dir / "checkpoints/last.ckpt", weights_only=True)

    def curve(self, tag: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(self.run_dir), size_guidance={"scalars": 0}).Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_job_that_is_killed_cancelled_and_requeued_ends_as_one_that_is_not(cluster, tiny_shards):
    unbroken = Training(cluster, tiny_shards, "unbroken", [])
    unbroken_job = unbroken.submit()
    broken = Training(cluster, tiny_shards, "broken", [4, 6, 8, 9])
    # One that SLURM itself tells that its time is nearly up: after 1 to 1.5 of 2 minutes.
    timed = Training(cluster, tiny_shards, "timed", [4])
    timed_job = timed.submit(options=("--time=2", "--signal=SIGUSR1@60"))

    # A process dies at step 4, after a merge; the last checkpoint is of step 2. The job ends, and is submitted again.
    job = broken.submit()
    processes = broken.wait_for_pause(job, 4)
    # Another job on its folder is refused, and names it.
    second = broken.submit("--ckpt_path=auto")
    refused = rf"is being written by another run \(process {processes[0]} on \S+ of SLURM job {job}\)"
    wait_until(lambda: re.search(refused, cluster.log(second)), PATIENCE_S, f"the refusal of job {second}")
    os.kill(processes[1], signal.SIGKILL)
    cluster.wait_for(job, "FAILED")
    assert broken.last()["global_step"] == 2
    job = broken.submit("--ckpt_path=auto")

    # The signal that SLURM sends before a job's time is up, at step 6.
    broken.wait_for_pause(job, 6)
    cluster.run("scancel", "--signal=USR1", job)

    # The one that comes when a job is preempted, at step 8, after another merge.
    broken.wait_for_pause(job, 8)
    cluster.run("scancel", "--signal=TERM", job)

    # The job step is cancelled at step 9, which kills its processes at once; the job is submitted again.
    broken.wait_for_pause(job, 9)
    cluster.run("scancel", f"{job}.0")
    cluster.wait_for(job, "FAILED")
    said = cluster.log(job)
    for expected in ("SIGUSR1: step 6 saved", "SIGTERM: step 8 saved", f"job {job} is requeued"):
        assert expected in said
    assert "Restarts=2" in cluster.run("scontrol", "show", "job", job)
    last_job = broken.submit("--ckpt_path=auto")
    cluster.wait_for(last_job, "COMPLETED")
    cluster.wait_for(unbroken_job, "COMPLETED")
    cluster.wait_for(second, "FAILED")
    require_same(unbroken, broken)

    cluster.wait_for(timed_job, "COMPLETED")
    assert "SIGUSR1: step 4 saved" in cluster.log(timed_job)
    assert re.search(r"Restarts=[1-9]", cluster.run("scontrol", "show", "job", timed_job))
    require_same(unbroken, timed)


def require_same(unbroken: Training, broken: Training) -> None:
    assert {(rank["weights"], str(rank["plan"])) for rank in [*unbroken.ranks(), *broken.ranks()]} == {
        (unbroken.ranks()[0]["weights"], str(unbroken.ranks()[0]["plan"]))
    }
    assert len(unbroken.ranks()[0]["plan"]) == 2
    one, other = unbroken.last(), broken.last()
    assert one["global_step"] == other["global_step"] == 12
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    moments, others = (c["optimizer_states"][0]["state"] for c in (one, other))
    assert all(torch.equal(v["exp_avg_sq"], others[k]["exp_avg_sq"]) for k, v in moments.items())
    for tag, steps in (("train/loss_total", list(range(12))), ("val/mpjpe_mm", [2, 5, 8, 11])):
        assert [step for step, _ in unbroken.curve(tag)] == steps
        assert broken.curve(tag) == unbroken.curve(tag)


def test_an_array_makes_a_set_and_a_part_that_was_killed_is_run_again(cluster):
    made = cluster.folder / "people"
    script = ["slurm/shard_array.sbatch", f"--out={made}", "--clips=3", "--frames=4", "--seed=7", "--clips_per_shard=1"]
    array = cluster.submit("--array=1-3", *script)
    wait_until(lambda: cluster.states(array).count("RUNNING") == 3, PATIENCE_S, "three tasks")
    cluster.run("scancel", f"{array}_2")
    cluster.wait_for(array, "COMPLETED", "CANCELLED", "FAILED")
    assert sorted(cluster.states(array)) == ["CANCELLED", "COMPLETED", "COMPLETED"]
    assert not (made / "manifest.json").exists()
    again = cluster.submit("--array=2", *script, PARTS="3")
    cluster.wait_for(again, "COMPLETED")
    assert len(ClipStore(made)) == 3


def test_a_recipe_as_one_job_a_stage_and_an_array_that_compares_what_it_made(cluster, tiny_shards):
    here = cluster.folder / "here"  # recipes write to runs/ of the folder that they are submitted from
    here.mkdir()
    for name in ("slurm", "conf"):
        (here / name).symlink_to(ROOT / name)
    done = cluster.run(
        sys.executable, "slurm/submit.py", "-c", "conf/fasthmr.yaml", *default_recipe(tiny_shards),
        f"--sbatch=--cpus-per-task=1 --output={cluster.folder}/%A.out", cwd=here,
    )  # fmt: skip
    jobs = dict(re.findall(r"job (\d+): (\w+)", done))
    assert list(jobs.values()) == ["prior", "encoder", "decoder", "evaluation"]
    for job in jobs:
        cluster.wait_for(job, "COMPLETED")
    run = here / "runs/fasthmr"
    assert "| + decoder" in (run / "evaluation/table.md").read_text()

    systems = cluster.folder / "systems.txt"
    systems.write_text(f"shipped:encoder_tiny\nmine={run}/encoder/checkpoints/best.ckpt\n")
    out = cluster.folder / "compared"
    array = cluster.submit(
        "--array=1-3", "slurm/evaluate_array.sbatch", str(systems), str(out), f"--data={tiny_shards}", "--max_clips=2",
        "--speed=false", "--workers=0",
    )  # fmt: skip
    cluster.wait_for(array, "COMPLETED", "FAILED")
    assert sorted(cluster.states(array)) == ["COMPLETED", "COMPLETED", "FAILED"]  # there is no third line
    names = [[s["name"] for s in json.loads((out / f"{n}/results.json").read_text())["systems"]] for n in (1, 2)]
    assert names == [["shipped:encoder_tiny"], ["mine"]]
