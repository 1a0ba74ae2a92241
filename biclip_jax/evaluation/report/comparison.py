"""Comparison of several methods: mean and standard deviation over seeds, as table rows.

Scores are in [0, 1], tables in percent. A row is what `biclip ablate` writes for one method and one
label fraction.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from biclip_jax.evaluation.report import tables

METRICS = ("dice_global", "dice_mean", "iou_global", "iou_mean")
COLUMNS = ("labels", "variant", "image_encoder", *METRICS, "empty_text", "corrupted", "seeds")


def over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Returns {metric: {"mean", "sd"}} over seeds; sd is None for a single seed."""
    columns = {name: [score[name] for score in scores] for name in METRICS}
    return {
        name: {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in columns.items()
    }


def summarize_evaluations(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Averages the --evaluate results of the runs of a row over the seeds."""
    conditions = [result["conditions"] for result in results]
    summary: dict[str, Any] = {
        "num_images": results[0]["num_images"],
        "conditions": {name: over_seeds([c[name] for c in conditions]) for name in conditions[0]},
    }
    scores = [result["corruptions"] for result in results if "corruptions" in result]
    if scores:
        mean = over_seeds([s["mean"] for s in scores])
        cells = {name: rows for name, rows in scores[0].items() if name != "mean"}
        summary["corruptions"] = {
            name: {level: over_seeds([s[name][level] for s in scores]) for level in rows}
            for name, rows in cells.items()
        } | {"mean": mean}
    if "flip_consistency" in results[0]:
        summary["flip_consistency"] = over_seeds([result["flip_consistency"] for result in results])
    return summary


def image_encoder(model: dict[str, Any]) -> str:
    """Returns the name of the image encoder that refines the text, from a resolved `config.model`.

    MedCLIPSeg models return the name of their encoder pair; "-" if the image does not refine the
    text.
    """
    if "image" not in model:
        return model["variant"]
    return model["image"]["encoder"] if model["bmf"]["vision_to_text"] else "-"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows as a plain table, in percent."""
    return tables.format_table([_cells(row) for row in rows], COLUMNS)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows as a Markdown table that links every seed to its run."""
    head = f"| {' | '.join(COLUMNS)} | runs |\n|{'---|' * (len(COLUMNS) + 1)}\n"
    lines = []
    for row in rows:
        cells = _cells(row)
        runs = " ".join(f"[{seed}]({result['run']})" for seed, result in row["seeds"].items())
        lines.append(f"| {' | '.join(cells[name] for name in COLUMNS)} | {runs} |\n")
    note = (
        "\nPercent; mean and standard deviation over the seeds. empty_text is dice_global; "
        "corrupted is the mean dice_global over the corruptions given to --evaluate.\n"
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
