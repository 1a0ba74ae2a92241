"""CSV files and plain-text tables."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biclip_jax.core import files

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return "'" + value
    return value.item() if isinstance(value, np.generic) else value


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, with the columns in order of first appearance.

    Strings that start with = + - @, a tab or a line break get a leading apostrophe: ids and prompts
    come from untrusted files, and spreadsheets would run them as formulas. `read_csv_cell` removes
    the apostrophe. Numbers are unchanged; missing values are empty.

    Args:
      path: Path of the UTF-8 file.
      rows: String, number, bool or None per column; numpy scalars are allowed.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with files.atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_csv_cell(row.get(key)) for key in columns] for row in rows)


def read_csv_cell(cell: str) -> str:
    """Returns the original text of a cell written by `write_csv`."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA_STARTS) else cell


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Formats a plain-text table, without a trailing line break.

    Args:
      rows: Values per column; floats get four decimals (scientific notation below 1e-3), missing
        values and None are shown as "-", line breaks become spaces.
      columns: Keys, in order; numeric columns are right-aligned.
    """
    cells = [[_table_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [not any(isinstance(row.get(column), str) for row in rows) for column in columns]

    def line(texts: Sequence[str]) -> str:
        padded = zip(texts, widths, right, strict=True)
        return "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in padded).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


def _table_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:.2e}" if 0 < abs(float(value)) < 1e-3 else f"{value:.4f}"
    return " ".join(str(value).split())
