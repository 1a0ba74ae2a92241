"""From prepared records to batches: shuffled by seed, sharded by process, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax import places
from biclip_jax.data import builders, subsets
from biclip_jax.data import text as text_lib
from biclip_jax.data.schema import SPLITS, Batch, Record, Split
from biclip_jax.errors import UserError


def prepare(config: Mapping[str, Any], image_size: int) -> Path:
    """Prepares the data set where needed; returns its folder.

    Args:
      config: the fields of `data` in `configs/common.py`.
      image_size: of the prepared pictures, in pixels.

    Raises:
      DataError: the data set does not hold together.
    """
    sizes = {split: n for split, n in config["num_examples"].items() if n}
    return builders.prepare(
        config["name"],
        data_dir=config["cache_dir"] or places.cache_dir(),
        image_size=image_size,
        source_dir=config["source"] or None,
        layout=config["layout"] or None,
        prompt=config["prompt"] or None,
        percent=config["percent"],
        resize=config["resize"],
        num_examples=sizes or None,
    )


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
    opened: dict[str, Sequence[Record]] = {
        split: builders.open_split(prepared, split) for split in names
    }
    if "train" in opened and config["label_fraction"] != 1:
        rows, _ = _shares(opened["train"], config)
        opened["train"] = [opened["train"][row] for row in rows]
    return {split: _as_configured(records, config) for split, records in opened.items()}


def open_unlabelled(prepared: Path, config: Mapping[str, Any], image_size: int) -> Sequence[Record]:
    """The pictures that are trained on without their masks; see `data.unlabelled`.

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
        records = builders.open_split(prepare(other, image_size), "train")
        return _as_configured(records, config)
    train = builders.open_split(prepared, "train")
    _, rest = _shares(train, config)
    if not rest:
        raise UserError(
            f"--config.data.unlabelled: 'rest', but data.label_fraction "
            f"{config['label_fraction']} leaves no training picture; lower it"
        )
    return _as_configured([train[row] for row in rest], config)


def _shares(train: Sequence[Record], config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Rows with labels and rows without."""
    ids = [record["id"] for record in train]
    rows = subsets.labelled(ids, config["label_fraction"], config["label_seed"])
    return rows, sorted(set(range(len(ids))) - set(rows))


def _as_configured(records: Sequence[Record], config: Mapping[str, Any]) -> Sequence[Record]:
    if config["in_memory"] or config["sentences"] == "missing":
        records = list(records)
    if config["sentences"] == "missing":
        records = [Record({**record, "text": ""}) for record in records]
    return records


def sentence_fields(
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]], sentences: Sequence[str]
) -> dict[str, np.ndarray]:
    """The sentence fields of a `Batch`, for a whole split; the mirrored sentences' included.

    Args:
      encode: sentences -> text_ids and text_mask, or text_features, (N, ...) each.
      sentences: of the split.
    """
    mirrored = encode([text_lib.mirror(sentence) for sentence in sentences])
    return encode(sentences) | {f"mirrored_{name}": values for name, values in mirrored.items()}


def train_batches(
    records: Sequence[Record],
    texts: dict[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    position: dict[str, Any] | None = None,
    num_labelled: int | None = None,
    labelled_rows: int | None = None,
    num_members: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Any:
    """An endless iterator of `Batch`es, each epoch in another order.

    The order depends on the seed alone; each process reads its own rows of
    every global batch. Batches run across the edges of epochs, so that every
    record is met once an epoch. Of unlabelled records the masks are left out.

    Args:
      records: of the split, the labelled ones first.
      texts: `sentence_fields` of the same rows.
      batch_size: global, divisible by `process_count`.
      seed: of the order.
      num_labelled: of the records; None: all.
      labelled_rows: first rows of every batch, of labelled records; None: all.
      num_members: of an ensemble; above 1 a batch has a leading axis of them, the
        k-th being the batch of seed + k.
      position: what `get_state()` of an earlier iterator gave; goes on there.
      process_index, process_count: of this host.

    Returns:
      A grain iterator: `next`, `get_state`, `set_state`.
    """
    import grain

    share = batch_size // process_count
    local = slice(process_index * share, (process_index + 1) * share)
    row = np.arange(batch_size, dtype=np.int32)[local]
    num_labelled = len(records) if num_labelled is None else num_labelled
    labelled_rows = batch_size if labelled_rows is None else labelled_rows

    def read(index: np.ndarray) -> Batch:
        batch = _stack(records, texts, index[local], row)
        known = row < labelled_rows
        mask = np.where(known[:, None, None, None], batch["mask"], 0).astype(np.uint8)
        return {**batch, "mask": mask, "labelled": known}

    def member(seed: int) -> Any:
        indices = _order(0, num_labelled, labelled_rows, seed)
        if labelled_rows < batch_size:
            others = _order(num_labelled, len(records), batch_size - labelled_rows, seed)
            indices = indices.map_with_index(lambda i, rows: np.concatenate([rows, others[i]]))
        return indices.map(read)

    members = [member(seed + k) for k in range(num_members)]
    batches = members[0]
    if num_members > 1:
        clock = grain.MapDataset.range(1).repeat()
        batches = clock.map_with_index(lambda i, _: _together([one[i] for one in members]))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(batches.to_iter_dataset(options))
    if position is not None:
        iterator.set_state(position)
    return iterator


def _order(start: int, stop: int, rows: int, seed: int) -> Any:
    """The rows of every batch, each epoch in another order; without an end."""
    import grain

    return grain.MapDataset.range(start, stop).shuffle(seed=seed).repeat().batch(rows)


def _together(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """The batches of an ensemble's members, stacked."""
    fields: list[dict[str, Any]] = [dict(batch) for batch in batches]
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
        "image_hash": subsets.hash_ids([r["id"] for r in rows]),
        "valid": np.ones(len(rows), bool),
        **{name: values[index] for name, values in texts.items()},
    }
