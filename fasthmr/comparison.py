"""Errors of several systems on the same sequences: pooled, with bootstrap confidence intervals, as tables.

A sequence keeps sums and counts, and all that is told is computed from those: it makes no difference in which process a
sequence was measured.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasthmr.report import readable

#: what is measured, and how it is headed in tables
HEADINGS = {
    "pa_mpjpe_mm": "PA-MPJPE mm",
    "mpjpe_mm": "MPJPE mm",
    "pve_mm": "PVE mm",
    "accel_m_s2": "Accel m/s²",
    "jitter_m_s2": "jitter m/s²",
}
#: of the ground truth, the same for every system
TRUE_JITTER = "true_jitter_m_s2"
_CONFIDENCE = (2.5, 97.5)


@dataclass(frozen=True)
class SequenceErrors:
    """Errors of one system on one sequence.

    Attributes:
        key: the clip's.
        frames: that the system was shown.
        labelled: of those, that count.
        sums, counts: by metric, of the values that are pooled: frames, or accelerations. A metric that the protocol
            does not have is not there.
        joint_sums_mm: distance of each joint, summed over the frames that count.
    """

    key: str
    frames: int
    labelled: int
    sums: dict[str, float]
    counts: dict[str, float]
    joint_sums_mm: list[float]


@dataclass(frozen=True)
class Estimate:
    """A pooled number and its 95 % confidence interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def as_dict(self) -> dict[str, float]:
        """Plain data."""
        return dict(vars(self))


class Bootstrap:
    """Confidence intervals from drawing as many sequences, with replacement, again and again.

    Sequences, and not frames, are drawn: neighbouring frames err alike. Each draw is pooled over frames as the number
    itself is. All systems see the same draws, so that the interval of a difference leaves out what they have in common.

    Args:
        sequences: how many there are; a number that fewer than two of them have gets no interval.
        draws: how often they are drawn.
        seed: of the draws.

    Raises:
        ValueError: no draw.
    """

    def __init__(self, sequences: int, draws: int = 2000, seed: int = 0) -> None:
        if draws < 1:
            raise ValueError(f"bootstrap must be 1 draw or more, got {draws}")
        rng = np.random.default_rng(seed)
        self._times = rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=draws).astype(np.float64)

    def estimate(self, sequences: Sequence[SequenceErrors], metric: str) -> Estimate:
        """A metric of one system."""
        return _estimate(pooled(sequences, metric), self._drawn(sequences, metric), _having(sequences, metric))

    def difference(self, sequences: Sequence[SequenceErrors], to: Sequence[SequenceErrors], metric: str) -> Estimate:
        """How much more a metric is than another system's, of the same sequences in the same order."""
        drawn = self._drawn(sequences, metric) - self._drawn(to, metric)
        return _estimate(pooled(sequences, metric) - pooled(to, metric), drawn, _having(sequences, metric))

    def _drawn(self, sequences: Sequence[SequenceErrors], metric: str) -> np.ndarray:
        sums, counts = _sums_and_counts(sequences, metric)
        with np.errstate(invalid="ignore"):
            # Not a matrix product: its rounding depends on how many threads there are.
            return (self._times * sums).sum(1) / (self._times * counts).sum(1)


def pooled(sequences: Sequence[SequenceErrors], metric: str) -> float:
    """The mean over all frames (or accelerations) of all sequences; NaN without any."""
    sums, counts = _sums_and_counts(sequences, metric)
    return float(sums.sum() / counts.sum()) if counts.sum() else math.nan


def joint_errors(sequences: Sequence[SequenceErrors]) -> list[float]:
    """Mean distance of each joint, mm."""
    frames = sum(sequence.labelled for sequence in sequences)
    return (np.array([sequence.joint_sums_mm for sequence in sequences]).sum(0) / frames).tolist()


def compare(
    systems: Mapping[str, Sequence[SequenceErrors]], draws: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Errors of every system, and how much they are more than the first one's; for the first that is None.

    Args:
        systems: by name, each of the same sequences in the same order.
        draws, seed: of the bootstrap.

    Returns:
        By system: "errors" and "difference", each by metric an `Estimate` as plain data; "joints_mm", a list.
    """
    first = next(iter(systems.values()))
    bootstrap = Bootstrap(len(first), draws, seed)
    compared = {}
    for name, sequences in systems.items():
        metrics = [metric for metric in (*HEADINGS, TRUE_JITTER) if metric in sequences[0].sums]
        compared[name] = {
            "errors": {metric: bootstrap.estimate(sequences, metric).as_dict() for metric in metrics},
            "difference": None
            if sequences is first
            else {
                metric: bootstrap.difference(sequences, first, metric).as_dict()
                for metric in metrics
                if metric != TRUE_JITTER
            },
            "joints_mm": joint_errors(sequences),
        }
    return compared


# ---- for people ------------------------------------------------------------------------------------------------------


def tables(systems: Sequence[Mapping[str, Any]], parameters: bool = True) -> str:
    """Three tables in Markdown: numbers, their confidence intervals, and differences to the first system.

    Args:
        systems: as under "systems" in results.json (docs/evaluate.md).
        parameters: whether the first table has costs and speeds as well.
    """
    metrics = {metric: heading for metric, heading in HEADINGS.items() if metric in systems[0]["errors"]}
    head, rows = ["system", *metrics.values()], []
    for system in systems:
        rows.append([system["name"], *(_number(system["errors"][m]["value"]) for m in metrics)])
    if parameters:
        head += ["params M", "MACs G", "frames/s", "speed-up"]
        for row, system in zip(rows, systems, strict=True):
            speed, cost = system["frames_per_s"], system["cost"]
            row += [readable(cost["params_thop"] / 1e6), readable(cost["macs_thop"] / 1e9)]
            row += ["-", "-"] if speed is None else [f"{speed:.1f}", f"{speed / systems[0]['frames_per_s']:.2f} x"]
    parts = [_table(head, rows)]
    intervals = [[s["name"], *(_interval(s["errors"][m]) for m in metrics)] for s in systems]
    parts.append("95 % confidence intervals:\n\n" + _table(["system", *metrics.values()], intervals))
    if len(systems) > 1:
        differences = [[s["name"], *(_difference(s["difference"][m]) for m in metrics)] for s in systems[1:]]
        title = f"Difference to {systems[0]['name']}, with its 95 % confidence interval:"
        parts.append(f"{title}\n\n{_table(['system', *metrics.values()], differences)}")
    return "\n".join(parts)


def sequences_csv(systems: Mapping[str, Sequence[SequenceErrors]]) -> str:
    """One row for each system and sequence: its means, and how many frames and accelerations they are of."""
    metrics = (*HEADINGS, TRUE_JITTER)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "sequence", "frames", "labelled", "accelerations", *metrics])
    for name, sequences in systems.items():
        for one in sequences:
            means = [pooled([one], metric) for metric in metrics]
            counts = [one.frames, one.labelled, int(one.counts.get("accel_m_s2", 0))]
            writer.writerow([name, one.key, *counts, *("" if math.isnan(mean) else repr(mean) for mean in means)])
    return out.getvalue()


def _sums_and_counts(sequences: Sequence[SequenceErrors], metric: str) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([sequence.sums.get(metric, 0.0) for sequence in sequences]),
        np.array([sequence.counts.get(metric, 0.0) for sequence in sequences]),
    )


def _having(sequences: Sequence[SequenceErrors], metric: str) -> int:
    return sum(sequence.counts.get(metric, 0) > 0 for sequence in sequences)


def _estimate(value: float, drawn: np.ndarray, sequences: int) -> Estimate:
    if sequences < 2:
        return Estimate(value)
    low, high = np.nanpercentile(drawn, _CONFIDENCE)  # a draw of sequences that all lack the metric says nothing
    return Estimate(value, float(low), float(high))


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.2f}"


def _interval(estimate: Mapping[str, float | None], sign: str = "") -> str:
    low, high = (_number(estimate[end], sign) for end in ("low", "high"))
    return "-" if low == "-" else f"[{low}, {high}]"


def _difference(estimate: Mapping[str, float | None]) -> str:
    return f"{_number(estimate['value'], '+')} {_interval(estimate, '+')}".removesuffix(" -")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text, too."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |\n"

    rule = "|" + "|".join("-" * (w + 2) if not i else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|\n"
    return line(lines[0]) + rule + "".join(map(line, lines[1:]))
