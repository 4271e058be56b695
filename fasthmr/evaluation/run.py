"""A whole evaluation: systems are loaded, measured and timed; what was found is compared and written to a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthmr.comparison import SequenceErrors, compare
from fasthmr.data.shards import ClipStore
from fasthmr.evaluation.bodies import load_bodies
from fasthmr.evaluation.clips import EvaluatedClips
from fasthmr.evaluation.config import EvaluationConfig
from fasthmr.evaluation.measuring import measure
from fasthmr.evaluation.speed import system_cost, system_speeds
from fasthmr.evaluation.systems import SystemConfig, load_systems
from fasthmr.evaluation.writing import write_files
from fasthmr.metrics import PROTOCOLS
from fasthmr.metrics.regressor_file import find_regressor, read_regressor
from fasthmr.pipeline import PipelineConfig
from fasthmr.precision import chosen_precision
from fasthmr.ranks import chosen_device, from_first_rank, join
from fasthmr.sequence import SequenceConfig


def evaluate(
    systems: Mapping[str, SystemConfig], data: str, config: EvaluationConfig, out: str | Path
) -> dict[str, Any]:
    """Evaluate systems and write what was found to a folder.

    Of several processes all compute, all return the results, and the first one writes.

    Args:
        systems: by name; the others are compared with the first.
        data: folder of a finished set of shards with pose labels.
        config: how.
        out: folder to write to; docs/evaluate.md lists the files. Others in it stay as they are.

    Returns:
        What is in results.json.

    Raises:
        ValueError: bad input; nothing was written.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"results are written to a folder, and {out} is a file: choose another name")
    device = chosen_device(config.device)
    config = dataclasses.replace(config, precision=chosen_precision(config.precision, device))
    bodies = load_bodies(config)
    body = bodies["neutral"]
    regressor, regressor_file = _regressor(config, body.num_vertices)
    store = ClipStore(data)
    store.require_body(body.id)
    clips = EvaluatedClips(store, config, bodies)
    for option in ("show", "video"):
        clips.find(option, getattr(config, option))  # refuses before anything is computed
    settings = PipelineConfig(
        precision=config.precision, mask_people=config.mask_people, sequence=SequenceConfig(steps=config.steps)
    )
    rank, world_size = join(device)
    bodies = {gender: one.to(device) for gender, one in bodies.items()}
    loaded = load_systems(systems, body, settings, device)
    measured = measure(loaded, clips, bodies, config, regressor, rank, world_size)
    speeds = from_first_rank(system_speeds(loaded, config) if config.speed and rank == 0 else None)
    errors = {name: [one.errors[name] for one in measured] for name in loaded}
    compared = compare(errors, config.bootstrap, config.seed)
    results = {
        "protocol": {"name": config.protocol, "description": PROTOCOLS[config.protocol].describe()},
        "regressor": regressor_file,
        "data": _described(clips, errors),
        "body": body.id,
        "truth": {
            gender: {"body": bodies[gender].id, "clips": count} for gender, count in clips.clips_by_gender().items()
        },
        "boxes": {
            "source": config.boxes,
            "sha256": None if clips.detections is None else clips.detections.sha256,
            "missing": clips.without_box,
            "fitted": clips.fitted_boxes,
        },
        "intrinsics": {"source": config.intrinsics, "sha256": clips.lenses and clips.lenses.sha256},
        "config": dict(vars(config)),
        "machine": _machine(device),
        "processes": world_size,
        "systems": [
            {
                "name": name,
                "checkpoint": str(system.config),
                "encoder": system.encoder,
                "decoder": system.decoder,
                "cost": system_cost(system, config.steps),
                "frames_per_s": None if speeds is None else speeds[name]["frames_per_s"],
                "speed": None if speeds is None else speeds[name],
                **compared[name],
            }
            for name, system in loaded.items()
        ],
    }
    results = _without_nan(results)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_files(out, results, errors, measured, clips, bodies)
    return results


def _regressor(config: EvaluationConfig, num_vertices: int) -> tuple[Tensor | None, str | None]:
    """The matrix of the protocol and the file that it is from, given or found; None for both where it has none."""
    protocol, file = PROTOCOLS[config.protocol], config.regressor
    if file is None and protocol.regressor is not None:
        found = find_regressor(protocol.regressor, config.body)
        file = None if found is None else str(found)
    matrix = None if file is None else read_regressor(file)
    if matrix is not None or protocol.regressor is not None:
        protocol.require_regressor(matrix, num_vertices)
    return matrix, file


def _described(clips: EvaluatedClips, errors: Mapping[str, Sequence[SequenceErrors]]) -> dict[str, Any]:
    manifest = vars(clips.store.manifest)
    shards = json.dumps(manifest["shards"], sort_keys=True)
    some = next(iter(errors.values()))
    return {
        "folder": str(clips.store.folder),
        "id": hashlib.sha256(shards.encode()).hexdigest()[:16],
        "sequences": len(clips),
        "frames": sum(one.frames for one in some),
        "labelled": sum(one.labelled for one in some),
        "manifest": manifest,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (cpus := Path("/proc/cpuinfo")).exists():
        models = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    threads, cores = torch.get_num_threads(), os.cpu_count()
    return {"device": device.type, "name": name, "cores": cores, "threads": threads, "torch": torch.__version__}


def _without_nan(value: Any) -> Any:
    """The same with None for what is no number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
