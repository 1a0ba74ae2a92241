"""Dataset layouts on disk, recognised by their folders and read into lists of Examples.

To add a layout, write a reader `root -> ParsedLayout`, add it to `_READERS`, and add the folder or
file that identifies it to `LAYOUTS`.
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
    """Returns the name of the only layout of `LAYOUTS` that fits the folder.

    Raises:
      DataError: `root` is not a folder, or no layout fits, or several do.
    """
    root = _check_root(root)
    matches = [name for name in LAYOUTS if _has_marker(root, name)]
    if len(matches) == 1:
        return matches[0]
    markers = "; ".join(f"{marker} ({name})" for name, marker in LAYOUTS.items())
    found = f"several layouts ({', '.join(matches)})" if matches else "no known layout"
    if not matches and (tables := sorted(path.name for path in root.glob("*.csv"))):
        found = f"{len(tables)} CSV files ({', '.join(tables[:3])}), none of them annotations.csv"
    raise DataError(
        f"{root}: found {found}; expected exactly one of: {markers}; "
        "give the folder that holds one of these, or name the layout."
    )


def read_layout(
    root: str | os.PathLike[str],
    layout: str | None = None,
    prompt: str | None = None,
    percent: int = 100,
) -> list[Example]:
    """Reads and checks the annotations of a dataset; opens no image.

    In lvit, languide and medclipseg every image of a folder must have a row; csv and medvlsm may
    annotate only some of their images. Empty prompts are allowed. In medclipseg an image may occur
    in several splits or rows, as in published datasets (ISIC, CVC300, BKAI); this gives a warning.

    Args:
      root: Folder of the dataset.
      layout: Name in `LAYOUTS`; None detects it.
      prompt: medvlsm only: the prompt to use ("p6"). None uses the highest-numbered prompt that is
        not empty. If a prompt has several wordings, the first is used.
      percent: medclipseg only: a value of `PERCENTS`. Below 100, train and val are the published
        subsets, the workbooks {Train,Val}_text_PERCENT.xlsx; images without a row are left out.

    Returns:
      The examples, train before val before test, in file order within a split.

    Raises:
      DataError: The dataset is inconsistent; the message lists all problems at once.
    """
    root = _check_root(root)
    layout = layout or find_layout(root)
    if layout not in LAYOUTS:
        raise DataError(f"layout: found {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    if prompt is not None and layout != "medvlsm":
        raise DataError(
            f"prompt: found {prompt!r}; the {layout} layout has no prompts; remove "
            "--config.data.prompt."
        )
    _check_percent(percent, layout)
    options: dict[str, dict[str, Any]] = {
        "medvlsm": {"prompt": prompt},
        "medclipseg": {"percent": percent},
    }
    parsed = _READERS[layout](root, **options.get(layout, {}))
    allow_shared = layout == "medclipseg"
    if allow_shared:
        parsed = _drop_repeats(root, parsed)
    if problems := find_problems(parsed, allow_shared):
        raise combine_problems(f"{root}, as {layout} layout", problems)
    rows = sorted(parsed.rows, key=lambda row: SPLITS.index(row.split))
    if not rows:
        raise DataError(f"{root}: found no annotated image; expected at least one; add rows.")
    return [
        Example(image_stem(row.image), row.split, str(row.image), str(row.mask), row.text)
        for row in rows
    ]


def read_unlabelled(root: str | os.PathLike[str]) -> list[Example]:
    """Reads images without their masks, as examples of the training split.

    Args:
      root: A folder with one table (annotations.csv, or a single *.csv) that has the columns image
        and text but not mask: uses all its images, or the rows of train if it has a column split.
        Otherwise a dataset in any layout, of which the training split is used.

    Raises:
      DataError: See `read_layout`.
    """
    table = _csv_path(_check_root(root))
    if table is None or has_column(table, "mask"):
        train = [example for example in read_layout(root) if example.split == "train"]
        examples = [example._replace(mask_path="") for example in train]
    else:
        examples = _without_masks(Path(root), table)
    if not examples:
        raise DataError(f"{root}: found no image to train on; expected at least one; add some.")
    return examples


def _without_masks(root: Path, table: Path) -> list[Example]:
    lines = read_table(table, ("image", "text"), ("split",))
    lines = [(w, line) for w, line in lines if line.get("split", "").lower() in ("", "train")]
    lines, problems = refuse_unsafe(lines, ("image",))
    rows = [
        Row("train", _image_or_mask_path(root, "images", line["image"]), None, line["text"], where)
        for where, line in lines
    ]
    if problems := find_problems(ParsedLayout(rows, problems, [])):
        raise combine_problems(f"{root}, as images without masks", problems)
    return [Example(image_stem(row.image), row.split, str(row.image), "", row.text) for row in rows]


def _drop_repeats(root: Path, parsed: ParsedLayout) -> ParsedLayout:
    """Drops repeated rows, as some published datasets in this layout have, with a warning."""
    rows, repeated, shared = drop_repeats(parsed.rows)
    for names, problem in (
        (repeated, "with several rows; the first is used"),
        (shared, "in several splits; if the images are the same, scores include training images"),
    ):
        if names:
            listed = ", ".join(names[:MAX_LISTED])
            warnings.warn(f"{root}: {len(names)} image(s) {problem}: {listed}", stacklevel=4)
    return parsed._replace(rows=rows)


def _check_percent(percent: int, layout: str) -> None:
    if percent not in PERCENTS:
        known = ", ".join(map(str, PERCENTS))
        raise DataError(f"percent: found {percent}; expected one of {known}.")
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
    """Reads the published prompt variants of the same images, if the dataset has them.

    In medclipseg they are in Prompts_Folder/Test_text_NAME.xlsx (likewise Train and Val), in csv in
    columns of these names, with NAME in `annotations.VARIANTS`. Other layouts have none.

    Args:
      root: Folder of the dataset.
      examples: Result of `read_layout`.
      layout: Name in `LAYOUTS`; None detects it.
      percent: As in `read_layout`; below 100, skips the variants of images that are left out.

    Returns:
      {id: {NAME: prompt}} of the images that have any.

    Raises:
      DataError: A table cannot be read, names an unknown image, or names an image twice.
    """
    root = _check_root(root)
    readers = {"medclipseg": _medclipseg_variants, "csv": _csv_variants}
    layout = layout or find_layout(root)
    if layout not in readers:
        return {}
    variants, ids = readers[layout](root), {e.id for e in examples}
    if percent != 100:
        variants = [variant for variant in variants if variant.id in ids]
    prompts, problems = variants_by_id(variants, ids)
    if problems:
        raise combine_problems(f"{root}, as {layout} layout", problems)
    return prompts


def _check_root(root: str | os.PathLike[str]) -> Path:
    if os.path.isfile(root):
        raise DataError(f"{root}: found a file; expected the folder of a dataset; give that.")
    if not os.path.isdir(root):
        raise DataError(f"{root}: found no such folder; expected a dataset; check the path.")
    return Path(root)


def _lvit(root: Path) -> ParsedLayout:
    tables = {s: _table_path(root, s, f"{s.title()}_text.xlsx") for s in SPLITS}
    train_val = _table_path(root, "train", "Train_Val_text.xlsx")
    groups: list[tuple[tuple[Split, ...], Path]] = [((s,), table) for s, table in tables.items()]
    if train_val.is_file() and not (tables["train"].is_file() or tables["val"].is_file()):
        groups = [(("train", "val"), train_val), (("test",), tables["test"])]
    return join_layouts(
        _read_mask_table(table, {s: _split_folders(root, s, "labelcol") for s in splits})
        for splits, table in groups
    )


def _languide(root: Path) -> ParsedLayout:
    parts = []
    splits: tuple[Split, Split] = ("train", "test")
    for split in splits:
        folder = root / split.title()
        folders = {split: (list_images(folder / "Images"), list_images(folder / "GTs"))}
        parts.append(_read_mask_table(root / f"prompt/{split}.csv", folders))
    # LanGuideMedSeg validates on the last 20 % of its training file.
    rows = parts[0].rows
    first_val = int(0.8 * len(rows))
    rows[first_val:] = [row._replace(split="val") for row in rows[first_val:]]
    return join_layouts(parts)


def _read_mask_table(table: Path, folders: dict[Split, tuple[Folder, Folder]]) -> ParsedLayout:
    """Reads rows that name a mask; a row belongs to the first split whose folder has the mask."""
    try:
        lines = read_table(table, ("Image", "Description"))
    except DataError as error:
        # Without its table every image of a split would lack a row: report only the table.
        return ParsedLayout([], [str(error)], [])
    lines, problems = refuse_unsafe(lines, ("Image",))
    rows = []
    for where, line in lines:
        name = line["Image"]
        matches = [
            s for s, (_, masks) in folders.items() if find_file(masks, name).name in masks.names
        ]
        split = matches[0] if matches else next(iter(folders))
        images, masks = folders[split]
        # QaTa-COV19: the mask of covid_1.png is mask_covid_1.png; MosMedData+: the same name.
        image = find_file(images, name.removeprefix("mask_"), name)
        rows.append(Row(split, image, find_file(masks, name), line["Description"], where))
    return ParsedLayout(rows, problems, [images for images, _ in folders.values()])


def _medclipseg(root: Path, percent: int) -> ParsedLayout:
    parts = [ParsedLayout([], [], [])]
    for split in SPLITS:
        all_rows = percent == 100 or split == "test"
        name = f"{split.title()}_text{'' if all_rows else f'_{percent}'}.xlsx"
        table = root / "Prompts_Folder" / name
        original = table.with_name("Test_text_original.xlsx")
        table = original if split == "test" and original.is_file() else table
        images, masks = _split_folders(root, split, "label")
        if not (table.is_file() or images.names):
            continue  # a domain generalisation target may have only a test split
        part = _read_image_table(split, table, images, masks)
        # The images that a subset leaves out have no row and need none.
        parts.append(part if all_rows else part._replace(image_dirs=[]))
    return join_layouts(parts)


def _medclipseg_variants(root: Path) -> list[Variant]:
    variants = []
    for split in SPLITS:
        images, _ = _split_folders(root, split, "label")
        for name in VARIANTS:
            table = root / "Prompts_Folder" / f"{split.title()}_text_{name}.xlsx"
            lines = read_table(table, ("Image", "Description")) if table.is_file() else []
            variants += [
                Variant(
                    name, image_stem(find_file(images, line["Image"])), line["Description"], where
                )
                for where, line in lines
            ]
    return variants


def _read_image_table(split: Split, table: Path, images: Folder, masks: Folder) -> ParsedLayout:
    """Reads rows that name an image, and its mask if that has a different file name."""
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
        image, mask = (
            _image_or_mask_path(root, "images", line["image"]),
            _image_or_mask_path(root, "masks", line["mask"]),
        )
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


def _has_marker(root: Path, layout: str) -> bool:
    if layout == "csv":
        return _csv_path(root) is not None
    return (root / LAYOUTS[layout]).is_dir()


def _csv_path(root: Path) -> Path | None:
    default = root / "annotations.csv"
    tables = [default] if default.is_file() else list(root.glob("*.csv"))
    return tables[0] if len(tables) == 1 else None


def _table_path(root: Path, split: Split, name: str) -> Path:
    """Returns the path of an LViT workbook, in the split's folder or at the root."""
    inside, at_root = root / f"{split.title()}_Folder" / name, root / name
    return at_root if at_root.is_file() and not inside.is_file() else inside


def _image_or_mask_path(root: Path, folder: str, name: str) -> Path:
    """Resolves a name relative to `folder` or to the root; missing files keep the likelier path."""
    inside, at_root = root / folder / name, root / name
    relative_to_root = at_root.is_file() or name.startswith(f"{folder}/")
    return at_root if relative_to_root and not inside.is_file() else inside


def _split_folders(root: Path, split: Split, masks: str) -> tuple[Folder, Folder]:
    folder = root / f"{split.title()}_Folder"
    return list_images(folder / "img"), list_images(folder / masks)
