"""Other people's weight files, read without executing anything in them.

A file is opened by what it holds, not by its name; `open_checkpoint` checks every size its header
promises against the file, and the arrays stay on disk until each is read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from biclip_jax.errors import UserError

# What a folder may hold, the first one found is read.
FOLDER_ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".msgpack", ".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".index.json"

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
    """One array of a checkpoint, not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Checkpoint(NamedTuple):
    """The arrays of a weight file, or of the shards in a folder, by flat names.

    The names of torch and safetensors files are as written there, nested dicts joined by dots;
    those of Flax files are joined by "/".
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]


def open_checkpoint(path: Path) -> Checkpoint:
    """Lists the arrays of a weight file or a Hugging Face folder; none is read yet.

    Args:
      path: a safetensors, Flax msgpack or torch file, the index of a sharded one, or a folder
        with one of them (`FOLDER_ORDER`).

    Returns:
      The names, shapes and dtypes. `Tensor.read` opens the file again, so that only the arrays
      the caller holds are in memory; it raises UserError where the file changed meanwhile.

    Raises:
      UserError: nothing there, several files to choose from, a damaged file, a format or dtype
        not known here, or a pickle that asks for more than tensors and plain containers.
    """
    path = Path(path)
    with guard(path, "a weight file, or a folder with one"):
        chosen = _choose(path) if path.is_dir() else path
    return _open_index(chosen) if chosen.name.endswith(INDEX_SUFFIX) else _open_file(chosen)


def bad(path: Path, found: str, expected: str, mend: str) -> UserError:
    """The error for a file: its path, what was found, what was expected, and the mend."""
    return UserError(f"{path}: found {found}; expected {expected}; {mend}")


@contextlib.contextmanager
def guard(path: Path, expected: str) -> Iterator[None]:
    """Turns what reading a damaged file may raise into UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise bad(path, "no such file", expected, "check the name") from error
    except _MALFORMED as error:
        # Decoders quote the file in their messages.
        reason = ascii(str(error))[1:-1][:200]
        found = f"a file that cannot be read ({type(error).__name__}: {reason})"
        raise bad(path, found, expected, "it may be damaged, download or copy it again") from error


def num_bytes(shape: Iterable[Any], dtype: np.dtype) -> int:
    """The bytes of an array; ValueError for what is not a shape."""
    axes = tuple(shape)
    if len(axes) > MAX_AXES or not all(type(n) is int and 0 <= n <= MAX_AXIS for n in axes):
        raise ValueError("no shape of an array")
    return math.prod(axes) * dtype.itemsize


def read_range(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads a C-contiguous array at an offset of a file; UserError where the file ends early."""
    with guard(path, f"{shape} {dtype} at byte {start}"), open(path, "rb") as file:
        array = np.empty(shape, dtype)
        file.seek(start)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise EOFError("the file became shorter")
        return array


def _choose(folder: Path) -> Path:
    """The file of a folder that is read; UserError where that is not clear."""
    for name in FOLDER_ORDER:
        if (folder / name).is_file():
            return folder / name
    with guard(folder, "a readable folder"):
        names = sorted(item.name for item in folder.iterdir())
    others = [name for name in names if name.endswith(SUFFIXES) and (folder / name).is_file()]
    if len(others) == 1:
        return folder / others[0]
    shown = ", ".join((others or names)[:8]) + (", ..." if len(others or names) > 8 else "")
    raise bad(
        folder,
        f"{len(others)} weight files in the folder ({shown or 'it is empty'})",
        f"one of {', '.join(FOLDER_ORDER)}, or one other file of {' '.join(SUFFIXES)}",
        "name the file itself" if others else "download the weights into it",
    )


def _open_file(path: Path) -> Checkpoint:
    from biclip_jax.weights import torch_files

    expected = "a safetensors, Flax msgpack or torch file"
    with guard(path, expected):
        if not path.exists():
            raise FileNotFoundError(path)
        if not path.is_file():
            raise ValueError("not a regular file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    kind = _kind(path, head, size, expected)
    with guard(path, f"a {kind} file"):
        if kind == "safetensors":
            tensors = _safetensors(path, size)
        elif kind == "flax":
            tensors = _flax(path, size)
        else:
            tensors = torch_files.read(path, size)
        if not tensors:
            raise bad(path, f"a {kind} file without any array", "a model's weights", "export again")
        return Checkpoint(path, kind, tensors)


def _kind(path: Path, head: bytes, size: int, expected: str) -> str:
    """The format ("safetensors", "flax", "torch"), by the first bytes, then by the suffix."""
    if not head:
        raise bad(path, "an empty file", expected, "download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        mend = "run `git lfs pull` in its folder, or download the file itself"
        raise bad(path, "a git-lfs pointer, not the weights", expected, mend)
    if head[257:262] == b"ustar":
        mend = "load and save it again with a current torch"
        raise bad(path, "a tar file (torch before 0.1.10)", expected, mend)
    if head.startswith(b"PK") or (head[0] == 0x80 and 1 <= int.from_bytes(head[1:2]) <= 5):
        return "torch"
    if 2 <= int.from_bytes(head[:8], "little") <= size - 8 and head[8:9] == b"{":
        return "safetensors"
    if head[0] < 0x80 and not re.search(rb"[^\t\n\f\r -\xff]", head):
        quoted = ascii(head[:40].decode("latin-1"))
        raise bad(path, f"a text file that begins {quoted}", expected, "download the file itself")
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix == ".msgpack" or 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return "flax"
    raise bad(path, "a file of another kind", expected, "give the file of weights")


def _open_index(index: Path) -> Checkpoint:
    """A sharded checkpoint by its index {"weight_map": {name: file}}."""
    shards = _weight_map(index)
    opened = {}
    for shard in sorted(set(shards.values())):
        if not (index.parent / shard).is_file():
            mend = "download the missing shards into the folder"
            raise bad(index, f"the shard {shard}, which is not in the folder", "every shard", mend)
        opened[shard] = _open_file(index.parent / shard)
    formats = {checkpoint.format for checkpoint in opened.values()}
    held = Counter(name for checkpoint in opened.values() for name in checkpoint.tensors)
    mend = "download the index and its shards again, from one version"
    if len(formats) != 1:
        raise bad(index, f"shards of {len(formats)} formats", "shards of one format", mend)
    twice = [name for name, times in held.items() if times > 1]
    if twice:
        raise bad(index, f"{twice[0]} in more than one shard", "every array once", mend)
    for name, shard in shards.items():
        if name not in opened[shard].tensors:
            raise bad(index, f"{name} listed in {shard}", f"it in {shard}, which lacks it", mend)
    tensors = {name: opened[shard].tensors[name] for name, shard in shards.items()}
    return Checkpoint(index.parent, formats.pop(), tensors)


def _weight_map(index: Path) -> dict[str, str]:
    expected = 'an index {"weight_map": {name: file}}'
    with guard(index, expected):
        with open(index, "rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON} bytes")
        shards = json.loads(text, object_pairs_hook=_once)["weight_map"]
        if not isinstance(shards, dict) or not shards:
            raise ValueError("an empty weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"(?!\.)[^/\\\0]+", shard):
            mend = "get the index from where the shards came from"
            raise bad(index, f"the shard {ascii(shard)[:80]}", "a plain file name", mend)
    return shards


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _safetensors(path: Path, size: int) -> dict[str, Tensor]:
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
    header = json.loads(text, object_pairs_hook=_once)
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: _safetensor(path, start, size - start, name, entry) for name, entry in header.items()
    }


def _safetensor(path: Path, start: int, size: int, name: str, entry: dict[str, Any]) -> Tensor:
    # The library's numpy side has no bfloat16 in its older versions, so the bytes are read here.
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        expected = ", ".join(SAFETENSORS_DTYPES)
        raise bad(path, f"{name} of dtype {entry['dtype']}", expected, "convert it to F32 or BF16")
    dtype, shape = DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= size or end - begin != num_bytes(shape, dtype):
        raise ValueError(f"{name} lies outside the file")
    return Tensor(shape, dtype, partial(read_range, path, start + begin, shape, dtype))


def _flax(path: Path, size: int) -> dict[str, Tensor]:
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
        mend = "save the parameters as real arrays"
        raise bad(path, f"a msgpack extension of code {code}", "1 (array) or 3 (scalar)", mend)
    end = _within(file, length, size)
    (_, fields), (kind, rank) = _msgpack_head(file), _msgpack_head(file)
    if fields != 3 or kind != "array" or rank > MAX_AXES:
        raise ValueError("no packed array")
    shape = tuple(_msgpack_head(file)[1] for _ in range(rank))
    name = _text(file, size)
    if name not in DTYPES:
        mend = "save the parameters as numbers"
        raise bad(path, f"an array of dtype {ascii(name)[:40]}", ", ".join(DTYPES), mend)
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
