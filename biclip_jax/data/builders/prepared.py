"""Prepared datasets: verified by their checksums, opened by path.

TFDS is imported inside the functions, so that importing `biclip_jax.data` stays fast.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biclip_jax.core.errors import DataError
from biclip_jax.data.builders import single_file
from biclip_jax.data.schema import Record, Split

CHECKSUMS = "checksums.json"


def write_checksums(path: Path) -> None:
    """Writes the SHA-256 of every file of a finished folder to its `checksums.json`."""
    checksums = {file.name: _sha256(file) for file in sorted(path.iterdir())}
    (path / CHECKSUMS).write_text(json.dumps(checksums, indent=2))


def verify(path: str | os.PathLike[str]) -> None:
    """Compares every file of a prepared folder with its checksum.

    Raises:
      DataError: A file is damaged or missing; the message names it.
    """
    path = Path(path)
    fix = f"delete the folder {path} and prepare the dataset again."
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path / CHECKSUMS}: cannot be read ({error}); expected checksums; {fix}"
        ) from error
    for name, checksum in expected.items():
        file = path / name
        found = _sha256(file) if file.is_file() else "no file"
        if found != checksum:
            raise DataError(f"{file}: found {found}; expected SHA-256 {checksum}; {fix}")


class PreparedSplit(Sequence[Record]):
    """The records of one split, read from disk on access; can be pickled."""

    def __init__(self, source: Any):
        """Wraps a sequence of examples whose images are PNG bytes, such as a TFDS data source."""
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        from biclip_jax.data.builders import records

        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a split of {len(self)}")
        return records.decode(self.source[index % len(self)])

    def ids(self) -> list[str]:
        """Returns all ids without decoding any image."""
        return [self.source[index]["id"].decode() for index in range(len(self))]


def open_split(path: str | os.PathLike[str], split: Split) -> PreparedSplit:
    """Opens a split of a prepared folder or of a single file; does not need the source.

    Args:
      path: Folder or file returned by `prepare`, or file written by `single_file.write`.
      split: "train", "val" or "test".

    Returns:
      A sequence of Records, see `schema.Record`, in the order of the source.

    Raises:
      DataError: The folder is not a prepared dataset, or lacks the split.
    """
    if single_file.is_prepared_file(path):
        return PreparedSplit(single_file.examples(Path(path), split))
    import tensorflow_datasets as tfds

    from biclip_jax.data.builders import records

    if not (Path(path) / CHECKSUMS).is_file():
        raise DataError(
            f"{path}: found no prepared dataset; expected {CHECKSUMS}; prepare the dataset again."
        )
    builder = tfds.builder_from_directory(path)
    if split not in builder.info.splits:
        present = ", ".join(builder.info.splits)
        raise DataError(
            f"{path}: found the splits {present}, as in the dataset that it was prepared from; "
            f"expected {split!r}; assign images of the dataset to that split."
        )
    decoders = {name: tfds.decode.SkipDecoding() for name in records.IMAGE_FIELDS}
    return PreparedSplit(builder.as_data_source(split=split, decoders=decoders))


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
