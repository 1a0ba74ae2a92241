"""CSV files and plain tables for the console."""

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
    """Writes one line a row; columns in the order in which the rows first name them.

    Strings that begin with = + - @, a tab or a line break get a leading
    apostrophe: spreadsheets would run them as formulas, and ids and sentences
    come from other people's files. Readers that want the text back drop an
    apostrophe that stands before one of these. Numbers are never touched;
    what a row lacks is left empty.

    Args:
      path: where the UTF-8 file goes.
      rows: string, number, bool or None per column; numpy scalars are fine.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with files.atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_csv_cell(row.get(key)) for key in columns] for row in rows)


def read_csv_cell(cell: str) -> str:
    """The text that `write_csv` was given, from a cell of its file."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA_STARTS) else cell


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A plain table for the console, without a trailing line break.

    Args:
      rows: values per column; floats get four decimals (exponent below 1e-3),
        what is absent or None shows as "-", line breaks become blanks.
      columns: keys, in order; a column of numbers is aligned right.
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
