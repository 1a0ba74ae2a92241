"""Merges new results into an existing results.json of the same model on the same images.

One call of `biclip evaluate` computes some sections of results.json; the others stay valid.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biclip_jax.core.errors import UserError
from biclip_jax.evaluation.report import tables
from biclip_jax.evaluation.robustness import corruptions

# Two evaluations with equal values here are of one model on one list of images.
IDENTITY = (
    "split",
    "subset",
    "data",
    "best_step",
    "model_sha256",
    "ensemble_with",
    "num_images",
    "images_sha256",
    "num_samples",
)
SECTIONS = (
    "baselines",
    "members",
    "ensemble_uncertainty",
    "flip_consistency",
    "tta",
    "calibration",
    "corruptions",
    "surface_metrics",
    "sampling",
)
# Prefixes of the score columns of per_image.csv.
COLUMNS = ("dice_", "iou_", "dsc", "nsd_")
SEVERITIES = tuple(map(str, corruptions.SEVERITIES))
SCORES = ("dice_global", "dice_mean", "iou_global", "iou_mean", "num_images")


def digest(prompt_records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the SHA-256 of ids and prompts, in order; see `text_conditions.prompt_fields`."""
    return hashlib.sha256(json.dumps(prompt_records, default=str).encode()).hexdigest()


def read(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads results.json if its `IDENTITY` is the same; otherwise, or if damaged, returns {}.

    Args:
      folder: Folder of the evaluation.
      facts: Values for all names of `IDENTITY`.
    """
    results = _read_results(folder)
    return results if all(results.get(name) == facts[name] for name in IDENTITY) else {}


def check_same_images(folder: Path, facts: Mapping[str, Any]) -> None:
    """Prevents overwriting the results of another dataset whose folder has the same name.

    Raises:
      UserError: The folder holds an evaluation of other images or prompts.
    """
    if _read_results(folder).get("images_sha256", facts["images_sha256"]) != facts["images_sha256"]:
        raise UserError(
            f"{folder}: found an evaluation of other images or prompts, from a dataset folder of "
            "the same name; give another --output, or delete the folder"
        )


def _read_results(folder: Path) -> dict[str, Any]:
    """Reads results.json; {} if there is none or it is damaged."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return results if isinstance(results, dict) else {}


def merge_results(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the sections and conditions of `before` that `now` does not have.

    Args:
      before: Existing results, see `read`.
      now: New results, with "conditions", "unavailable" and "command".
    """
    kept = {name: before[name] for name in SECTIONS if isinstance(before.get(name), Mapping)}
    kept |= {"baselines": _cells(kept["baselines"])} if "baselines" in kept else {}
    commands = [*_names(before.get("previous_commands")), *_names([before.get("command")])]
    return {
        **kept,
        **now,
        "conditions": {**_cells(before.get("conditions")), **now["conditions"]},
        "unavailable": list(
            dict.fromkeys([*_names(before.get("unavailable")), *now["unavailable"]])
        ),
        "previous_commands": [c for c in dict.fromkeys(commands) if c != now.get("command")],
    }


def merge_columns(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds the score columns of an existing per_image.csv that `rows` do not have.

    Args:
      path: per_image.csv of a previous evaluation; may be missing.
      rows: At least one row; see `runner.per_image_rows`.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines, names = list(reader), reader.fieldnames or []
    except (OSError, ValueError, csv.Error):
        lines, names = [], []
    ids = [tables.read_csv_cell(line.get("id") or "") for line in lines]
    if ids != [row["id"] for row in rows]:
        return [dict(row) for row in rows]
    kept = [n for n in names if n.startswith(COLUMNS) and n not in rows[0]]
    return [
        {**row, **{name: line[name] for name in kept}}
        for row, line in zip(rows, lines, strict=True)
    ]


def corruption_cells(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the corruptions of results.json, {name: {severity: scores}}, without the mean."""
    corruptions_by_name = {
        name: {severity: cell for severity, cell in _cells(rows).items() if severity in SEVERITIES}
        for name, rows in section.items()
    }
    return {name: rows for name, rows in corruptions_by_name.items() if rows}


def _cells(section: Any) -> dict[str, Any]:
    """Returns the entries of {name: scores} that are valid scores."""
    cells = section.items() if isinstance(section, Mapping) else ()
    return {name: cell for name, cell in cells if _are_scores(cell)}


def _are_scores(cell: Any) -> bool:
    known = isinstance(cell, Mapping) and cell.keys() >= set(SCORES)
    return known and all(isinstance(cell[name], int | float) for name in SCORES)


def _names(values: Any) -> list[str]:
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []
