"""From prepared records to batches: shuffled by seed, sharded by process, resumable."""

from __future__ import annotations

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
    """Prepares the data set where needed; returns its folder.

    Args:
      config: the fields of `data` in `configs/common.py`.
      image_size: of the prepared pictures, in pixels.
      labelled: false for training pictures whose masks are not used, see `preparation.prepare`.

    A source that is one file (`write_file`) is its own prepared set.

    Raises:
      DataError: the data set does not hold together.
    """
    if single_file.is_prepared_file(config["source"]):
        single_file.check(Path(config["source"]), _facts(config, image_size))
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
    """Writes all splits of a data set as one file; returns {split: number of records}.

    Args:
      config, image_size: as for `prepare`.
      path: of the file.

    Raises:
      DataError: the data set does not hold together.
    """
    prepared = prepare(config, image_size)
    splits = {split: open_split(prepared, split).source for split in SPLITS}
    single_file.write(path, splits, _facts(config, image_size))
    return {split: len(examples) for split, examples in splits.items()}


def _facts(config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """What makes a prepared set another one, but for the source itself."""
    names = ("name", "layout", "prompt", "percent", "resize")
    return {"image_size": image_size, **{name: config[name] for name in names}}


def open_splits(
    prepared: Path, config: Mapping[str, Any], names: Sequence[Split] = SPLITS
) -> dict[str, Sequence[Record]]:
    """The splits of a prepared folder, {split: records}.

    Args:
      prepared: what `prepare` returned.
      config: the fields of `data` in `configs/common.py`.
      names: of the splits that are wanted.

    Raises:
      DataError: a split is missing.
    """
    opened: dict[str, Sequence[Record]] = {}
    for split in names:
        records = open_split(prepared, split)
        opened[split] = records
        if split == "train" and config["label_fraction"] != 1:
            labelled, _ = _shares(records.ids(), config)
            opened[split] = [records[row] for row in labelled]
    return {split: _as_configured(records, config) for split, records in opened.items()}


def open_unlabelled(prepared: Path, config: Mapping[str, Any], image_size: int) -> Sequence[Record]:
    """The pictures that are trained on without their masks, which are empty; `data.unlabelled`.

    Args:
      prepared, image_size: what `prepare` returned and was given.
      config: the fields of `data` in `configs/common.py`.

    Raises:
      UserError: nothing is left beside the labelled share.
      DataError: the other data set does not hold together.
    """
    if not config["unlabelled"]:
        return []
    if config["unlabelled"] != "rest":
        other = {**config, "name": "folder", "source": config["unlabelled"], "layout": ""}
        other |= {"prompt": "", "percent": 100, "num_examples": {}}
        records = open_split(prepare(other, image_size, labelled=False), "train")
        return _as_configured([_without_mask(record) for record in records], config)
    train = open_split(prepared, "train")
    _, rest = _shares(train.ids(), config)
    if not rest:
        raise UserError(
            f"--config.data.unlabelled: 'rest', but data.label_fraction "
            f"{config['label_fraction']} leaves no training picture; lower it"
        )
    return _as_configured([_without_mask(train[row]) for row in rest], config)


def _without_mask(record: Record) -> Record:
    mask, full_mask = np.zeros_like(record["mask"]), np.zeros_like(record["full_mask"])
    return Record({**record, "mask": mask, "full_mask": full_mask})


def join_records(labelled: Sequence[Record], unlabelled: Sequence[Record]) -> Sequence[Record]:
    """Both, labelled ones first; beside pictures in colour grey ones have three channels, too."""
    if not unlabelled:
        return labelled
    records = [*labelled, *unlabelled]
    shapes = {record["image"].shape for record in records}
    if len(shapes) == 1:
        return records
    coloured = max(shapes)
    return [
        Record({**record, "image": np.broadcast_to(record["image"], coloured)})
        for record in records
    ]


def _shares(ids: Sequence[str], config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Rows with labels and rows without."""
    rows = label_subset.select_rows(ids, config["label_fraction"], config["label_seed"])
    return rows, sorted(set(range(len(ids))) - set(rows))


def _as_configured(records: Sequence[Record], config: Mapping[str, Any]) -> Sequence[Record]:
    if config["in_memory"] or config["text_condition"] == "empty":
        records = list(records)
    if config["text_condition"] == "empty":
        records = [Record({**record, "text": ""}) for record in records]
    return records


def text_fields(
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]], prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """The sentence fields of a `Batch`, for a whole split; the mirrored sentences' included.

    Args:
      encode: sentences -> text_ids and text_mask, or text_features, (N, ...) each.
      sentences: of the split.
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
    """step -> `index`, `row` and `labelled` of that step's `Batch`, see `order`.

    The order depends on the seed alone; each process has its own rows of every global batch.

    Args:
      num_records: of the split, the labelled ones first.
      batch_size: global, divisible by `process_count`.
      seed: of the order.
      num_labelled: of the records; None: all.
      labelled_rows: first rows of every batch, of labelled records; None: all.
      num_members: of an ensemble; above 1 the rows have a leading axis of them, the
        k-th being those of seed + k.
      process_index, process_count: of this host.
    """
    share = batch_size // process_count
    local = slice(process_index * share, (process_index + 1) * share)
    row = np.arange(batch_size, dtype=np.int32)[local]
    labelled_rows = batch_size if labelled_rows is None else labelled_rows
    counts = (num_records if num_labelled is None else num_labelled, labelled_rows)

    def member(step: int, seed: int) -> dict[str, np.ndarray]:
        index = sampler.training_rows(step, batch_size, num_records, seed, *counts)[local]
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
    """An endless iterator of `Batch`es, read ahead.

    Args:
      records: of the split.
      texts: `text_fields` of the same rows.
      rows: what `training_order` returned.
      start: the first step.
    """
    import grain

    def read(picked: Mapping[str, np.ndarray]) -> Batch:
        batch = _stack(records, texts, picked["index"], picked["row"])
        return {**batch, "labelled": picked["labelled"]}

    def batch_of(step: int) -> Any:
        picked = rows(step)
        if picked["index"].ndim == 1:
            return read(picked)
        members = range(len(picked["index"]))
        return _stack_members([read({name: x[k] for name, x in picked.items()}) for k in members])

    steps = grain.MapDataset.range(1).repeat()
    batches = steps.map_with_index(lambda i, _: batch_of(start + i))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(batches.to_iter_dataset(options))


def stack_split(
    records: Sequence[Record], texts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """All pictures and masks of a split at the model's size, and its sentences, by record."""
    return {
        "image": np.stack([record["image"] for record in records]),
        "mask": np.stack([record["mask"] for record in records]),
        **texts,
    }


def _stack_members(batches: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What an ensemble's members have each, stacked."""
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
    """Every row once, in order, in equal batches; rows that only fill have `valid` false.

    Each process gets its share of every global batch, and all of them the same
    number of batches.
    """
    share = batch_size // process_count
    for start in range(0, len(records), batch_size):
        row = np.arange(process_index * share, (process_index + 1) * share, dtype=np.int32)
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
