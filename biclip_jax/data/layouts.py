"""Data sets as they lie on disk, recognised by their folders, as lists of Examples.

To add a layout, write a reader `root -> Found` and name it in `_READERS`, its mark in `LAYOUTS`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from biclip_jax.core.errors import DataError
from biclip_jax.data.annotations import (
    MAX_LISTED,
    VARIANTS,
    Folder,
    ParsedLayout,
    Row,
    Variant,
    combine_problems,
    drop_repeats,
    find_file,
    find_problems,
    join_layouts,
    list_images,
    variants_by_id,
)
from biclip_jax.data.image_io import image_stem
from biclip_jax.data.schema import SPLITS, Example, Split
from biclip_jax.data.tables import has_column, read_prompts, read_table, refuse_unsafe

LAYOUTS: dict[str, str] = {
    "lvit": "Train_Folder/labelcol",
    "languide": "Train/GTs",
    "medclipseg": "Prompts_Folder",
    "medvlsm": "anns",
    "csv": "annotations.csv, or a single *.csv",
}
PERCENTS = (10, 25, 50, 100)


def find_layout(root: str | os.PathLike[str]) -> str:
    """Returns the name of the one layout of `LAYOUTS` whose mark lies in `root`.

    Raises:
      DataError: `root` is no folder, or no layout fits, or several do.
    """
    root = _existing(root)
    fitting = [name for name in LAYOUTS if _has_mark(root, name)]
    if len(fitting) == 1:
        return fitting[0]
    marks = "; ".join(f"{mark} ({name})" for name, mark in LAYOUTS.items())
    found = f"several layouts ({', '.join(fitting)})" if fitting else "no known layout"
    if not fitting and (tables := sorted(path.name for path in root.glob("*.csv"))):
        found = f"{len(tables)} CSV files ({', '.join(tables[:3])}), none of them annotations.csv"
    raise DataError(
        f"{root}: found {found}; expected exactly one of: {marks}; "
        "give the folder that holds one of these, or name the layout."
    )


def read_layout(
    root: str | os.PathLike[str],
    layout: str | None = None,
    prompt: str | None = None,
    percent: int = 100,
) -> list[Example]:
    """Reads and checks the annotations of a data set; no picture is opened.

    In lvit, languide and medclipseg every picture of a folder must have a row; csv and medvlsm
    may annotate a part of their pictures. An empty sentence is legal. In medclipseg a picture may
    be of several splits, or named twice, as in published sets (ISIC, CVC300, BKAI): warned of.

    Args:
      root: the data set's folder.
      layout: a name of `LAYOUTS`, or None to look.
      prompt: medvlsm only, the prompt to take ("p6"); None takes the highest-numbered that is
        not empty. Of several wordings of one prompt the first is taken.
      percent: medclipseg only, of `PERCENTS`: below 100 train and val are the published subsets,
        the workbooks {Train,Val}_text_PERCENT.xlsx; pictures without a row are then left out.

    Returns:
      The examples, train before val before test, in file order within a split.

    Raises:
      DataError: listing what does not hold together, all problems at once.
    """
    root = _existing(root)
    layout = layout or find_layout(root)
    if layout not in LAYOUTS:
        raise DataError(f"layout: found {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    if prompt is not None and layout != "medvlsm":
        raise DataError(f"prompt: found {prompt!r}; the {layout} layout has no prompts; drop it.")
    _check_percent(percent, layout)
    options: dict[str, dict[str, Any]] = {
        "medvlsm": {"prompt": prompt},
        "medclipseg": {"percent": percent},
    }
    found = _READERS[layout](root, **options.get(layout, {}))
    may_share = layout == "medclipseg"
    if may_share:
        found = _once_a_split(root, found)
    if problems := find_problems(found, may_share):
        raise combine_problems(f"{root}, as {layout} layout", problems)
    rows = sorted(found.rows, key=lambda row: SPLITS.index(row.split))
    if not rows:
        raise DataError(f"{root}: found no annotated picture; expected at least one; add rows.")
    return [
        Example(image_stem(row.image), row.split, str(row.image), str(row.mask), row.text)
        for row in rows
    ]


def read_unlabelled(root: str | os.PathLike[str]) -> list[Example]:
    """Reads pictures whose masks nobody needs, as examples of the training split, without masks.

    Args:
      root: a folder with one table (annotations.csv, or a single *.csv) with the columns image
        and text and without a column mask: all its pictures are taken, or where it has a column
        split those of train. Or a data set in any layout: its training split is taken.

    Raises:
      DataError: as `read_layout`.
    """
    table = _csv_path(_existing(root))
    if table is None or has_column(table, "mask"):
        train = [example for example in read_layout(root) if example.split == "train"]
        examples = [example._replace(mask_path="") for example in train]
    else:
        examples = _without_masks(Path(root), table)
    if not examples:
        raise DataError(f"{root}: found no picture to train on; expected at least one; add some.")
    return examples


def _without_masks(root: Path, table: Path) -> list[Example]:
    lines = read_table(table, ("image", "text"), ("split",))
    lines = [(w, line) for w, line in lines if line.get("split", "").lower() in ("", "train")]
    lines, problems = refuse_unsafe(lines, ("image",))
    rows = [
        Row("train", _beside(root, "images", line["image"]), None, line["text"], where)
        for where, line in lines
    ]
    if problems := find_problems(ParsedLayout(rows, problems, [])):
        raise combine_problems(f"{root}, as pictures without masks", problems)
    return [Example(image_stem(row.image), row.split, str(row.image), "", row.text) for row in rows]


def _once_a_split(root: Path, found: ParsedLayout) -> ParsedLayout:
    """Some published sets in this layout name a picture twice: taken, and said aloud."""
    rows, repeated, shared = drop_repeats(found.rows)
    for names, problem in (
        (repeated, "with several rows; the first is taken"),
        (shared, "named in several splits; where they are the same, a score is on trained ones"),
    ):
        if names:
            listed = ", ".join(names[:MAX_LISTED])
            warnings.warn(f"{root}: {len(names)} picture(s) {problem}: {listed}", stacklevel=4)
    return found._replace(rows=rows)


def _check_percent(percent: int, layout: str) -> None:
    if percent not in PERCENTS:
        known = ", ".join(map(str, PERCENTS))
        raise DataError(f"percent: found {percent}; expected one of {known}; choose one.")
    if percent != 100 and layout != "medclipseg":
        raise DataError(
            f"percent: found {percent}; expected 100, as the {layout} layout has no published "
            "subsets; drop it, or train on data.label_fraction."
        )


def read_variants(
    root: str | os.PathLike[str],
    examples: Sequence[Example],
    layout: str | None = None,
    percent: int = 100,
) -> dict[str, dict[str, str]]:
    """Reads the other published sentences of the same pictures, where a data set has them.

    In medclipseg they lie in Prompts_Folder/Test_text_NAME.xlsx (Train and Val likewise), in csv in
    columns of these names, NAME out of `annotations.VARIANTS`; other layouts have none.

    Args:
      root: the data set's folder.
      examples: what `read_layout` gave.
      layout: a name of `LAYOUTS`, or None to look.
      percent: as of `read_layout`; below 100 sentences of pictures left out are, too.

    Returns:
      {id: {NAME: sentence}}, of the pictures that have any.

    Raises:
      DataError: a table that cannot be read, or names another picture or one twice.
    """
    root = _existing(root)
    readers = {"medclipseg": _medclipseg_variants, "csv": _csv_variants}
    layout = layout or find_layout(root)
    if layout not in readers:
        return {}
    variants, ids = readers[layout](root), {e.id for e in examples}
    if percent != 100:
        variants = [variant for variant in variants if variant.id in ids]
    found, problems = variants_by_id(variants, ids)
    if problems:
        raise combine_problems(f"{root}, as {layout} layout", problems)
    return found


def _existing(root: str | os.PathLike[str]) -> Path:
    if os.path.isfile(root):
        raise DataError(f"{root}: found a file; expected the folder of a data set; give that.")
    if not os.path.isdir(root):
        raise DataError(f"{root}: found no such folder; expected a data set; check the path.")
    return Path(root)


def _lvit(root: Path) -> ParsedLayout:
    tables = {s: _table_path(root, s, f"{s.title()}_text.xlsx") for s in SPLITS}
    both = _table_path(root, "train", "Train_Val_text.xlsx")
    jobs: list[tuple[tuple[Split, ...], Path]] = [((s,), table) for s, table in tables.items()]
    if both.is_file() and not (tables["train"].is_file() or tables["val"].is_file()):
        jobs = [(("train", "val"), both), (("test",), tables["test"])]
    return join_layouts(
        _mask_named(table, {s: _split_folders(root, s, "labelcol") for s in splits})
        for splits, table in jobs
    )


def _languide(root: Path) -> ParsedLayout:
    parts = []
    splits: tuple[Split, Split] = ("train", "test")
    for split in splits:
        folder = root / split.title()
        places = {split: (list_images(folder / "Images"), list_images(folder / "GTs"))}
        parts.append(_mask_named(root / f"prompt/{split}.csv", places))
    # LanGuideMedSeg validates on the last 20 % of its training file.
    rows = parts[0].rows
    first_val = int(0.8 * len(rows))
    rows[first_val:] = [row._replace(split="val") for row in rows[first_val:]]
    return join_layouts(parts)


def _mask_named(table: Path, places: dict[Split, tuple[Folder, Folder]]) -> ParsedLayout:
    """Reads rows that name a mask; a row belongs to the first split whose folder holds it."""
    try:
        lines = read_table(table, ("Image", "Description"))
    except DataError as error:
        # Without its table every picture of a split would look unnamed: ask for the table only.
        return ParsedLayout([], [str(error)], [])
    lines, problems = refuse_unsafe(lines, ("Image",))
    rows = []
    for where, line in lines:
        name = line["Image"]
        holders = [
            s for s, (_, masks) in places.items() if find_file(masks, name).name in masks.names
        ]
        split = holders[0] if holders else next(iter(places))
        images, masks = places[split]
        # QaTa-COV19 calls the mask of covid_1.png mask_covid_1.png; MosMedData+ shares the name.
        image = find_file(images, name.removeprefix("mask_"), name)
        rows.append(Row(split, image, find_file(masks, name), line["Description"], where))
    return ParsedLayout(rows, problems, [images for images, _ in places.values()])


def _medclipseg(root: Path, percent: int) -> ParsedLayout:
    parts = [ParsedLayout([], [], [])]
    for split in SPLITS:
        whole = percent == 100 or split == "test"
        name = f"{split.title()}_text{'' if whole else f'_{percent}'}.xlsx"
        table = root / "Prompts_Folder" / name
        original = table.with_name("Test_text_original.xlsx")
        table = original if split == "test" and original.is_file() else table
        images, masks = _split_folders(root, split, "label")
        if not (table.is_file() or images.names):
            continue  # a target of domain generalisation may have a test split alone
        part = _image_named(split, table, images, masks)
        # The pictures that a subset leaves out have no row, and need none.
        parts.append(part if whole else part._replace(image_dirs=[]))
    return join_layouts(parts)


def _medclipseg_variants(root: Path) -> list[Variant]:
    found = []
    for split in SPLITS:
        images, _ = _split_folders(root, split, "label")
        for name in VARIANTS:
            table = root / "Prompts_Folder" / f"{split.title()}_text_{name}.xlsx"
            lines = read_table(table, ("Image", "Description")) if table.is_file() else []
            found += [
                Variant(
                    name, image_stem(find_file(images, line["Image"])), line["Description"], where
                )
                for where, line in lines
            ]
    return found


def _image_named(split: Split, table: Path, images: Folder, masks: Folder) -> ParsedLayout:
    """Reads rows that name a picture, and its mask where that has another name."""
    try:
        lines = read_table(table, ("Image", "Description"), ("Ground Truth", "Mask"))
    except DataError as error:
        return ParsedLayout([], [str(error)], [])
    lines, problems = refuse_unsafe(lines, ("Image",), ("Ground Truth", "Mask"))
    rows = []
    for where, line in lines:
        image = find_file(images, line["Image"])
        mask = find_file(masks, line.get("Ground Truth") or line.get("Mask") or image.name)
        rows.append(Row(split, image, mask, line["Description"], where))
    return ParsedLayout(rows, problems, [images])


def _medvlsm(root: Path, prompt: str | None) -> ParsedLayout:
    images, masks = list_images(root / "images"), list_images(root / "masks")
    rows, problems = [], []
    for split in SPLITS:
        lines, unreadable = read_prompts(root / f"anns/{split}.json", prompt)
        lines, unsafe = refuse_unsafe(lines, ("img_name", "mask_name"))
        problems += unreadable + unsafe
        for where, line in lines:
            image, mask = find_file(images, line["img_name"]), find_file(masks, line["mask_name"])
            rows.append(Row(split, image, mask, line["text"], where))
    return ParsedLayout(rows, problems, [])


def _csv(root: Path) -> ParsedLayout:
    table = _csv_path(root) or root / "annotations.csv"
    lines = read_table(table, ("split", "image", "mask", "text"))
    lines, problems = refuse_unsafe(lines, ("image", "mask"))
    rows = []
    for where, line in lines:
        split = line["split"].lower()
        if split not in SPLITS:
            problems.append(f"{where}: found split {split!r}; expected {', '.join(SPLITS)}.")
            continue
        image, mask = _beside(root, "images", line["image"]), _beside(root, "masks", line["mask"])
        rows.append(Row(split, image, mask, line["text"], where))
    return ParsedLayout(rows, problems, [])


def _csv_variants(root: Path) -> list[Variant]:
    table = _csv_path(root) or root / "annotations.csv"
    return [
        Variant(name, image_stem(line["image"]), line[name], where)
        for where, line in read_table(table, ("image",), VARIANTS)
        for name in VARIANTS
        if name in line
    ]


_READERS: dict[str, Callable[..., ParsedLayout]] = {
    "lvit": _lvit,
    "languide": _languide,
    "medclipseg": _medclipseg,
    "medvlsm": _medvlsm,
    "csv": _csv,
}


def _has_mark(root: Path, layout: str) -> bool:
    if layout == "csv":
        return _csv_path(root) is not None
    return (root / LAYOUTS[layout]).is_dir()


def _csv_path(root: Path) -> Path | None:
    named = root / "annotations.csv"
    tables = [named] if named.is_file() else list(root.glob("*.csv"))
    return tables[0] if len(tables) == 1 else None


def _table_path(root: Path, split: Split, name: str) -> Path:
    """LViT's workbooks lie inside the split's folder or at the root."""
    inside, above = root / f"{split.title()}_Folder" / name, root / name
    return above if above.is_file() and not inside.is_file() else inside


def _beside(root: Path, folder: str, name: str) -> Path:
    inside, above = root / folder / name, root / name
    written = above.is_file() or name.startswith(f"{folder}/")  # where it is, or where it is missed
    return above if written and not inside.is_file() else inside


def _split_folders(root: Path, split: Split, masks: str) -> tuple[Folder, Folder]:
    folder = root / f"{split.title()}_Folder"
    return list_images(folder / "img"), list_images(folder / masks)
