"""What reports show: pictures, drawn with matplotlib, and numbers for people."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fasthmr.files import written_whole
from fasthmr.merging import LayerMergePlan


def draw_merge_report(report: dict[str, Any], file: Path) -> None:
    """Draw what `fasthmr.merge` found: the search, the plan, similarity of layers (FastHMR, Fig. 2), and the cost.

    Args:
        report: as `fasthmr.merge.merge` returns it.
        file: PNG to write, whole or not at all.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([["search", "commits", "similarity"], ["plan", "plan", "cost"]])
    _draw_search(panels["search"], report)
    _draw_commits(panels["commits"], report["commits"])
    _draw_similarity(panels["similarity"], np.array(report["cka"]))
    draw_plan(panels["plan"], LayerMergePlan.from_dict(report["plan"]))
    _draw_cost(panels["cost"], report)
    save_figure(figure, file)


def readable(value: float) -> str:
    """A number with two decimals, and more where it is so small that these would be fewer than three digits: 670.21,
    7.83, 0.0123."""
    decimals = 2 if value == 0 else max(2, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def short_names(paths: Sequence[str]) -> list[str]:
    """A name for each path, all different: its last parts, as few as tell it from the others."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def cost_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What `fasthmr.merge` compares: rows of a name, the value before and the value after."""
    before, after, speed = report["cost"]["before"], report["cost"]["after"], report["frames_per_s"]
    rows = [
        ("MPJPE, mm", f"{report['base_mpjpe_mm']:.2f}", f"{report['final_mpjpe_mm']:.2f}"),
        ("layers", str(before["layers"]), str(after["layers"])),
        ("tokens", str(before["tokens"]), str(after["tokens"])),
    ]
    for name, key, unit in (
        ("parameters, M", "params", 1e6),
        ("multiply-adds, G (thop)", "macs_thop", 1e9),
        ("multiply-adds, G (all)", "macs_all", 1e9),
    ):
        rows.append((name, readable(before[key] / unit), readable(after[key] / unit)))
    rows.append(
        (f"frames/s ({speed['device']}, batch {speed['batch']})", f"{speed['before']:.1f}", f"{speed['after']:.1f}")
    )
    return rows


def draw_plan(axes: Axes, plan: LayerMergePlan) -> None:
    """Draw original layers as boxes, and those that became one in one colour under a common bar."""
    start = 0
    for number, size in enumerate(plan.group_sizes):
        color = f"C{number % 10}" if size > 1 else "0.75"
        for layer in range(start, start + size):
            axes.add_patch(_box(layer, 1, color))
            axes.text(layer + 0.5, 1.45, str(layer), ha="center", va="center", fontsize=8)
        axes.add_patch(_box(start, 0, color, size))
        if size > 1:
            axes.text(start + size / 2, 0.45, f"{size} in one", ha="center", va="center", fontsize=8)
        start += size
    axes.set(xlim=(0, plan.depth), ylim=(-0.1, 2), yticks=[0.45, 1.45], yticklabels=["merged", "original"], xticks=[])
    axes.set_title(f"{plan.depth} layers -> {len(plan.layers)}")
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with written_whole(file) as out:
        out.write(buffer.getvalue())


def figure_pixels(figure: Figure) -> np.ndarray:
    """The figure as (H, W, 3) uint8 RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _box(x: float, y: float, color: str, width: float = 1.0) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x + 0.1, y), width - 0.2, 0.9, boxstyle="round,pad=0,rounding_size=0.1", color=color)


def _draw_search(axes: Axes, report: dict[str, Any]) -> None:
    steps = report["steps"]
    base, tau = report["base_mpjpe_mm"], report["tau_mm"]
    values = [step["mpjpe_mm"] for step in steps]
    colors = ["C2" if step["accepted"] else "C3" for step in steps]
    axes.scatter(range(len(steps)), values, c=colors if tau is not None else "C0", zorder=3)
    axes.plot(values, color="0.7", zorder=2)
    axes.axhline(base, color="0.3", linewidth=1)
    if tau is not None:
        axes.axhline(base + tau, color="0.3", linewidth=1, linestyle="--")
        axes.set_title(f"search, tau = {tau:g} mm (green: accepted)")
    else:
        axes.set_title("the given plan, event after event")
    axes.set(xlabel="plan tried", ylabel=f"MPJPE, mm ({report['protocol']})")
    axes.grid(alpha=0.3)


def _draw_commits(axes: Axes, commits: list[dict[str, Any]]) -> None:
    """An arrow from the error before each commit to that after it, the first commit on top."""
    axes.set_title("error before and after each commit" if commits else "nothing was merged")
    if not commits:
        axes.axis("off")
        return
    for row, commit in enumerate(commits):
        before, after = commit["before_mm"], commit["after_mm"]
        axes.annotate("", (after, row), (before, row), arrowprops={"arrowstyle": "->", "color": "C0", "linewidth": 2})
        axes.plot([before, after], [row, row], "o", color="C0", markersize=3)
        axes.annotate(
            f"{before:.2f} -> {after:.2f}", ((before + after) / 2, row), (0, 6), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
    names = [f"{commit['keep']} to {commit['drop'][-1]}" for commit in commits]
    axes.set(ylim=(len(commits) - 0.3, -0.7), yticks=range(len(commits)), yticklabels=names)
    axes.set(ylabel="layers", xlabel="MPJPE, mm")
    axes.margins(x=0.25)
    axes.grid(alpha=0.3, axis="x")


def _draw_similarity(axes: Axes, cka: np.ndarray) -> None:
    image = axes.imshow(cka, vmin=float(cka.min()), vmax=1, cmap="viridis", origin="lower")
    axes.set_title("similarity of layers (linear CKA of token features)")
    axes.set(xlabel="layer", ylabel="layer")
    axes.figure.colorbar(image, ax=axes, label=f"linear CKA, debiased: {cka.min():.3f} (least similar) to 1")


def _draw_cost(axes: Axes, report: dict[str, Any]) -> None:
    axes.axis("off")
    table = axes.table(
        [list(row) for row in cost_rows(report)], colLabels=["", "before", "after"], loc="center", cellLoc="right"
    )
    table.auto_set_column_width([0, 1, 2])
    table.scale(1, 1.5)
