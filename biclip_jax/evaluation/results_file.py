"""What an earlier evaluation of the same model on the same pictures left, and what of it stays.

A call makes some sections of results.json: those that it does not make are as true as they were.
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

# Two evaluations that agree in these are of one model on one list of pictures.
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
# What names of per_image.csv's scores begin with.
COLUMNS = ("dice_", "iou_", "dsc", "nsd_")
SEVERITIES = tuple(map(str, corruptions.SEVERITIES))
SCORES = ("dice_global", "dice_mean", "iou_global", "iou_mean", "num_images")


def digest(prompt_records: Sequence[Mapping[str, Any]]) -> str:
    """The SHA-256 of ids and sentences, in order; see `conditions.spoken`."""
    return hashlib.sha256(json.dumps(prompt_records, default=str).encode()).hexdigest()


def read(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """results.json of an evaluation with the same `IDENTITY`; {} for any other, or a damaged one.

    Args:
      folder: of the evaluation.
      facts: with all names of `IDENTITY`.
    """
    found = _read_results(folder)
    return found if all(found.get(name) == facts[name] for name in IDENTITY) else {}


def check_same_images(folder: Path, facts: Mapping[str, Any]) -> None:
    """Two data sets may have folders of one name: the second does not take the first one's place.

    Raises:
      UserError: the folder holds an evaluation of other pictures.
    """
    if _read_results(folder).get("images_sha256", facts["images_sha256"]) != facts["images_sha256"]:
        raise UserError(
            f"{folder}: holds an evaluation of other pictures or sentences, whose data set had a "
            "folder of the same name; give another --output, or remove it"
        )


def _read_results(folder: Path) -> dict[str, Any]:
    """What results.json holds; {} where there is none that can be read."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def merge_results(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`now`, and the sections and conditions of `before` that it has not.

    Args:
      before: what `read` found.
      now: with "conditions", "unavailable" and "command".
    """
    kept = {name: before[name] for name in SECTIONS if isinstance(before.get(name), Mapping)}
    kept |= {"baselines": _cells(kept["baselines"])} if "baselines" in kept else {}
    earlier = [*_names(before.get("previous_commands")), *_names([before.get("command")])]
    return {
        **kept,
        **now,
        "conditions": {**_cells(before.get("conditions")), **now["conditions"]},
        "unavailable": list(
            dict.fromkeys([*_names(before.get("unavailable")), *now["unavailable"]])
        ),
        "previous_commands": [c for c in dict.fromkeys(earlier) if c != now.get("command")],
    }


def merge_columns(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`rows` of per_image.csv, and the scores of the file at `path` that they have not.

    Args:
      path: of an earlier evaluation's; may be missing.
      rows: at least one; see `runner.per_image_rows`.
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
    more = [n for n in names if n.startswith(COLUMNS) and n not in rows[0]]
    return [
        {**row, **{name: line[name] for name in more}}
        for row, line in zip(rows, lines, strict=True)
    ]


def corruption_cells(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a degradations section, {name: {severity: scores}}, without their mean."""
    found = {
        name: {severity: cell for severity, cell in _cells(rows).items() if severity in SEVERITIES}
        for name, rows in section.items()
    }
    return {name: rows for name, rows in found.items() if rows}


def _cells(section: Any) -> dict[str, Any]:
    """Those that are scores, of {name: scores}."""
    cells = section.items() if isinstance(section, Mapping) else ()
    return {name: cell for name, cell in cells if _are_scores(cell)}


def _are_scores(cell: Any) -> bool:
    known = isinstance(cell, Mapping) and cell.keys() >= set(SCORES)
    return known and all(isinstance(cell[name], int | float) for name in SCORES)


def _names(values: Any) -> list[str]:
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []
