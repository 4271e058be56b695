"""What may be changed when a run goes on from a checkpoint, and the refusal of everything else."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fasthmr.cli import UsageError, flatten

#: the resolved config, in the folder of its run
CONFIG_FILE = "config.yaml"

#: Keys, or patterns of them, that only watch a run, or say how fast it goes: they change nothing that it ends with.
ONLY_WATCH = (
    "data.init_args.workers", "data.init_args.val_batch_size", "trainer.log_every_n_steps",
    "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.logger", "trainer.logger.*",
)  # fmt: skip

#: Keys, or patterns of them, that may change when a run goes on: they change nothing of what is trained but how far
#: and where. That clips and processes give the same order of training data, and that bodies are the same, is checked
#: where they are opened.
MAY_CHANGE = (
    *ONLY_WATCH, "config", "ckpt_path", "run_dir", "data_dir",
    "model.init_args.body", "data.init_args.body", "data.init_args.train", "data.init_args.val",
    "data.init_args.folder",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.default_root_dir",
    "trainer.max_*", "trainer.min_*", "trainer.check_val_every_n_epoch", "trainer.val_check_interval",
    "trainer.limit_val_batches", "trainer.num_sanity_val_steps",
    "trainer.profiler", "trainer.detect_anomaly", "trainer.callbacks.calibration",
)  # fmt: skip

#: of `trainer.callbacks` these change what is trained; others only watch and save
_CALLBACKS_THAT_TRAIN = ("callbacks.progressive.ProgressiveMerging",)


def require_resumable(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint with another config than the one in the folder of its run.

    Args:
        checkpoint: RUN/checkpoints/NAME.ckpt. Without RUN/config.yaml there is nothing to compare.
        config: the resolved config.

    Raises:
        UsageError: a key that may not change has; names what changed.
    """
    file = checkpoint.parent.parent / CONFIG_FILE
    if not file.is_file():
        return
    before, now = _that_train(yaml.safe_load(file.read_text())), _that_train(config)
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
