"""Reads safetensors files; every size in the header is checked against the file."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

from biclip_jax.weights.formats.tensor import (
    DTYPES,
    MAX_JSON,
    SAFETENSORS_DTYPES,
    Tensor,
    file_error,
    num_bytes,
    read_range,
    unique_keys,
)


def read(path: Path, size: int) -> dict[str, Tensor]:
    """Lists the arrays of a safetensors file of `size` bytes."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_JSON, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    header = json.loads(text, object_pairs_hook=unique_keys)
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: _open_tensor(path, start, size - start, name, entry) for name, entry in header.items()
    }


def _open_tensor(path: Path, start: int, size: int, name: str, entry: dict[str, Any]) -> Tensor:
    # Older versions of the library do not support bfloat16 in numpy, so the bytes are read here.
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        expected = ", ".join(SAFETENSORS_DTYPES)
        raise file_error(
            path, f"{name} of dtype {entry['dtype']}", expected, "convert it to F32 or BF16"
        )
    dtype, shape = DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= size or end - begin != num_bytes(shape, dtype):
        raise ValueError(f"{name} is outside the file")
    return Tensor(shape, dtype, partial(read_range, path, start + begin, shape, dtype))
