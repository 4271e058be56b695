"""One-shot against progressive merging, at exactly equal depth and equal fine-tuning.

    python docs/study_progressive.py CHECKPOINT --data DATA --out OUT [--layers 10 8 6] [--seeds 0 1]
    python docs/study_progressive.py CHECKPOINT --data DATA --out OUT --epochs 1 --clips 160      in minutes

CHECKPOINT is an un-merged encoder of any size, DATA holds the sets `train` and `val`. Every run fine-tunes as
conf/progressive_tiny.yaml does, with Mask-ToMe (192 -> 90 tokens), for the same number of steps, on one thread,
`--jobs` runs at a time:

- "never": all layers stay;
- "once": the layers that ECLM merges on calibration frames, tokens merged too, are merged before fine-tuning. The
  search is stopped as soon as exactly as many layers are left as asked for, at the smallest budget that suffices;
- "progressive": one layer at a time during the first half, down to as many; Adam's moments of a merged layer are those
  of the `later` layer, or `reset`.

Finished runs are not repeated and interrupted ones go on, if they are of the same encoder, data and settings; otherwise
it says what differs. Prints the last validation metrics as Markdown tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fasthmr.body import load_body, require_same_body
from fasthmr.calibration import CalibrationSet, PlanErrors, RememberedErrors
from fasthmr.checkpoint import encoder_id, load_encoder, read_header, save_encoder
from fasthmr.data.shards import ClipStore
from fasthmr.files import write_text
from fasthmr.merging import LayerMergePlan, TokenMerging, search_layer_merges
from fasthmr.models.hmr import HMR

CONFIG = Path("conf/progressive_tiny.yaml")
TOKENS = TokenMerging()
CALIBRATION_CLIPS, CALIBRATION_FRAMES = 100, 5
VAL_FRAMES = 27
#: budgets of ECLM that are tried: this one, doubled until it suffices, then halved intervals down to the precision
FIRST_TAU_MM, LAST_TAU_MM, TAU_STEPS = 0.1, 1000.0, 5
METRICS = ("pa_mpjpe_mm", "mpjpe_mm", "pve_mm")


class StudyError(Exception):
    """The study cannot go on; the message says what, got, do."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning: how layers go ("never", "once", "progressive"), how many are left, what of Adam's moments."""

    how: str
    layers: int
    seed: int
    moments: str = ""

    @property
    def name(self) -> str:
        return "_".join(filter(None, (f"{self.how}{self.layers}", self.moments, f"seed{self.seed}")))


@dataclass(frozen=True)
class Study:
    """What all runs share.

    Args:
        checkpoint: the un-merged encoder.
        data: folder of the sets `train` and `val`.
        out: folder to write to.
        epochs: of each run.
        clips: at most so many clips of an epoch, of calibration and of validation; None: all.
    """

    checkpoint: Path
    data: Path
    out: Path
    epochs: int
    clips: int | None = None

    @property
    def batches(self) -> int:
        """Training batches of an epoch."""
        return self._train_clips // self.batch_size

    @property
    def batch_size(self) -> int:
        """`CONFIG`'s, unless there are fewer clips."""
        configured: int = yaml.safe_load(CONFIG.read_text())["data"]["init_args"]["batch_size"]
        return min(configured, self._train_clips)

    @property
    def _train_clips(self) -> int:
        return min(len(ClipStore(self.data / "train")), self.clips or sys.maxsize)

    @property
    def calibration(self) -> dict[str, int]:
        return {
            "max_clips": min(CALIBRATION_CLIPS, self.clips or CALIBRATION_CLIPS),
            "frames_per_clip": CALIBRATION_FRAMES,
        }

    def identity(self) -> dict[str, Any]:
        """Everything that results follow from, but for the run; plain data."""
        shards = {name: _digest(ClipStore(self.data / name).manifest.shards) for name in ("train", "val")}
        return {
            "encoder": encoder_id(load_encoder(self.checkpoint)),
            **shards,
            "epochs": self.epochs,
            "batches": self.batches,
            "clips": self.clips,
            "calibration": self.calibration,
            "token_merging": dataclasses.asdict(TOKENS),
            "config": _config_digest(),
        }


# ---- one-shot merging -----------------------------------------------------------------------------------------------


def plan_of_depth(depth: int, layers: int, error: Callable[[LayerMergePlan], float]) -> tuple[LayerMergePlan, float]:
    """The plan that ECLM finds for exactly `layers` layers, and the budget it took, mm.

    Raises:
        StudyError: no budget suffices.
    """

    def found(tau: float) -> LayerMergePlan:
        return search_layer_merges(depth, error, tau, min_layers=layers)

    low, high = 0.0, FIRST_TAU_MM
    while len(found(high).layers) > layers:
        low, high = high, 2 * high
        if high > LAST_TAU_MM:
            raise StudyError(f"ECLM leaves more than {layers} of {depth} layers at any budget up to {LAST_TAU_MM} mm")
    for _ in range(TAU_STEPS):
        middle = (low + high) / 2
        if len(found(middle).layers) == layers:
            high = middle
        else:
            low = middle
    return found(high), high


def merge_once(study: Study, layers: Sequence[int], identity: dict[str, Any]) -> dict[int, Path]:
    """Write the encoders that ECLM merges to these numbers of layers, with tokens merged while it searches."""
    body, hmr = load_body(), load_encoder(study.checkpoint)
    require_same_body(body.id, read_header(study.checkpoint).body, where=str(study.checkpoint))
    hmr.set_token_merging(TOKENS)
    depth = len(hmr.backbone.blocks)
    measured = PlanErrors(hmr, body, CalibrationSet.read(study.data / "train", body.id, **study.calibration))
    remembered = RememberedErrors(measured, study.out / "search.json", _digest(identity))
    files = {}
    for number in layers:
        plan, tau = plan_of_depth(depth, number, remembered)
        before, after = remembered(LayerMergePlan(depth)), remembered(plan)
        print(f"once, {number} layers: tau {tau:.3g} mm, {before:.1f} -> {after:.1f} mm: {plan}", flush=True)
        files[number] = study.out / f"once{number}.ckpt"
        merged = load_encoder(study.checkpoint)
        merged.merge_layers(plan)
        save_encoder(files[number], merged, body.id)
    return files


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def fine_tune(study: Study, run: Run, start: Path, identity: dict[str, Any]) -> dict[str, float]:
    """Fine-tune from `start`; returns its last validation metrics.

    Raises:
        StudyError: its folder holds a run of something else, it failed, or it ended at another depth.
    """
    run_dir = study.out / run.name
    _require_same(run_dir, {**identity, **dataclasses.asdict(run), "start": encoder_id(load_encoder(start))})
    last = run_dir / "checkpoints/last.ckpt"
    if not (run_dir / "done.json").exists():
        if _config_digest() != identity["config"]:
            raise StudyError(f"{CONFIG} was changed while the study ran: restore it, or begin anew in another --out")
        overlay = run_dir / "overlay.yaml"
        write_text(overlay, yaml.safe_dump(_overlay(study, run, start, run_dir)))
        command = [sys.executable, "-m", "fasthmr.fit", "-c", str(CONFIG), "-c", str(overlay)]
        command += ["--ckpt_path", "last"] if last.exists() else []
        with (run_dir / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if subprocess.run(command, env=environment, stdout=log, stderr=log).returncode != 0:
                raise StudyError(f"{run.name} failed: see {log.name}")
    depth = len(read_header(last).merge_plan.layers)
    if depth != run.layers:
        raise StudyError(f"{run.name} ended with {depth} layers: give it more steps, with --epochs or --clips")
    metrics: dict[str, float] = json.loads((run_dir / "done.json").read_text())["metrics"]
    if missing := [name for name in METRICS if f"val/{name}" not in metrics]:
        raise StudyError(f"{run.name} was killed after its last validation and lacks {missing}: remove {run_dir}")
    return {name: metrics[f"val/{name}"] for name in METRICS}


def _overlay(study: Study, run: Run, start: Path, run_dir: Path) -> dict[str, Any]:
    """What a run's config has on top of `CONFIG`."""
    header = read_header(start)
    callbacks: list[dict[str, Any]] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {
                "dirpath": str(run_dir / "checkpoints"), "filename": "newest", "enable_version_counter": False,
                "every_n_epochs": 1, "save_on_train_epoch_end": True, "save_last": True,
            },
        }
    ]  # fmt: skip
    if run.how == "progressive":
        removed = header.config.vit_depth - run.layers
        merging = {
            "calibration": str(study.data / "train"), **study.calibration, "policy": "eclm", "budget_mm": 1e6,
            "every_n_steps": max(1, study.epochs * study.batches // (2 * removed)), "layers_per_event": 1,
            "target_layers": run.layers, "moments": run.moments,
        }  # fmt: skip
        callbacks.insert(0, {"class_path": "callbacks.progressive.ProgressiveMerging", "init_args": merging})
    validation = ClipStore(study.data / "val")
    limit = min(len(validation), study.clips or sys.maxsize)
    frames = min(VAL_FRAMES, *(length for _, length in validation.lengths()))
    net = {**header.config.as_dict(), "token_merging": dataclasses.asdict(TOKENS)}
    return {
        "run_dir": str(run_dir),
        "seed_everything": run.seed,
        "model": {"init_args": {"net": net, "init_from": str(start)}},
        "data": {
            "init_args": {
                "train": str(study.data / "train"), "val": str(study.data / "val"), "make_train": None,
                "make_val": None, "workers": 1, "batch_size": study.batch_size, "val_frames": frames,
                "val_batch_size": 1,
            }
        },
        "trainer": {
            "max_epochs": study.epochs, "check_val_every_n_epoch": study.epochs, "enable_progress_bar": False,
            "limit_train_batches": study.batches, "limit_val_batches": limit, "callbacks": callbacks,
        },
    }  # fmt: skip


def _require_same(run_dir: Path, identity: dict[str, Any]) -> None:
    """Write down what a run is made from, or compare it with what an earlier one in the same folder was made from."""
    file = run_dir / "made_from.json"
    identity = json.loads(json.dumps(identity))
    if file.exists():
        before = json.loads(file.read_text())
        changed = [f"{k}: {before.get(k)} -> {v}" for k, v in identity.items() if before.get(k) != v]
        if changed:
            raise StudyError(f"{run_dir} was made from something else ({'; '.join(changed)}): choose another --out")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(identity, indent=1))


# ---- tables ---------------------------------------------------------------------------------------------------------


def print_tables(results: dict[Run, dict[str, float]]) -> None:
    """Every run, then means over seeds."""
    print("\n| layers | merged | moments | seed | PA-MPJPE, mm | MPJPE, mm | PVE, mm |\n|---|---|---|---|---|---|---|")
    for run, values in results.items():
        errors = " | ".join(f"{values[name]:.1f}" for name in METRICS)
        print(f"| {run.layers} | {run.how} | {run.moments} | {run.seed} | {errors} |")
    print(
        "\nMPJPE, mm, mean over seeds:\n\n| layers | merged | moments | mean | from | to |\n|---|---|---|---|---|---|"
    )
    for how, layers, moments in dict.fromkeys((run.how, run.layers, run.moments) for run in results):
        same = [
            v["mpjpe_mm"] for run, v in results.items() if (run.how, run.layers, run.moments) == (how, layers, moments)
        ]
        print(f"| {layers} | {how} | {moments} | {sum(same) / len(same):.1f} | {min(same):.1f} | {max(same):.1f} |")


# ---- the command ----------------------------------------------------------------------------------------------------


def study_runs(layers: Sequence[int], seeds: Sequence[int], moments: Sequence[str], depth: int) -> list[Run]:
    """All runs, each once."""
    runs = [Run("never", depth, seed) for seed in seeds]
    for number in layers:
        runs += [Run("once", number, seed) for seed in seeds]
        runs += [Run("progressive", number, seed, kept) for kept in moments for seed in seeds]
    return list(dict.fromkeys(runs))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 8, 6], help="exactly so many layers are left")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--moments", nargs="+", choices=("later", "reset"), default=["later", "reset"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--clips", type=int, help="at most so many clips of an epoch, and of validation; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args(arguments)
    try:
        for name in ("epochs", "clips", "jobs"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise StudyError(f"--{name} must be 1 or more, got {getattr(options, name)}")
        study = Study(options.checkpoint, options.data, options.out, options.epochs, options.clips)
        print_tables(_results(study, options))
    except (StudyError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _results(study: Study, options: argparse.Namespace) -> dict[Run, dict[str, float]]:
    hmr: HMR = load_encoder(study.checkpoint)
    depth = len(hmr.backbone.blocks)
    if hmr.merge_plan.events:
        raise StudyError(f"{study.checkpoint} has merged layers already ({hmr.merge_plan}): give an un-merged encoder")
    hmr.set_token_merging(TOKENS)
    fewest = len(hmr.backbone.tokens_merged(depth))
    layers = list(dict.fromkeys(options.layers))
    if wrong := [number for number in layers if not fewest <= number < depth]:
        raise StudyError(f"--layers must be from {fewest}, which Mask-ToMe needs, to {depth - 1}, got {wrong}")
    study.out.mkdir(parents=True, exist_ok=True)
    with (study.out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another study is running in {study.out}: wait for it, or choose another --out") from None
        identity = study.identity()
        merged = merge_once(study, layers, identity)
        runs = study_runs(layers, options.seeds, options.moments, depth)

        def result(run: Run) -> dict[str, float]:
            return fine_tune(study, run, merged[run.layers] if run.how == "once" else study.checkpoint, identity)

        with ThreadPoolExecutor(options.jobs) as pool:
            return dict(zip(runs, pool.map(result, runs), strict=True))


def _config_digest() -> str:
    return hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:16]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
