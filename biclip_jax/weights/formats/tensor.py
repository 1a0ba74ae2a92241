"""Arrays of a weight file that are read on demand, and errors for damaged files."""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from biclip_jax.core.errors import UserError

MAX_JSON = 16 * 2**20
MAX_NODES = 2**20
MAX_DEPTH = 32
MAX_AXES = 32
MAX_AXIS = 2**40

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


DTYPES = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    for name in SAFETENSORS_DTYPES.values()
}


_MALFORMED = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


class Tensor(NamedTuple):
    """One array of a checkpoint; `read` loads it from disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def file_error(path: Path, found: str, expected: str, fix: str) -> UserError:
    """Returns the error for a file: what was found, what was expected, and the fix."""
    return UserError(f"{path}: found {found}; expected {expected}; {fix}")


@contextlib.contextmanager
def convert_errors(path: Path, expected: str) -> Iterator[None]:
    """Turns the errors of reading a damaged file into UserErrors."""
    try:
        yield
    except FileNotFoundError as error:
        raise file_error(path, "no such file", expected, "check the name") from error
    except _MALFORMED as error:
        # Decoders quote the file in their messages: escape and truncate them.
        reason = ascii(str(error))[1:-1][:200]
        found = f"a file that cannot be read ({type(error).__name__}: {reason})"
        raise file_error(
            path, found, expected, "it may be damaged, download or copy it again"
        ) from error


def num_bytes(shape: Iterable[Any], dtype: np.dtype) -> int:
    """Returns the number of bytes of an array; raises ValueError for an invalid shape."""
    axes = tuple(shape)
    if len(axes) > MAX_AXES or not all(type(n) is int and 0 <= n <= MAX_AXIS for n in axes):
        raise ValueError("not the shape of an array")
    return math.prod(axes) * dtype.itemsize


def read_range(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads a C-contiguous array at a file offset; raises UserError if the file is too short."""
    with convert_errors(path, f"{shape} {dtype} at byte {start}"), open(path, "rb") as file:
        array = np.empty(shape, dtype)
        file.seek(start)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise EOFError("the file is shorter than before")
        return array


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)
