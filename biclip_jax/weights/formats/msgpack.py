"""Reads Flax msgpack files; arrays stay on disk until they are read individually."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from biclip_jax.weights.formats.tensor import (
    DTYPES,
    MAX_AXES,
    MAX_DEPTH,
    MAX_NODES,
    Tensor,
    file_error,
    num_bytes,
    read_range,
)

# First byte of a msgpack value -> its kind, and the struct code of its length (or number).
_MSGPACK = {
    **{0xC4 + i: ("bytes", code) for i, code in enumerate("BHI")},
    **{0xC7 + i: ("ext", code) for i, code in enumerate("BHI")},
    **{0xCA + i: ("number", code) for i, code in enumerate("fdBHIQbhiq")},
    **{0xD9 + i: ("text", code) for i, code in enumerate("BHI")},
    **{0xDC + i: ("array", code) for i, code in enumerate("HI")},
    **{0xDE + i: ("map", code) for i, code in enumerate("HI")},
}

_CHUNKED = "__msgpack_chunked_array__"


def read(path: Path, size: int) -> dict[str, Tensor]:
    """Lists the arrays of a file written by flax.serialization.msgpack_serialize.

    The values are traversed here, because msgpack's own reader loads every array into memory.
    """
    with open(path, "rb") as file:
        tree = _read_node(path, file, size, 0, itertools.count())
        if file.tell() != size:
            raise ValueError(f"{size - file.tell()} bytes after the end")
    if not isinstance(tree, dict):
        raise ValueError("the root is not a map")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flatten(tree, ()):
        if name in tensors:
            raise ValueError(f"{name} occurs twice")
        tensors[name] = tensor
    return tensors


def _read_node(path: Path, file: BinaryIO, size: int, depth: int, count: Iterator[int]) -> Any:
    """Returns the msgpack value at the file's position: a dict, a Tensor, a number or None."""
    if depth > MAX_DEPTH or next(count) > MAX_NODES:
        raise ValueError("nested or repeated more than any model")
    kind, value = _read_head(file)
    if kind == "number":
        return value
    if kind == "ext":
        return _read_array(path, file, size, value)
    if kind in ("text", "bytes"):
        file.seek(_end_of(file, value, size))
        return None
    children: dict[str, Any] = {}
    for i in range(value):
        name = _read_text(file, size) if kind == "map" else str(i)
        if name in children:
            raise ValueError("a name occurs twice")
        children[name] = _read_node(path, file, size, depth + 1, count)
    return _join_chunks(children) if _CHUNKED in children else children


def _read_head(file: BinaryIO) -> tuple[str, Any]:
    """Returns (kind, length or number) of the next value; does not read its content."""
    first = file.read(1)[0]
    if first < 0x80 or first >= 0xE0:
        return "number", first if first < 0x80 else first - 256
    if first < 0xC0:
        kind = "map" if first < 0x90 else "array" if first < 0xA0 else "text"
        return kind, first & (31 if kind == "text" else 15)
    if first in (0xC0, 0xC2, 0xC3):
        return "number", None
    if 0xD4 <= first <= 0xD8:
        return "ext", 1 << (first - 0xD4)
    kind, code = _MSGPACK[first]
    return kind, struct.unpack(f">{code}", file.read(struct.calcsize(code)))[0]


def _end_of(file: BinaryIO, length: int, size: int) -> int:
    """Returns the position after the next `length` bytes; raises ValueError past the file's end."""
    end = file.tell() + length
    if end > size:
        raise ValueError(f"{length} bytes expected, {size - file.tell()} left")
    return end


def _read_text(file: BinaryIO, size: int) -> str:
    kind, length = _read_head(file)
    if kind not in ("text", "bytes") or length > 1000:
        raise ValueError("expected a short text as a name")
    _end_of(file, length, size)
    return file.read(length).decode()


def _read_array(path: Path, file: BinaryIO, size: int, length: int) -> Tensor:
    """Returns the array or scalar of an extension value, packed as (shape, dtype name, bytes)."""
    code = file.read(1)[0]
    if code not in (1, 3):
        fix = "save the parameters as real arrays"
        raise file_error(
            path, f"a msgpack extension of code {code}", "1 (array) or 3 (scalar)", fix
        )
    end = _end_of(file, length, size)
    (_, fields), (kind, rank) = _read_head(file), _read_head(file)
    if fields != 3 or kind != "array" or rank > MAX_AXES:
        raise ValueError("not a packed array")
    shape = tuple(_read_head(file)[1] for _ in range(rank))
    name = _read_text(file, size)
    if name not in DTYPES:
        fix = "save the parameters as numbers"
        raise file_error(path, f"an array of dtype {ascii(name)[:40]}", ", ".join(DTYPES), fix)
    dtype = DTYPES[name]
    data_size = _read_head(file)[1]
    start = file.tell()
    if start + data_size != end or data_size != num_bytes(shape, dtype):
        raise ValueError("an array whose size does not fit its shape")
    file.seek(end)
    return Tensor(shape, dtype, partial(read_range, path, start, shape, dtype))


def _join_chunks(node: dict[str, Any]) -> Tensor:
    """Joins an array that Flax split into flat chunks, as msgpack's values end at 4 GiB."""
    shape = tuple(node["shape"][str(i)] for i in range(len(node["shape"])))
    chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
    dtype = chunks[0].dtype
    if {chunk.dtype for chunk in chunks} != {dtype}:
        raise ValueError("chunks of several dtypes")
    if sum(num_bytes(chunk.shape, dtype) for chunk in chunks) != num_bytes(shape, dtype):
        raise ValueError("chunks whose sizes do not fit their array")
    return Tensor(shape, dtype, partial(_read_chunks, chunks, shape, dtype))


def _read_chunks(chunks: list[Tensor], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = np.empty(math.prod(shape), dtype)
    start = 0
    for chunk in chunks:
        part = chunk.read().reshape(-1)
        array[start : start + part.size] = part
        start += part.size
    return array.reshape(shape)


def _flatten(tree: dict[str, Any], parents: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield "/".join((*parents, name)), value
        elif isinstance(value, dict):
            yield from _flatten(value, (*parents, name))
