"""What an evaluation writes: the table for people, and the files of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasthmr.body import BodyModel
from fasthmr.charts import (
    draw_acceleration_over_time,
    draw_accuracy_and_speed,
    draw_error_over_time,
    draw_joint_errors,
)
from fasthmr.comparison import TRUE_JITTER, SequenceErrors, sequences_csv, tables
from fasthmr.conventions import JOINTS24
from fasthmr.data.schema import Gender
from fasthmr.evaluation.clips import EvaluatedClips
from fasthmr.evaluation.config import DIAGONAL, TRUTH
from fasthmr.evaluation.measuring import Measured
from fasthmr.files import write_text
from fasthmr.metrics import PROTOCOLS
from fasthmr.precision import IN_WORDS
from fasthmr.report import readable, save_figure
from fasthmr.side_by_side import write_side_by_side

TABLE, RESULTS, SEQUENCES, VIDEO = "table.md", "results.json", "sequences.csv", "side_by_side.mp4"

_UNKNOWN_SETS = "not recorded in the checkpoints, so 3DPW's training split may be among them (--trained_on names them)"


def describe(results: Mapping[str, Any]) -> str:
    """table.md: protocol and data on top, the tables, and what their numbers are."""
    config, data, machine, systems = (results[key] for key in ("config", "data", "machine", "systems"))
    which = "all frames" if config["frames_per_clip"] is None else f"up to {config['frames_per_clip']} from the middle"
    truth = ", ".join(f"{one['body']} ({_counted(one['clips'], 'clip')})" for one in results["truth"].values())
    lines = [
        f"Protocol {results['protocol']['description']}.",
        f"Data: {data['folder']} ({data['id']}), {data['sequences']} of {data['manifest']['clips']} clips, {which}: "
        f"{data['frames']} frames, {data['labelled']} of them with labels.",
        f"Bodies: predictions {results['body']}; ground truth {truth}.",
        f"Boxes: {_boxes(results['boxes'])}. Flip test: none.",
        f"Focal lengths, which CameraHMR is told: {_lenses(results['intrinsics'])}.",
        f"Training sets: {config['trained_on'] or _UNKNOWN_SETS}.",
        f"Encoders in {IN_WORDS[config['precision']]} on {machine['device']} ({machine['name']}), decoders in "
        f"{_counted(config['steps'], 'step')} of float32; {_counted(results['processes'], 'process', 'processes')}.",
    ]
    if results["regressor"] is not None:
        lines.insert(1, f"Regressor: {results['regressor']}.")
    notes = [
        f"Intervals: {config['bootstrap']} draws of sequences with replacement (seed {config['seed']}), each pooled "
        "over frames; of differences with the same draws for both. `-`: there is no such number."
    ]
    jitter = systems[0]["errors"].get(TRUE_JITTER)
    if jitter is not None and jitter["value"] is not None:
        mean = f"{jitter['value']:.2f} m/s²"
        notes.append(f"Jitter: mean acceleration of the joints, root removed; that of the ground truth is {mean}.")
    notes.append("Parameters, and multiply-adds a frame, as `thop` counts them (FastHMR, Tab. 12): none for attention.")
    for system in systems:
        if "window" in (cost := system["cost"]):
            notes.append(
                f"{system['name']}: {readable(cost['decoder_macs_thop'] / 1e9)} G are its decoder's for a window of "
                f"{cost['window']} frames, which takes it {cost['stride']} frames further."
            )
    if systems[0]["speed"] is not None:
        notes.append(
            f"Frames/s: encoder in batches of {config['batch']} and decoder, without reading pictures; medians of "
            f"{config['rounds']} rounds in which all were measured in turn, {_counted(machine['threads'], 'thread')}."
        )
    return "\n".join([*lines, "", tables(systems), *(f"- {note}" for note in notes), ""])


def write_files(
    out: Path,
    results: Mapping[str, Any],
    errors: Mapping[str, Sequence[SequenceErrors]],
    measured: Sequence[Measured],
    clips: EvaluatedClips,
    bodies: Mapping[Gender, BodyModel],
) -> None:
    """Every file whole; of those that an earlier evaluation wrote here, none stays beside this one's.

    Args:
        out: the folder.
        results: what is in results.json.
        errors: of every system.
        measured: of every clip.
        clips: those.
        bodies: of the systems ("neutral"), and of every clip's labels.
    """
    systems = results["systems"]
    (curves,) = (one.curves for one in measured if one.curves is not None)
    protocol = PROTOCOLS[results["protocol"]["name"]]
    joints = [JOINTS24[i] if protocol.regressor is None else f"joint {i}" for i in protocol.subset]
    figures = {
        "joints.png": draw_joint_errors(systems, joints),
        "error_over_time.png": draw_error_over_time(curves),
        "jitter_over_time.png": draw_acceleration_over_time(curves),
        "accuracy_and_speed.png": draw_accuracy_and_speed(systems) if systems[0]["speed"] is not None else None,
    }
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, out / name)
        else:
            (out / name).unlink(missing_ok=True)
    (out / VIDEO).unlink(missing_ok=True)
    for number, one in enumerate(measured):
        if one.motions is not None:
            clip = clips.clip(number)
            write_side_by_side(out / VIDEO, clip, one.motions, bodies["neutral"], bodies[clip.gender])
    write_text(out / SEQUENCES, sequences_csv(errors))
    write_text(out / TABLE, describe(results))
    write_text(out / RESULTS, json.dumps(results, indent=1))


def _boxes(boxes: Mapping[str, Any]) -> str:
    """Where the network looked, in words."""
    if boxes["sha256"] is None:
        return "ground truth, as stored with the clips"
    return (
        f"detections of {boxes['source']} (sha256 {boxes['sha256'][:16]}); {_counted(boxes['missing'], 'frame')} had "
        f"none and took one between their neighbours', {boxes['fitted']} were moved or shrunk into the stored crop"
    )


def _lenses(intrinsics: Mapping[str, Any]) -> str:
    """Where focal lengths are from, in words."""
    source, sha256 = intrinsics["source"], intrinsics["sha256"]
    named = {TRUTH: "ground truth, as stored with the clips", DIAGONAL: "the images' diagonals"}
    return f"of {source} (sha256 {sha256[:16]})" if sha256 else named[source]


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
