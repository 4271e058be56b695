"""One-shot against progressive merging, at exactly equal depth and equal fine-tuning.

    python docs/study_progressive.py CHECKPOINT --data DATA --out OUT [--layers 10 8 6] [--seeds 0 1]
    python docs/study_progressive.py CHECKPOINT --data DATA --out OUT --epochs 1 --clips 160      in minutes

CHECKPOINT is an un-merged encoder of any size, DATA holds the sets `train` and `val`. Every run fine-tunes as
conf/progressive_tiny.yaml does, with the encoder's own token merging (Mask-ToMe to 90 tokens if it has none), for the
same number of steps, on one thread, `--jobs` runs at a time:

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
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from study_runs import LAST_CHECKPOINT, StudyError, digest, locked, print_table, train

from fasthmr.body import load_body, require_same_body
from fasthmr.calibration import CalibrationSet, PlanErrors, RememberedErrors
from fasthmr.checkpoint import encoder_id, load_encoder, read_header, save_encoder
from fasthmr.data.shards import ClipStore
from fasthmr.merging import LayerMergePlan, TokenMerging, search_layer_merges
from fasthmr.models.hmr import HMR

CONFIG = Path("conf/progressive_tiny.yaml")
CALIBRATION_CLIPS, CALIBRATION_FRAMES = 100, 5
VAL_FRAMES = 27
#: budgets of ECLM that are tried: this one, doubled until it suffices, then halved intervals down to the precision
FIRST_TAU_MM, LAST_TAU_MM, TAU_STEPS = 0.1, 1000.0, 5
METRICS = ("pa_mpjpe_mm", "mpjpe_mm", "pve_mm")


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

    @cached_property
    def tokens(self) -> TokenMerging:
        """What all runs merge tokens by."""
        return read_header(self.checkpoint).config.token_merging or TokenMerging()

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
        shards = {name: digest(ClipStore(self.data / name).manifest.shards) for name in ("train", "val")}
        return {
            "encoder": encoder_id(load_encoder(self.checkpoint)),
            **shards,
            "epochs": self.epochs,
            "batches": self.batches,
            "clips": self.clips,
            "calibration": self.calibration,
            "token_merging": dataclasses.asdict(self.tokens),
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
    hmr.set_token_merging(study.tokens)
    depth = len(hmr.backbone.blocks)
    measured = PlanErrors(hmr, body, CalibrationSet.read(study.data / "train", body.id, **study.calibration))
    remembered = RememberedErrors(measured, study.out / "search.json", digest(identity))
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
    made_from = {**identity, **dataclasses.asdict(run), "start": encoder_id(load_encoder(start))}
    metrics = train(CONFIG, _overlay(study, run, start), run_dir, made_from)
    depth = len(read_header(run_dir / LAST_CHECKPOINT).merge_plan.layers)
    if depth != run.layers:
        raise StudyError(f"{run.name} ended with {depth} layers: give it more steps, with --epochs or --clips")
    return {name: metrics[f"val/{name}"] for name in METRICS}


def _overlay(study: Study, run: Run, start: Path) -> dict[str, Any]:
    """What a run's config has on top of `CONFIG`."""
    header = read_header(start)
    callbacks: list[dict[str, Any]] = []
    if run.how == "progressive":
        removed = header.config.vit_depth - run.layers
        merging = {
            "calibration": str(study.data / "train"), **study.calibration, "policy": "eclm", "budget_mm": 1e6,
            "every_n_steps": max(1, study.epochs * study.batches // (2 * removed)), "layers_per_event": 1,
            "target_layers": run.layers, "moments": run.moments,
        }  # fmt: skip
        callbacks.append({"class_path": "callbacks.progressive.ProgressiveMerging", "init_args": merging})
    validation = ClipStore(study.data / "val")
    limit = min(len(validation), study.clips or sys.maxsize)
    frames = min(VAL_FRAMES, *(length for _, length in validation.lengths()))
    net = {**header.config.as_dict(), "token_merging": dataclasses.asdict(study.tokens)}
    return {
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
            "max_epochs": study.epochs, "check_val_every_n_epoch": study.epochs,
            "limit_train_batches": study.batches, "limit_val_batches": limit, "callbacks": callbacks,
        },
    }  # fmt: skip


# ---- tables ---------------------------------------------------------------------------------------------------------


def print_tables(results: dict[Run, dict[str, float]]) -> None:
    """Every run, then means over seeds."""
    print_table(
        "Every run",
        ["layers", "merged", "moments", "seed", "PA-MPJPE, mm", "MPJPE, mm", "PVE, mm"],
        [[r.layers, r.how, r.moments, r.seed, *(v[name] for name in METRICS)] for r, v in results.items()],
    )
    rows = []
    for how, layers, moments in dict.fromkeys((run.how, run.layers, run.moments) for run in results):
        same = [
            v["mpjpe_mm"] for run, v in results.items() if (run.how, run.layers, run.moments) == (how, layers, moments)
        ]
        rows.append([layers, how, moments, sum(same) / len(same), min(same), max(same)])
    print_table("MPJPE, mm, over seeds", ["layers", "merged", "moments", "mean", "from", "to"], rows)


# ---- the command ----------------------------------------------------------------------------------------------------


def all_runs(layers: Sequence[int], seeds: Sequence[int], moments: Sequence[str], depth: int) -> list[Run]:
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
    hmr.set_token_merging(study.tokens)
    fewest = len(hmr.backbone.tokens_merged(depth))
    layers = list(dict.fromkeys(options.layers))
    if wrong := [number for number in layers if not fewest <= number < depth]:
        raise StudyError(f"--layers must be from {fewest}, which Mask-ToMe needs, to {depth - 1}, got {wrong}")
    with locked(study.out):
        identity = study.identity()
        merged = merge_once(study, layers, identity)
        runs = all_runs(layers, options.seeds, options.moments, depth)

        def result(run: Run) -> dict[str, float]:
            return fine_tune(study, run, merged[run.layers] if run.how == "once" else study.checkpoint, identity)

        with ThreadPoolExecutor(options.jobs) as pool:
            return dict(zip(runs, pool.map(result, runs), strict=True))


if __name__ == "__main__":
    sys.exit(main())
