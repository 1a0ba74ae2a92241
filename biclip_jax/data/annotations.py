"""Annotations before they are Examples: gathered rows, and what may be wrong with them."""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from biclip_jax.core.errors import DataError
from biclip_jax.data.image_io import image_stem, is_image_name
from biclip_jax.data.schema import Split

MAX_LISTED = 20
# Other published sentences of the same pictures, by what was done to them.
VARIANTS = ("contradictory", "missing_location", "overdescriptive", "underdescriptive")


class Folder(NamedTuple):
    """A folder and its pictures: file name, and the name without suffix, -> file name."""

    path: Path
    names: dict[str, str]


class Row(NamedTuple):
    """One annotation, its files not yet looked for; `where` names its line, mask may be none."""

    split: Split
    image: Path
    mask: Path | None
    text: str
    where: str


class Variant(NamedTuple):
    """Another sentence of a picture: a name of `VARIANTS`, the picture's id, where it stands."""

    name: str
    id: str
    text: str
    where: str


class ParsedLayout(NamedTuple):
    """What a reader gathers; every picture lying in `image_dirs` must have a row."""

    rows: list[Row]
    problems: list[str]
    image_dirs: list[Folder]


def find_problems(found: ParsedLayout, may_share: bool = False) -> list[str]:
    """Returns all that does not hold together, one message each, the reader's own first.

    `may_share` lets several splits name one picture.
    """
    return (
        found.problems
        + _missing_files(found.rows)
        + _shared_ids(found.rows, may_share)
        + _unnamed_images(found.rows, found.image_dirs)
    )


def variants_by_id(
    variants: Iterable[Variant], ids: Collection[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Sorts variants by picture, {id: {name: sentence}}; empty ones are left out.

    Args:
      variants: in the order of their files.
      ids: of the pictures that there are.

    Returns:
      The sentences, and one problem for each picture that is not there or has two.
    """
    found: dict[str, dict[str, str]] = {}
    problems = []
    for name, image_id, text, where in variants:
        if image_id not in ids:
            problems.append(f"{where}: found {image_id!r}; expected an annotated picture; mend it.")
        elif name in found.get(image_id, {}):
            problems.append(f"{where}: found {image_id!r} a second time; expected once; delete it.")
        elif text:
            found.setdefault(image_id, {})[name] = text
    return found, problems


def combine_problems(source: str, problems: list[str]) -> DataError:
    """Makes one error of many problems, listing the first `MAX_LISTED`."""
    shown = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        shown.append(f"  ... and {len(problems) - MAX_LISTED} more")
    head = f"{source}: found {len(problems)} problem(s), expected none; mend each:"
    return DataError("\n".join([head, *shown]))


def list_images(path: Path) -> Folder:
    """Lists a folder's pictures, none where it is missing."""
    files = sorted(os.listdir(path)) if path.is_dir() else []
    images = [name for name in files if is_image_name(name)]
    return Folder(path, {image_stem(n): n for n in images} | {n: n for n in images})


def find_file(folder: Folder, *names: str) -> Path:
    """The first of `names` that the folder holds, with its own suffix or another; else names[0]."""
    for name in names:
        if file := folder.names.get(name) or folder.names.get(image_stem(name)):
            return folder.path / file
    return folder.path / names[0]


def join_layouts(parts: Iterable[ParsedLayout]) -> ParsedLayout:
    """Concatenates what several readers found."""
    return ParsedLayout(*(list(itertools.chain(*lists)) for lists in zip(*parts, strict=True)))


def _missing_files(rows: list[Row]) -> list[str]:
    """Problems of rows whose picture or mask is not there, with one listing per folder."""
    present = {}
    problems = []
    for row in rows:
        for kind, path in (("image", row.image), ("mask", row.mask)):
            if path is None:
                continue
            if path.parent not in present:
                is_dir = path.parent.is_dir()
                present[path.parent] = set(os.listdir(path.parent)) if is_dir else set()
            if path.name not in present[path.parent]:
                problems.append(
                    f"{path}: {kind} not found, named by {row.where}; add it or delete the row."
                )
    return problems


def drop_repeats(rows: list[Row]) -> tuple[list[Row], list[str], list[str]]:
    """Each picture once, the first row of it.

    Returns:
      The rows; the ids of pictures that have several rows; the ids that several splits name.
    """
    counts = Counter(row.image for row in rows)
    places = Counter(name for _, name in {(row.split, image_stem(row.image)) for row in rows})
    first = {row.image: row for row in reversed(rows)}
    return (
        [row for row in rows if first[row.image] is row],
        sorted(image_stem(image) for image, count in counts.items() if count > 1),
        sorted(name for name, count in places.items() if count > 1),
    )


def _shared_ids(rows: list[Row], in_splits: bool) -> list[str]:
    by_id = defaultdict(list)
    for row in rows:
        by_id[image_stem(row.image), row.split if in_splits else ""].append(row)
    return [
        f"{again.image}: found id {name!r} a second time in {again.where} ({again.split}), first "
        f"in {first.where} ({first.split}); expected each once; rename or delete one."
        for (name, _), (first, *others) in by_id.items()
        for again in others
    ]


def _unnamed_images(rows: list[Row], folders: list[Folder]) -> list[str]:
    named = {row.image for row in rows}
    images = [folder.path / name for folder in folders for name in set(folder.names.values())]
    return [
        f"{path}: picture without a sentence; expected a row that names it; add one or "
        "take the picture out."
        for path in sorted(images)
        if path not in named
    ]
