"""How a run goes on: from which checkpoint, what may have changed since, and the refusal of everything else."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fasthmr.checkpoint_files import CheckpointError, read_checkpoint, verify_checksums
from fasthmr.cli import UsageError, flatten

log = logging.getLogger(__name__)

#: the resolved config, in the folder of its run
CONFIG_FILE = "config.yaml"
LAST_CHECKPOINT = "checkpoints/last.ckpt"  # what an interrupted run goes on from

#: values of --ckpt_path that are no paths
LAST, AUTO = "last", "auto"

#: Keys, or patterns of them, that only watch a run, or say how fast it goes: they change nothing that it ends with.
#: (Where training clips are streamed, `workers` does: the data module refuses to go on with others.)
ONLY_WATCH = (
    "data.init_args.workers", "data.init_args.val_batch_size", "trainer.log_every_n_steps",
    "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.logger", "trainer.logger.*",
    "data.init_args.shard_cache.*",
)  # fmt: skip

#: Keys, or patterns of them, that may change when a run goes on: they change nothing of what is trained but how far
#: and where. That clips and processes give the same order of training data, and that bodies are the same, is checked
#: where they are opened.
MAY_CHANGE = (
    *ONLY_WATCH, "config", "ckpt_path", "run_dir", "data_dir",
    "model.init_args.body", "data.init_args.body", "data.init_args.train", "data.init_args.train.*",
    "data.init_args.val", "data.init_args.folder", "data.init_args.max_damaged",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.strategy.*",
    "trainer.default_root_dir",
    "trainer.max_*", "trainer.min_*", "trainer.check_val_every_n_epoch", "trainer.val_check_interval",
    "trainer.limit_val_batches", "trainer.num_sanity_val_steps",
    "trainer.profiler", "trainer.detect_anomaly", "trainer.callbacks.calibration",
)  # fmt: skip

#: of `trainer.callbacks` these change what is trained; others only watch and save
_CALLBACKS_THAT_TRAIN = ("callbacks.progressive.ProgressiveMerging", "callbacks.batch_size.LearningRateScaling")


def checkpoint_to_resume(run_dir: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint that a run goes on from; None: it starts anew.

    That of `run_dir` itself wins over one that was given: a job that SLURM starts again has the arguments that it had
    at first. Checkpoints say themselves of which step they are: clocks are not trusted.

    Args:
        run_dir: the run's folder.
        ckpt_path: what the user gave: a path, `last` (there must be one), `auto` (if there is one) or None.

    Raises:
        UsageError: `run_dir` holds a run that was not asked to go on, there is nothing to go on from, or every
            checkpoint is damaged.
    """
    last = run_dir / LAST_CHECKPOINT
    if ckpt_path in (LAST, AUTO) or _started_again():
        if last.exists():
            return _newest_whole(last)
        if ckpt_path == LAST and not _started_again():
            raise UsageError(f"--ckpt_path last: there is no checkpoint at {last}; start without --ckpt_path")
        if ckpt_path in (LAST, AUTO):
            return None
    if ckpt_path is not None:
        if not Path(ckpt_path).is_file():
            raise UsageError(f"--ckpt_path: there is no file {ckpt_path}")
        if not last.exists() or Path(ckpt_path).resolve().is_relative_to(run_dir.resolve()):
            return Path(ckpt_path)
    if last.exists():
        raise UsageError(
            f"{run_dir} already holds a run ({last}): add --ckpt_path last to go on with it, "
            "or choose another folder with --run_dir"
        )
    return None


def _started_again() -> bool:
    """Whether SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def _newest_whole(last: Path) -> Path:
    """`last`, or if it is damaged the one of the latest step that is not."""
    try:
        _step(last)
        return last
    except CheckpointError as error:
        log.warning("%s; looking for the one before", error)
    steps: dict[Path, int] = {}
    for other in sorted(last.parent.glob("*.ckpt")):
        try:
            if other != last:
                steps[other] = _step(other)
        except CheckpointError as error:
            log.warning("%s", error)
    if not steps:
        raise UsageError(f"{last} is damaged, and no other checkpoint is whole: remove {last.parent} to start anew")
    newest = max(steps, key=steps.__getitem__)
    log.warning("going on from %s, of step %d", newest, steps[newest])
    return newest


def _step(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint is of.

    Raises:
        CheckpointError: it is damaged.
    """
    step = read_checkpoint(checkpoint).get("global_step")
    verify_checksums(checkpoint, weights=True)
    if not isinstance(step, int):
        raise CheckpointError(f"{checkpoint} does not say of which step it is")
    return step


def require_resumable(
    checkpoint: Path, config: Mapping[str, Any], completed: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Refuse to go on from a checkpoint with another config than the one in the folder of its run.

    Args:
        checkpoint: RUN/checkpoints/NAME.ckpt. Without RUN/config.yaml there is nothing to compare.
        config: the resolved config.
        completed: gives a config the default of each key that it lacks. The one of an older run lacks those that are
            younger: what they say was not a choice then.

    Raises:
        UsageError: a key that may not change has, or is not known any more; names what changed.
    """
    file = checkpoint.parent.parent / CONFIG_FILE
    if not file.is_file():
        return
    try:
        then = yaml.safe_load(file.read_text())
        trainer = then["trainer"]
        listed = trainer.get("callbacks") or []
        listed = listed if isinstance(listed, list) else [listed]
        trainer["callbacks"] = [c for c in listed if c["class_path"] in _CALLBACKS_THAT_TRAIN]
        trainer.pop("logger", None)  # which only watches, like the other callbacks: its class may be gone
        before, now = _that_train(completed(then)), _that_train(config)
    except (UsageError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"cannot go on from {checkpoint}: {file} is of another version of this project, or damaged ({error}); "
            "go on with that version, or start a new run in another folder"
        ) from error
    changed = [k for k in sorted({*before, *now}) if before.get(k, "not set") != now.get(k, "not set")]
    if changed:
        shown = "; ".join(f"{k}: {before.get(k, 'not set')} -> {now.get(k, 'not set')}" for k in changed)
        raise UsageError(
            f"cannot go on from {checkpoint} with another config ({shown}): resume with the run's own, {file}, "
            "or start a new run in another folder, from its weights if the model has init_from"
        )


def _that_train(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, those that may change left out."""
    flat = flatten(dict(config))
    for callback in flat.pop("trainer.callbacks", None) or []:
        if callback["class_path"] in _CALLBACKS_THAT_TRAIN:
            flat |= flatten(callback.get("init_args") or {}, "trainer.callbacks.")
    return {k: v for k, v in flat.items() if not matches(k, MAY_CHANGE)}


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted key is one of `patterns`, in which * stands for anything."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
