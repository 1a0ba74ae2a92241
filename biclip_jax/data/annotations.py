"""Parsed annotation rows, and the consistency checks that all layouts share."""

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
# Published prompt variants of the same images, named by how the prompt was altered.
VARIANTS = ("contradictory", "missing_location", "overdescriptive", "underdescriptive")


class Folder(NamedTuple):
    """A folder and its images; `names` maps file names and stems to file names."""

    path: Path
    names: dict[str, str]


class Row(NamedTuple):
    """One annotation before its files are looked up; `where` names its line in the table."""

    split: Split
    image: Path
    mask: Path | None
    text: str
    where: str


class Variant(NamedTuple):
    """A prompt variant of an image: its name in `VARIANTS`, the image's id, its line."""

    name: str
    id: str
    text: str
    where: str


class ParsedLayout(NamedTuple):
    """Result of a layout's reader; every image in `image_dirs` must have a row."""

    rows: list[Row]
    problems: list[str]
    image_dirs: list[Folder]


def find_problems(parsed: ParsedLayout, allow_shared: bool = False) -> list[str]:
    """Returns one message per inconsistency, those of the reader first.

    Args:
      parsed: Rows and problems of a reader.
      allow_shared: Allows the same image in several splits.
    """
    return (
        parsed.problems
        + _missing_files(parsed.rows)
        + _shared_ids(parsed.rows, allow_shared)
        + _unnamed_images(parsed.rows, parsed.image_dirs)
    )


def variants_by_id(
    variants: Iterable[Variant], ids: Collection[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Groups prompt variants by image, {id: {name: prompt}}; empty prompts are left out.

    Args:
      variants: Variants in the order of their files.
      ids: Ids of the annotated images.

    Returns:
      The prompts, and one problem for each unknown image and each repeated variant.
    """
    prompts: dict[str, dict[str, str]] = {}
    problems = []
    for name, image_id, text, where in variants:
        if image_id not in ids:
            problems.append(f"{where}: found {image_id!r}; expected an annotated image; fix it.")
        elif name in prompts.get(image_id, {}):
            problems.append(f"{where}: found {image_id!r} a second time; expected once; delete it.")
        elif text:
            prompts.setdefault(image_id, {})[name] = text
    return prompts, problems


def combine_problems(source: str, problems: list[str]) -> DataError:
    """Combines problems into one error, listing the first `MAX_LISTED`."""
    shown = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        shown.append(f"  ... and {len(problems) - MAX_LISTED} more")
    head = f"{source}: found {len(problems)} problem(s), expected none; fix each:"
    return DataError("\n".join([head, *shown]))


def list_images(path: Path) -> Folder:
    """Lists the images of a folder; none if the folder is missing."""
    files = sorted(os.listdir(path)) if path.is_dir() else []
    images = [name for name in files if is_image_name(name)]
    return Folder(path, {image_stem(n): n for n in images} | {n: n for n in images})


def find_file(folder: Folder, *names: str) -> Path:
    """Returns the first of `names` in the folder, with any image suffix; else names[0]."""
    for name in names:
        if file := folder.names.get(name) or folder.names.get(image_stem(name)):
            return folder.path / file
    return folder.path / names[0]


def join_layouts(parts: Iterable[ParsedLayout]) -> ParsedLayout:
    """Concatenates the results of several readers."""
    return ParsedLayout(*(list(itertools.chain(*lists)) for lists in zip(*parts, strict=True)))


def _missing_files(rows: list[Row]) -> list[str]:
    """Returns problems of rows whose image or mask is missing; lists each folder once."""
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
    """Keeps the first row of each image.

    Returns:
      The rows; the ids of images with several rows; the ids that occur in several splits.
    """
    counts = Counter(row.image for row in rows)
    num_splits = Counter(name for _, name in {(row.split, image_stem(row.image)) for row in rows})
    first_rows = {row.image: row for row in reversed(rows)}
    return (
        [row for row in rows if first_rows[row.image] is row],
        sorted(image_stem(image) for image, count in counts.items() if count > 1),
        sorted(name for name, count in num_splits.items() if count > 1),
    )


def _shared_ids(rows: list[Row], per_split: bool) -> list[str]:
    by_id = defaultdict(list)
    for row in rows:
        by_id[image_stem(row.image), row.split if per_split else ""].append(row)
    return [
        f"{repeat.image}: found id {name!r} a second time in {repeat.where} ({repeat.split}), "
        f"first in {first.where} ({first.split}); expected each once; rename or delete one."
        for (name, _), (first, *repeats) in by_id.items()
        for repeat in repeats
    ]


def _unnamed_images(rows: list[Row], folders: list[Folder]) -> list[str]:
    named = {row.image for row in rows}
    images = [folder.path / name for folder in folders for name in set(folder.names.values())]
    return [
        f"{path}: image without a text prompt; expected a row that names it; add one or "
        "remove the image."
        for path in sorted(images)
        if path not in named
    ]
