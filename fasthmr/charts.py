"""Pictures of an evaluation: errors of joints, a sequence over time, accuracy against throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curves:
    """What systems do over the T frames of a sequence; NaN where there is no number.

    Attributes:
        key: the clip's.
        fps: frames a second.
        error_mm: by system, (T,) MPJPE of each frame.
        acceleration: by system, (T,) mean length of the joints' acceleration, m/s^2.
        true_acceleration: the same of the ground truth.
    """

    key: str
    fps: float
    error_mm: dict[str, list[float]]
    acceleration: dict[str, list[float]]
    true_acceleration: list[float]


def draw_joint_errors(systems: Sequence[Mapping[str, Any]], joints: Sequence[str]) -> Figure:
    """Mean distance of each joint, a bar for each system.

    Args:
        systems: as under "systems" in results.json.
        joints: their names, in the order of "joints_mm".
    """
    figure, axes = _figure(max(8.0, 0.25 * len(joints) * (1 + len(systems) / 3)))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        place = np.arange(len(joints)) + (number - (len(systems) - 1) / 2) * width
        axes.bar(place, system["joints_mm"], width, label=system["name"], color=f"C{number}")
    axes.set_xticks(range(len(joints)), [joint.replace("_", " ") for joint in joints], rotation=60, ha="right")
    axes.set(ylabel="mean error, mm", title="error of each joint, root removed")
    return _finished(figure, axes)


def draw_error_over_time(curves: Curves) -> Figure:
    """MPJPE of each frame of a sequence, a line for each system."""
    figure, axes = _figure()
    for number, (name, values) in enumerate(curves.error_mm.items()):
        axes.plot(_seconds(curves, values), values, label=name, color=f"C{number}", linewidth=1.2)
    axes.set(xlabel="s", ylabel="MPJPE, mm", title=f"error of each frame of {curves.key}")
    return _finished(figure, axes)


def draw_acceleration_over_time(curves: Curves) -> Figure:
    """Mean acceleration of the joints in each frame of a sequence, of every system and of the ground truth."""
    figure, axes = _figure()
    for number, (name, values) in enumerate(curves.acceleration.items()):
        axes.plot(_seconds(curves, values), values, label=name, color=f"C{number}", linewidth=1.2)
    truth = curves.true_acceleration
    axes.plot(_seconds(curves, truth), truth, label="ground truth", color="black", linewidth=1.5)
    # A jittering system may be a hundred times as restless as the truth; zero has no place on such a scale.
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set(xlabel="s", ylabel="mean acceleration of joints, m/s²", title=f"jitter in {curves.key}")
    return _finished(figure, axes)


def draw_accuracy_and_speed(systems: Sequence[Mapping[str, Any]]) -> Figure:
    """MPJPE with its confidence interval against frames/s (FastHMR, Fig. 1): better is further down and to the right.

    Args:
        systems: as under "systems" in results.json, with speeds.
    """
    figure, axes = _figure(7.0)
    for number, system in enumerate(systems):
        error, speed, color = system["errors"]["mpjpe_mm"], system["frames_per_s"], f"C{number}"
        if error["low"] is not None and np.isfinite(error["low"]):
            axes.plot([speed, speed], [error["low"], error["high"]], color=color, linewidth=1)
        axes.plot(speed, error["value"], "o", color=color, label=system["name"])
    axes.set(xlabel="frames/s", ylabel="MPJPE, mm", title="accuracy against throughput", xlim=(0, None))
    return _finished(figure, axes)


def _figure(width: float = 10.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finished(figure: Figure, axes: Axes) -> Figure:
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _seconds(curves: Curves, values: Sequence[float]) -> np.ndarray:
    return np.arange(len(values)) / curves.fps
