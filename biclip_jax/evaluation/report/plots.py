"""Plots: reliability diagram, uncertainty maps, training curves, corruption curves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biclip_jax.core import files
from biclip_jax.evaluation.metrics.calibration import ECE_BINS

BEFORE, AFTER = "#0072B2", "#D55E00"  # Okabe and Ito


_EDGES = [i / ECE_BINS for i in range(ECE_BINS + 1)]


def plot_reliability(section: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a reliability diagram with the share of pixels per bin.

    Args:
      section: Result of `calibration.report`.
      path: Path of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.4), dpi=120, layout="constrained")
    curve, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect calibration")
    cases = (
        ("before", BEFORE, "o", "uncalibrated"),
        ("after", AFTER, "s", f"temperature {section['temperature']:.3g}"),
    )
    for name, color, marker, label in cases:
        rows = section[f"reliability_{name}"]
        x = [row["mean_probability"] for row in rows]
        y = [row["observed_frequency"] for row in rows]
        label = f"{label}: ECE {section[name]['ece']:.4f}"
        curve.plot(x, y, color=color, marker=marker, markersize=5, label=label)
        share.stairs(_shares(rows), _EDGES, color=color, linewidth=1.5)
    curve.set(xlim=(0, 1), ylim=(0, 1), ylabel="observed frequency of foreground")
    curve.set_title(f"Reliability, {section['num_pixels']:,} pixels")
    curve.legend(frameon=False, loc="upper left")
    share.set(xlabel="probability of foreground", ylabel="share of pixels", yscale="log")
    for axes in (curve, share):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_write(path) as part:
        figure.savefig(part, format="png")


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns the share of pixels of every bin; `rows` has only the non-empty bins."""
    total = sum(row["count"] for row in rows)
    counts = {round(row["low"] * ECE_BINS): row["count"] for row in rows}
    return [counts.get(i, 0) / total for i in range(ECE_BINS)]


def plot_uncertainty(
    maps: Mapping[str, np.ndarray], path: str | os.PathLike, title: str = ""
) -> None:
    """Writes a PNG of uncertainty maps side by side, with a common scale from 0 to ln 2.

    Args:
      maps: {name: (H, W) in nats}.
      path: Path of the PNG.
      title: Title of the figure.
    """
    from matplotlib.figure import Figure

    height, width = next(iter(maps.values())).shape
    panel = 4.0 * min(width / height, 2.0)
    figure = Figure(figsize=(panel * len(maps) + 1.2, 4.6), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        drawn = axes.imshow(values, cmap="inferno", vmin=0.0, vmax=math.log(2))
        summary = f"mean {values.mean():.2g}, max {values.max():.2g} nats"
        axes.set_title(f"{name}, {summary}", fontsize=10)
        axes.set_axis_off()
    bar = figure.colorbar(drawn, ax=list(panels), fraction=0.04, pad=0.02)
    bar.set_label("nats; 0: certain, ln 2 = 0.693: p = 0.5")
    figure.suptitle(title, fontsize=11)
    with files.atomic_write(path) as part:
        figure.savefig(part, dpi=110, format="png")


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes a PNG of two panels: training losses, and validation Dice with its best step.

    Args:
      metrics: Lines of metrics.jsonl with "step", "split" ("train" or "val") and numbers: every
        "loss..." of train is drawn, and "dice_global" and "dice_mean" of val. The later line wins
        if a resumed run wrote a step twice. Missing and non-finite values are omitted.
      path: Path of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    _plot_losses(losses, [line for line in metrics if line.get("split") == "train"])
    _plot_scores(scores, [line for line in metrics if line.get("split") == "val"])
    _finish_panel(losses, "Training", "loss", legend_columns=3)
    _finish_panel(scores, "Validation", "Dice", legend_columns=1)
    with files.atomic_write(path) as part:
        figure.savefig(part, format="png")


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = {line["step"]: line[name] for line in lines if line.get(name) is not None}
    finite = sorted((step, value) for step, value in points.items() if math.isfinite(value))
    return [step for step, _ in finite], [value for _, value in finite]


def _plot_losses(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    drawn: list[float] = []
    for name in dict.fromkeys(key for line in lines for key in line if key.startswith("loss")):
        steps, values = _series(lines, name)
        style = {"color": "black", "zorder": 3} if name == "loss" else {"linewidth": 1.2}
        if values:
            axes.plot(steps, values, label=name, marker="." if len(steps) < 20 else "", **style)
        drawn += values
    if drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axes.set_yscale("log")


def _plot_scores(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for name, color in (("dice_global", "#0072B2"), ("dice_mean", "#D55E00")):
        steps, values = _series(lines, name)
        if not values:
            continue
        best = int(np.argmax(values))
        label = f"{name}: best {values[best]:.4f} at step {steps[best]}"
        axes.plot(steps, values, marker=".", color=color, label=label)
        axes.plot(steps[best], values[best], marker="*", markersize=14, color=color)


def _finish_panel(axes: Any, title: str, label: str, legend_columns: int) -> None:
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
        return
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend(**below, ncols=legend_columns, frameon=False, fontsize=9)


def plot_corruptions(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    clean: Mapping[str, float],
    path: str | os.PathLike,
) -> None:
    """Writes a PNG of global and mean Dice over the severities, one line per corruption.

    Args:
      scores: {name: {severity: {"dice_global", "dice_mean"}}}.
      clean: The same two scores on the original images, drawn at severity 0.
      path: Path of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), dpi=120, layout="constrained")
    kinds = ("dice_global", "dice_mean")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), kinds, strict=True):
        for name, rows in scores.items():
            severities = sorted(int(severity) for severity in rows)
            values = [rows[str(severity)][kind] for severity in severities]
            axes.plot([0, *severities], [clean[kind], *values], marker="o", label=name)
        axes.set_xlabel("severity (0: original)")
        axes.set_ylabel("Dice")
        axes.set_xticks(range(6))
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.set_title({"dice_global": "Global Dice", "dice_mean": "Mean Dice"}[kind])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    with files.atomic_write(path) as part:
        figure.savefig(part, format="png")
