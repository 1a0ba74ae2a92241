"""The reliability diagram, and maps of uncertainty."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biclip_jax.evaluation.calibration import ECE_BINS
from biclip_jax.places import written_whole

BEFORE, AFTER = "#0072B2", "#D55E00"  # Okabe and Ito's


_EDGES = [i / ECE_BINS for i in range(ECE_BINS + 1)]


def plot_reliability(section: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a PNG: observed frequency over probability, and the share of pixels in each bin.

    Args:
      section: what `calibration.report` gave.
      path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.4), dpi=120, layout="constrained")
    curve, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="what it should be")
    cases = (
        ("before", BEFORE, "o", "as the model says"),
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
    with written_whole(path) as part:
        figure.savefig(part, format="png")


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of every bin; rows leave out the empty ones."""
    total = sum(row["count"] for row in rows)
    counts = {round(row["low"] * ECE_BINS): row["count"] for row in rows}
    return [counts.get(i, 0) / total for i in range(ECE_BINS)]


def plot_uncertainty(
    maps: Mapping[str, np.ndarray], path: str | os.PathLike, title: str = ""
) -> None:
    """Writes a PNG of uncertainty maps side by side, all on one scale from 0 to ln 2.

    Args:
      maps: {name: (H, W) in nats}.
      path: where the PNG goes.
      title: the headline.
    """
    from matplotlib.figure import Figure

    height, width = next(iter(maps.values())).shape
    panel = 4.0 * min(width / height, 2.0)
    figure = Figure(figsize=(panel * len(maps) + 1.2, 4.6), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        drawn = axes.imshow(values, cmap="inferno", vmin=0.0, vmax=math.log(2))
        figures = f"mean {values.mean():.2g}, largest {values.max():.2g} nats"
        axes.set_title(f"{name}, {figures}", fontsize=10)
        axes.set_axis_off()
    bar = figure.colorbar(drawn, ax=list(panels), fraction=0.04, pad=0.02)
    bar.set_label("nats; 0 is sure, ln 2 = 0.693 is even odds")
    figure.suptitle(title, fontsize=11)
    with written_whole(path) as part:
        figure.savefig(part, dpi=110, format="png")
