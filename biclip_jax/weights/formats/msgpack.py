"""Reads Flax msgpack files; the arrays stay on disk until each is read."""

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

# First byte of a msgpack value -> its kind, and how the length (or the number) after it is packed.
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
    """The arrays of flax.serialization.msgpack_serialize.

    The values are walked here, because msgpack's own reader holds every array it passes.
    """
    with open(path, "rb") as file:
        tree = _node(path, file, size, 0, itertools.count())
        if file.tell() != size:
            raise ValueError(f"{size - file.tell()} bytes after the end")
    if not isinstance(tree, dict):
        raise ValueError("the root is no map")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flat(tree, ()):
        if name in tensors:
            raise ValueError(f"{name} is there twice")
        tensors[name] = tensor
    return tensors


def _node(path: Path, file: BinaryIO, size: int, depth: int, count: Iterator[int]) -> Any:
    """The msgpack value at the file's position: a dict, a Tensor, a number or None."""
    if depth > MAX_DEPTH or next(count) > MAX_NODES:
        raise ValueError("nested or repeated more than any model")
    kind, value = _msgpack_head(file)
    if kind == "number":
        return value
    if kind == "ext":
        return _flax_array(path, file, size, value)
    if kind in ("text", "bytes"):
        file.seek(_within(file, value, size))
        return None
    below: dict[str, Any] = {}
    for i in range(value):
        name = _text(file, size) if kind == "map" else str(i)
        if name in below:
            raise ValueError("a name is there twice")
        below[name] = _node(path, file, size, depth + 1, count)
    return _joined(below) if _CHUNKED in below else below


def _msgpack_head(file: BinaryIO) -> tuple[str, Any]:
    """(kind, length or number) of the next value; what follows is not read."""
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


def _within(file: BinaryIO, length: int, size: int) -> int:
    """The position after the next `length` bytes, which must be there."""
    end = file.tell() + length
    if end > size:
        raise ValueError(f"{length} bytes promised, {size - file.tell()} there")
    return end


def _text(file: BinaryIO, size: int) -> str:
    kind, length = _msgpack_head(file)
    if kind not in ("text", "bytes") or length > 1000:
        raise ValueError("no short text where a name belongs")
    _within(file, length, size)
    return file.read(length).decode()


def _flax_array(path: Path, file: BinaryIO, size: int, length: int) -> Tensor:
    """The array or scalar packed as (shape, dtype name, bytes) in an extension value."""
    code = file.read(1)[0]
    if code not in (1, 3):
        fix = "save the parameters as real arrays"
        raise file_error(
            path, f"a msgpack extension of code {code}", "1 (array) or 3 (scalar)", fix
        )
    end = _within(file, length, size)
    (_, fields), (kind, rank) = _msgpack_head(file), _msgpack_head(file)
    if fields != 3 or kind != "array" or rank > MAX_AXES:
        raise ValueError("no packed array")
    shape = tuple(_msgpack_head(file)[1] for _ in range(rank))
    name = _text(file, size)
    if name not in DTYPES:
        fix = "save the parameters as numbers"
        raise file_error(path, f"an array of dtype {ascii(name)[:40]}", ", ".join(DTYPES), fix)
    dtype = DTYPES[name]
    held = _msgpack_head(file)[1]
    start = file.tell()
    if start + held != end or held != num_bytes(shape, dtype):
        raise ValueError("an array of another size than its shape")
    file.seek(end)
    return Tensor(shape, dtype, partial(read_range, path, start, shape, dtype))


def _joined(node: dict[str, Any]) -> Tensor:
    """An array that Flax cut into flat chunks, because msgpack's values end at 4 GiB."""
    shape = tuple(node["shape"][str(i)] for i in range(len(node["shape"])))
    chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
    dtype = chunks[0].dtype
    if {chunk.dtype for chunk in chunks} != {dtype}:
        raise ValueError("chunks of several dtypes")
    if sum(num_bytes(chunk.shape, dtype) for chunk in chunks) != num_bytes(shape, dtype):
        raise ValueError("chunks of another size than their array")
    return Tensor(shape, dtype, partial(_read_chunks, chunks, shape, dtype))


def _read_chunks(chunks: list[Tensor], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = np.empty(math.prod(shape), dtype)
    start = 0
    for chunk in chunks:
        part = chunk.read().reshape(-1)
        array[start : start + part.size] = part
        start += part.size
    return array.reshape(shape)


def _flat(tree: dict[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield "/".join((*above, name)), value
        elif isinstance(value, dict):
            yield from _flat(value, (*above, name))
