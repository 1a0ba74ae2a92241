"""Reads the annotation tables of datasets (workbooks, CSV and JSON) into lists of lines."""

from __future__ import annotations

import csv
import difflib
import json
import re
import zipfile
from pathlib import Path, PureWindowsPath
from xml.etree.ElementTree import ParseError

from biclip_jax.core.errors import DataError

Line = tuple[str, dict[str, str]]  # (file name and row number, {column: stripped text})


def read_table(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[Line]:
    """Reads the named columns of a .csv file or of the first sheet of an .xlsx workbook.

    Headers are stripped and compared case-insensitively. Blank rows are skipped.

    Args:
      path: Path of the table.
      required: Columns that must exist.
      optional: Columns to read if they exist.

    Returns:
      The lines in file order, by column name as requested; an empty cell is "".

    Raises:
      DataError: The file is missing or unreadable, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"{path}: found no such file; expected {_listed(required)}; add it.")
    lines = _lines(path)
    header = [cell.lower() for cell in lines[0]] if lines else []
    for column in required:
        if column.lower() not in header:
            raise _missing_column(path, column, lines[0] if lines else [])
    positions = {c: header.index(c.lower()) for c in required + optional if c.lower() in header}
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if any(cells):
            values = {c: cells[i] if i < len(cells) else "" for c, i in positions.items()}
            rows.append((f"{path.name} row {number}", values))
    return rows


def has_column(path: Path, column: str) -> bool:
    """Returns whether the header of an existing table has a column, case-insensitively.

    Raises:
      DataError: The file is unreadable.
    """
    lines = _lines(path)
    return bool(lines) and column.lower() in [cell.lower() for cell in lines[0]]


def _lines(path: Path) -> list[list[str]]:
    return _workbook_lines(path) if path.suffix.lower() == ".xlsx" else _csv_lines(path)


def read_prompts(path: Path, prompt: str | None = None) -> tuple[list[Line], list[str]]:
    """Reads MedVLSM's JSON list of {"img_name", "mask_name", "prompts": {"p0": ...}}.

    Args:
      path: Path of the .json file.
      prompt: Prompt to use; None uses the highest-numbered prompt that is not empty. If a prompt
        has several wordings, the first is used.

    Returns:
      The lines, with the columns img_name, mask_name and text, and the problems.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"{path}: cannot be read ({error}); expected a JSON list; add or fix it."]
    if not isinstance(entries, list):
        return [], [f"{path}: found a {type(entries).__name__}; expected a JSON list; fix it."]
    lines, problems = [], []
    for number, entry in enumerate(entries):
        where = f"{path.name} entry {number}"
        fields = entry if isinstance(entry, dict) else {}
        names = {key: _cell(fields.get(key)) for key in ("img_name", "mask_name")}
        text = _prompt_text(fields.get("prompts"), prompt)
        if text is None:
            expected = f"prompts with {prompt!r}" if prompt else "prompts named p0, p1, ..."
            problems.append(f"{where}: found none; expected {expected}; add it or choose another.")
            continue
        lines.append((where, names | {"text": text}))
    return lines, problems


def refuse_unsafe(
    lines: list[Line], required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[list[Line], list[str]]:
    """Separates lines with safe file names from problems with the others.

    Args:
      lines: Lines as returned by `read_table`.
      required: Columns with file names that may not be empty.
      optional: Columns with file names that may be empty or absent.

    Returns:
      The lines whose files are below the dataset's root, and one problem per refused name.
    """
    safe, problems = [], []
    for where, line in lines:
        missing = [c for c in required if not line[c]]
        problems += [f"{where}: found no {c}; expected a file name; fill it in." for c in missing]
        outside = [c for c in required + optional if _leaves_root(line.get(c, ""))]
        problems += [
            f"{where}: found unsafe {c} {line[c]!r}; expected a name inside the dataset, neither "
            "absolute nor with '..'; move the file there and change the name."
            for c in outside
        ]
        if not missing and not outside:
            safe.append((where, line))
    return safe, problems


def _leaves_root(name: str) -> bool:
    windows = PureWindowsPath(name)
    return bool(windows.drive or windows.root or "\0" in name or ".." in re.split(r"[\\/]", name))


def _prompt_text(prompts: object, prompt: str | None) -> str | None:
    """Returns the chosen prompt's first wording, stripped; None if there is no such prompt."""
    if not isinstance(prompts, dict):
        return None
    texts = {key: _cell(_first(value)) for key, value in prompts.items()}
    if prompt is not None:
        return texts.get(prompt)
    numbered = sorted((int(k[1:]), k) for k in texts if re.fullmatch(r"p[0-9]+", k))
    filled = [key for _, key in numbered if texts[key]]
    if filled:
        return texts[filled[-1]]
    return "" if numbered else None


def _first(value: object) -> object:
    if not isinstance(value, list):
        return value
    return value[0] if value else None


def _csv_lines(path: Path) -> list[list[str]]:
    try:
        # utf-8-sig: Excel writes a byte order mark, which would stick to the first header.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [[cell.strip() for cell in line] for line in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: found a file that cannot be read ({error}); expected a comma-separated "
            "table in UTF-8; save it again as CSV UTF-8."
        ) from error


def _workbook_lines(path: Path) -> list[list[str]]:
    import openpyxl

    book = None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheet = book.worksheets[0]
        # Some writers store wrong dimensions, which would cut off rows.
        sheet.reset_dimensions()
        return [[_cell(value) for value in line] for line in sheet.iter_rows(values_only=True)]
    except (OSError, zipfile.BadZipFile, ParseError, LookupError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: found a file that cannot be read ({type(error).__name__}: {error}); "
            "expected an Excel workbook; save it again as .xlsx."
        ) from error
    finally:
        if book is not None:
            book.close()


def _cell(value: object) -> str:
    return "" if value is None else str(value).strip()


def _missing_column(path: Path, column: str, header: list[str]) -> DataError:
    by_lower = {name.lower(): name for name in header if name}
    near = difflib.get_close_matches(column.lower(), by_lower, n=1, cutoff=0.3)
    fix = f"rename {by_lower[near[0]]!r}, the nearest found" if near else "add it"
    if len(by_lower) == 1 and any(separator in header[0] for separator in ";\t"):
        fix = "separate columns by commas"
    found = _listed(tuple(by_lower.values())) if by_lower else "no columns"
    return DataError(f"{path}: found {found}; expected a column {column!r}; {fix}.")


def _listed(columns: tuple[str, ...]) -> str:
    return "columns " + ", ".join(columns)
