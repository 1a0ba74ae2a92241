"""Runs of several methods side by side: means and spreads over seeds, as rows of a table.

A score lies in [0, 1]; tables are in percent. A row is what `biclip_jax.ablate` writes for a method
and a share of the labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from biclip_jax.evaluation.report import tables

METRICS = ("dice_global", "dice_mean", "iou_global", "iou_mean")
COLUMNS = ("labels", "variant", "image_encoder", *METRICS, "empty_text", "corrupted", "seeds")


def over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """{metric: {"mean", "sd"}} of one score a seed."""
    columns = {name: [score[name] for score in scores] for name in METRICS}
    return {
        name: {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in columns.items()
    }


def summarize_evaluations(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What --evaluate found of a row's runs: conditions and degradations, over the seeds."""
    conditions = [result["conditions"] for result in found]
    asked: dict[str, Any] = {
        "num_images": found[0]["num_images"],
        "conditions": {name: over_seeds([c[name] for c in conditions]) for name in conditions[0]},
    }
    scores = [result["corruptions"] for result in found if "corruptions" in result]
    if scores:
        mean = over_seeds([s["mean"] for s in scores])
        cells = {name: rows for name, rows in scores[0].items() if name != "mean"}
        asked["corruptions"] = {
            name: {level: over_seeds([s[name][level] for s in scores]) for level in rows}
            for name, rows in cells.items()
        } | {"mean": mean}
    if "flip_consistency" in found[0]:
        asked["flip_consistency"] = over_seeds([result["flip_consistency"] for result in found])
    return asked


def image_encoder(model: dict[str, Any]) -> str:
    """Of a resolved configuration's `model`: what sees the picture for the sentence's sake.

    MedCLIPSeg's is its pair of towers; "-" where no picture refines a sentence.
    """
    if "image" not in model:
        return model["variant"]
    return model["image"]["encoder"] if model["bmf"]["vision_to_text"] else "-"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The console's table, in percent."""
    return tables.format_table([_cells(row) for row in rows], COLUMNS)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table with every seed linked to its run."""
    head = f"| {' | '.join(COLUMNS)} | runs |\n|{'---|' * (len(COLUMNS) + 1)}\n"
    lines = []
    for row in rows:
        cells = _cells(row)
        runs = " ".join(f"[{seed}]({found['run']})" for seed, found in row["seeds"].items())
        lines.append(f"| {' | '.join(cells[name] for name in COLUMNS)} | {runs} |\n")
    note = (
        "\nPercent; mean and standard deviation over the seeds; missing_text is dice_global, "
        "degraded the mean of dice_global over what --evaluate asked for.\n"
    )
    return head + "".join(lines) + note


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def percent(value: dict[str, Any]) -> str:
        spread = "" if value["sd"] is None else f" ± {100 * value['sd']:.2f}"
        return f"{100 * value['mean']:.2f}{spread}"

    corrupted = row.get("evaluation", {}).get("corruptions")
    return {
        "labels": f"{100 * row['label_fraction']:g} % ({row['num_labelled']})",
        "variant": row["variant"],
        "image_encoder": row["image_encoder"],
        **{name: percent(row[name]) for name in METRICS},
        "empty_text": percent(row["empty_text"]["dice_global"]),
        "corrupted": percent(corrupted["mean"]["dice_global"]) if corrupted else "-",
        "seeds": str(len(row["seeds"])),
    }
