"""The reliability diagram."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from biclip_jax.evaluation.calibration import ECE_BINS
from biclip_jax.evaluation.reporting import written_whole

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
