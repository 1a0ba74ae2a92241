"""A prepared dataset as a single file, for machines without TFDS and the source.

The file is a NumPy archive, which NumPy alone can read. For every split and field it contains the
concatenated bytes of all examples (PNG or UTF-8) and their end offsets, and the facts that identify
the dataset as JSON.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax.core import files
from biclip_jax.core.errors import DataError
from biclip_jax.data.schema import SPLITS, Split

SUFFIX = ".npz"
FIX = "expected a prepared dataset; write it again with `biclip prepare`."
FIELDS = ("id", "image", "mask", "full_mask", "text", "variants")


def is_prepared_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path has the suffix of such a file."""
    return Path(path).suffix == SUFFIX


def write(
    path: Path, splits: Mapping[Split, Sequence[Mapping[str, Any]]], facts: Mapping[str, Any]
) -> None:
    """Writes the file; an existing one is replaced at the end.

    Args:
      path: Path of the file, with the suffix `.npz`.
      splits: {split: examples as returned by `records.encode`, or as read by TFDS}.
      facts: JSON values that `check` compares.
    """
    arrays: dict[str, Any] = {"facts": np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8)}
    for split, examples in splits.items():
        for field in FIELDS:
            parts = [_bytes(example[field]) for example in examples]
            arrays[f"{split}/{field}"] = np.frombuffer(b"".join(parts), np.uint8)
            lengths = [len(part) for part in parts]
            arrays[f"{split}/{field}_ends"] = np.cumsum(lengths, dtype=np.int64)
    with files.atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def verify(path: Path) -> None:
    """Compares the contents of a file with the checksums in it.

    Raises:
      DataError: The file is damaged.
    """
    fix = "delete the file to prepare the dataset again."
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); {fix}") from error
    if damaged is not None:
        raise DataError(f"{path}: found a wrong checksum of {damaged}; {fix}")


def check(path: Path, expected: Mapping[str, Any]) -> None:
    """Compares the facts of a file with the expected ones.

    Raises:
      DataError: The file is missing, damaged, or another dataset.
    """
    try:
        facts = json.loads(_read(path, ["facts"])["facts"].tobytes())
    except ValueError as error:
        raise DataError(f"{path}: its facts are not JSON ({error}); {FIX}") from error
    for name, value in expected.items():
        if facts.get(name) != value:
            raise DataError(
                f"{path}: found {name} {facts.get(name)!r}; expected {value!r}; write the file "
                "again with `biclip prepare`, or change the config."
            )


def examples(path: Path, split: Split) -> list[dict[str, bytes]]:
    """Reads the examples of a split, for `records.decode`.

    Raises:
      DataError: The file is missing or damaged, or lacks the split.
    """
    if split not in SPLITS:
        raise DataError(f"{path}: found the split {split!r}; expected one of {SPLITS}.")
    names = [f"{split}/{field}{part}" for field in FIELDS for part in ("", "_ends")]
    arrays = _read(path, names)
    columns = {}
    for field in FIELDS:
        data, ends = arrays[f"{split}/{field}"].tobytes(), arrays[f"{split}/{field}_ends"]
        starts = np.concatenate([[0], ends[:-1]])
        columns[field] = [data[a:b] for a, b in zip(starts, ends, strict=True)]
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except KeyError as error:
        raise DataError(f"{path}: found no {error.args[0]}; {FIX}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); {FIX}") from error


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else value.getvalue()
