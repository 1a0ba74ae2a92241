"""Prepared records to batches: shuffled by seed, sharded by process, resumable."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax.core import files
from biclip_jax.core.errors import UserError
from biclip_jax.data import label_subset, sampler
from biclip_jax.data import text as text_lib
from biclip_jax.data.builders import preparation, single_file
from biclip_jax.data.builders.prepared import open_split
from biclip_jax.data.schema import SPLITS, Batch, Record, Split


def prepare(config: Mapping[str, Any], image_size: int, labelled: bool = True) -> Path:
    """Prepares the dataset if needed and returns its folder or file.

    A source that is a single file (see `write_file`) is already prepared; its path is returned.

    Args:
      config: Fields of `data` in `configs/common.py`.
      image_size: Side of the prepared images in pixels.
      labelled: False for training images whose masks are not used, see `preparation.prepare`.

    Raises:
      DataError: The dataset is inconsistent.
    """
    if single_file.is_prepared_file(config["source"]):
        single_file.check(Path(config["source"]), _file_facts(config, image_size))
        return Path(config["source"])
    sizes = {split: n for split, n in config["num_examples"].items() if n}
    return preparation.prepare(
        config["name"],
        data_dir=config["cache_dir"] or files.cache_dir(),
        image_size=image_size,
        source_dir=config["source"] or None,
        layout=config["layout"] or None,
        prompt=config["prompt"] or None,
        percent=config["percent"],
        resize=config["resize"],
        num_examples=sizes or None,
        labelled=labelled,
    )


def write_file(config: Mapping[str, Any], image_size: int, path: Path) -> dict[str, int]:
    """Writes all splits of a dataset to one file; returns {split: number of records}.

    Args:
      config, image_size: See `prepare`.
      path: Path of the file.

    Raises:
      DataError: The dataset is inconsistent.
    """
    prepared = prepare(config, image_size)
    splits = {split: open_split(prepared, split).source for split in SPLITS}
    single_file.write(path, splits, _file_facts(config, image_size))
    return {split: len(examples) for split, examples in splits.items()}


def _file_facts(config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Returns all settings that identify a prepared dataset, except its source."""
    names = ("name", "layout", "prompt", "percent", "resize")
    return {"image_size": image_size, **{name: config[name] for name in names}}


def open_splits(
    prepared: Path, config: Mapping[str, Any], names: Sequence[Split] = SPLITS
) -> dict[str, Sequence[Record]]:
    """Opens splits of a prepared folder, {split: records}.

    Args:
      prepared: Result of `prepare`.
      config: Fields of `data` in `configs/common.py`.
      names: Splits to open.

    Raises:
      DataError: A split is missing.
    """
    splits: dict[str, Sequence[Record]] = {}
    for split in names:
        records = open_split(prepared, split)
        splits[split] = records
        if split == "train" and config["label_fraction"] != 1:
            labelled_rows, _ = _split_by_label(records.ids(), config)
            splits[split] = [records[row] for row in labelled_rows]
    return {split: _apply_config(records, config) for split, records in splits.items()}


def open_unlabelled(prepared: Path, config: Mapping[str, Any], image_size: int) -> Sequence[Record]:
    """Opens the training images that are used without their masks (`data.unlabelled`).

    Their masks are empty.

    Args:
      prepared: Result of `prepare`.
      config: Fields of `data` in `configs/common.py`.
      image_size: Side of the prepared images in pixels.

    Raises:
      UserError: No image remains outside the labelled subset.
      DataError: The dataset named by `data.unlabelled` is inconsistent.
    """
    if not config["unlabelled"]:
        return []
    if config["unlabelled"] != "rest":
        other = {**config, "name": "folder", "source": config["unlabelled"], "layout": ""}
        other |= {"prompt": "", "percent": 100, "num_examples": {}}
        records = open_split(prepare(other, image_size, labelled=False), "train")
        return _apply_config([_without_mask(record) for record in records], config)
    train = open_split(prepared, "train")
    _, unlabelled_rows = _split_by_label(train.ids(), config)
    if not unlabelled_rows:
        raise UserError(
            f"--config.data.unlabelled: 'rest', but data.label_fraction "
            f"{config['label_fraction']} leaves no training image; lower it"
        )
    return _apply_config([_without_mask(train[row]) for row in unlabelled_rows], config)


def _without_mask(record: Record) -> Record:
    mask, full_mask = np.zeros_like(record["mask"]), np.zeros_like(record["full_mask"])
    return Record({**record, "mask": mask, "full_mask": full_mask})


def join_records(labelled: Sequence[Record], unlabelled: Sequence[Record]) -> Sequence[Record]:
    """Joins records, labelled first; repeats greyscale channels if any image has colour."""
    if not unlabelled:
        return labelled
    records = [*labelled, *unlabelled]
    shapes = {record["image"].shape for record in records}
    if len(shapes) == 1:
        return records
    shape = max(shapes)
    return [
        Record({**record, "image": np.broadcast_to(record["image"], shape)}) for record in records
    ]


def _split_by_label(ids: Sequence[str], config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Returns the rows with labels and the rows without."""
    rows = label_subset.select_rows(ids, config["label_fraction"], config["label_seed"])
    return rows, sorted(set(range(len(ids))) - set(rows))


def _apply_config(records: Sequence[Record], config: Mapping[str, Any]) -> Sequence[Record]:
    if config["in_memory"] or config["text_condition"] == "empty":
        records = list(records)
    if config["text_condition"] == "empty":
        records = [Record({**record, "text": ""}) for record in records]
    return records


def text_fields(
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]], prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns the text fields of a `Batch` for a whole split, including the swapped prompts'.

    Args:
      encode: Maps prompts to text_ids and text_mask, or to text_features, (N, ...) each.
      prompts: Prompts of the split.
    """
    swapped = encode([text_lib.swap_sides(prompt) for prompt in prompts])
    return encode(prompts) | {f"swapped_{name}": values for name, values in swapped.items()}


def training_order(
    num_records: int,
    *,
    batch_size: int,
    seed: int,
    num_labelled: int | None = None,
    labelled_rows: int | None = None,
    num_members: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], dict[str, np.ndarray]]:
    """Returns a function from step to `index`, `row` and `labelled` of its `Batch`.

    The order depends only on the seed, see `sampler`; each process gets its own rows of every
    global batch.

    Args:
      num_records: Size of the split, labelled records first.
      batch_size: Global batch size, divisible by `process_count`.
      seed: Seed of the order.
      num_labelled: Number of labelled records; None means all.
      labelled_rows: Number of leading rows of each batch that are labelled; None means all.
      num_members: Number of ensemble members. Above 1 the arrays have a leading member axis, and
        member k uses seed + k.
      process_index, process_count: Index of this process and number of processes.
    """
    local_size = batch_size // process_count
    local_slice = slice(process_index * local_size, (process_index + 1) * local_size)
    row = np.arange(batch_size, dtype=np.int32)[local_slice]
    labelled_rows = batch_size if labelled_rows is None else labelled_rows
    counts = (num_records if num_labelled is None else num_labelled, labelled_rows)

    def member(step: int, seed: int) -> dict[str, np.ndarray]:
        index = sampler.training_rows(step, batch_size, num_records, seed, *counts)[local_slice]
        return {"index": index.astype(np.int32), "row": row, "labelled": row < labelled_rows}

    def rows(step: int) -> dict[str, np.ndarray]:
        members = [member(step, seed + k) for k in range(num_members)]
        return _stack_members(members) if num_members > 1 else members[0]

    return rows


def train_batches(
    records: Sequence[Record],
    texts: Mapping[str, np.ndarray],
    rows: Callable[[int], dict[str, np.ndarray]],
    start: int = 0,
) -> Iterator[Batch]:
    """Returns an endless iterator of `Batch`es, prefetched if grain is installed.

    Args:
      records: Records of the split.
      texts: `text_fields` of the same records.
      rows: Result of `training_order`.
      start: First step.
    """

    def load_batch(selection: Mapping[str, np.ndarray]) -> Batch:
        batch = _stack(records, texts, selection["index"], selection["row"])
        return {**batch, "labelled": selection["labelled"]}

    def batch_at(step: int) -> Any:
        selection = rows(step)
        if selection["index"].ndim == 1:
            return load_batch(selection)
        members = range(len(selection["index"]))
        return _stack_members(
            [load_batch({name: x[k] for name, x in selection.items()}) for k in members]
        )

    if importlib.util.find_spec("grain") is None:
        return map(batch_at, itertools.count(start))
    import grain

    steps = grain.MapDataset.range(1).repeat()
    batches = steps.map_with_index(lambda i, _: batch_at(start + i))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(batches.to_iter_dataset(options))


def stack_split(
    records: Sequence[Record], texts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Stacks a split's images and masks at the model's size, with its text fields."""
    return {
        "image": np.stack([record["image"] for record in records]),
        "mask": np.stack([record["mask"] for record in records]),
        **texts,
    }


def _stack_members(batches: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Stacks the batches of an ensemble's members."""
    fields = [dict(batch) for batch in batches]
    return {name: np.stack([batch[name] for batch in fields]) for name in fields[0]}


def eval_batches(
    records: Sequence[Record],
    texts: dict[str, np.ndarray],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields every record once, in order, in batches of equal size; padding has `valid` false.

    Each process gets its part of every global batch; all processes get the same number of batches.
    """
    local_size = batch_size // process_count
    for start in range(0, len(records), batch_size):
        row = np.arange(
            process_index * local_size, (process_index + 1) * local_size, dtype=np.int32
        )
        index = start + row
        valid = index < len(records)
        batch = _stack(records, texts, np.where(valid, index, 0), row)
        yield {**batch, "valid": valid}


def _stack(records, texts, index, row) -> Batch:
    rows = [records[int(i)] for i in index]
    return {
        "image": np.stack([r["image"] for r in rows]),
        "mask": np.stack([r["mask"] for r in rows]),
        "row": row,
        "index": np.asarray(index, np.int32),
        "image_hash": label_subset.hash_ids([r["id"] for r in rows]),
        "valid": np.ones(len(rows), bool),
        **{name: values[index] for name, values in texts.items()},
    }
