"""Reads files of torch.save and torch.jit.save without torch and without unpickling."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from biclip_jax.weights.formats import pickle_machine
from biclip_jax.weights.formats.tensor import (
    Tensor,
    convert_errors,
    file_error,
    num_bytes,
    read_range,
)

MAX_PICKLE = 64 * 2**20
MAX_NODES = 2**20
MAX_NAME = 1000
MAX_READ = 16 * 2**20
CHUNK = 2**20
# Weights hardly compress; a large array with a higher ratio is a decompression bomb.
MAX_RATIO, SMALL = 64, 2**20

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
FIX = "get the weights as safetensors, or save only the model's state_dict() again"


class _Region(NamedTuple):
    """Location of a storage: at `start` of the file, or compressed in a zip member."""

    start: int
    num_bytes: int
    member: str | None = None


def read(path: Path, size: int) -> dict[str, Tensor]:
    """Returns the arrays of a torch file by their dotted names.

    Call it within `tensor.convert_errors`.

    Args:
      path: A zip file (torch.save, torch.jit.save) or a file in the format before torch 1.6.
      size: Size of the file in bytes.

    Returns:
      The arrays of the state dict, or of the one under "state_dict" or "model", or of the
      TorchScript module, including arrays that are plain attributes.

    Raises:
      UserError: The pickle requires more than tensors and plain containers.
      ValueError, OSError, LookupError, ...: The file is damaged, see `tensor.convert_errors`.
    """
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        saved, regions = (_read_zip if is_zip else _read_legacy)(path, size)
        views = _flatten(_state_dict(saved))
    except pickle_machine.UnsupportedPickle as error:
        raise file_error(
            path, f"a pickle that {error}; nothing was executed", "a file of tensors only", FIX
        ) from error
    if not views:
        expected = 'a state dict, or one under "state_dict" or "model"'
        raise file_error(path, "no tensors by name in it", expected, FIX)
    return {name: _tensor(path, size, view, regions) for name, view in views.items()}


# The two container formats.


def _read_zip(path: Path, size: int) -> tuple[Any, dict[str, _Region]]:
    with _CappedFile(path) as file, zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("a zip member occurs twice")
        folder = _find_folder(path, list(members))
        order = members.get(f"{folder}byteorder")
        if order is not None and _read_member(archive, order, 16) != b"little":
            fix = "load and save it again on a little-endian machine"
            raise file_error(path, "another byte order than little", "little-endian", fix)
        pickle_bytes = _read_member(archive, members[f"{folder}data.pkl"], MAX_PICKLE)
        storages: dict[str, pickle_machine.Storage] = {}
        saved = pickle_machine.interpret(io.BytesIO(pickle_bytes), storages)
        regions = {
            key: _region(file, size, storage, members[f"{folder}data/{key}"])
            for key, storage in storages.items()
        }
    return saved, regions


class _CappedFile(io.FileIO):
    """A file that never reads more than MAX_READ at once, whatever a header states."""

    def read(self, length: int | None = -1, /) -> bytes:
        if length is None or length < 0:
            length = os.fstat(self.fileno()).st_size - self.tell()
        if length > MAX_READ:
            raise ValueError("a directory or a member of excessive size")
        return super().read(length)


def _find_folder(path: Path, names: list[str]) -> str:
    """Returns the archive's top folder, with its slash."""
    folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    folders = [folder for folder in folders if folder.count("/") == 1]
    if len(folders) != 1:
        shown = ", ".join(ascii(name)[1:60] for name in sorted(names)[:4]) or "nothing"
        expected = "NAME/data.pkl, as written by torch.save and torch.jit.save"
        raise file_error(path, f"a zip archive with {shown}", expected, "give a weight file")
    return folders[0]


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    if info.file_size > limit:
        raise ValueError(f"{info.file_size} bytes of pickle, more than any model")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("a pickle compressed in a way torch does not support")
    with archive.open(info) as member:
        # zipfile reads no further than the size in the directory.
        return b"".join(iter(partial(member.read, CHUNK), b""))


def _region(
    file: BinaryIO | io.FileIO, size: int, storage: pickle_machine.Storage, info: zipfile.ZipInfo
) -> _Region:
    expected_size = storage.length * storage.dtype.itemsize
    if expected_size != info.file_size or info.flag_bits & 1:
        raise ValueError(f"a storage of {expected_size} bytes in a member of {info.file_size}")
    if info.compress_type == zipfile.ZIP_DEFLATED:
        if expected_size > SMALL and expected_size > MAX_RATIO * info.compress_size:
            raise ValueError(
                f"{expected_size} bytes compressed to {info.compress_size}, not weights"
            )
        return _Region(0, expected_size, info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != expected_size:
        raise ValueError("a storage compressed in a way torch does not support")
    file.seek(info.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    start = info.header_offset + 30 + name_length + extra_length
    if signature != b"PK\3\4" or start + expected_size > size:
        raise ValueError("a storage outside the file")
    return _Region(start, expected_size)


def _read_legacy(path: Path, size: int) -> tuple[Any, dict[str, _Region]]:
    storages: dict[str, pickle_machine.Storage] = {}
    with open(path, "rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE))
        load = partial(pickle_machine.interpret, head)
        if load({}) != MAGIC:
            fix = "save the model's state_dict() with torch.save"
            raise file_error(path, "a pickle that torch did not write", "torch's magic number", fix)
        if load({}) != PROTOCOL or load({})["little_endian"] is not True:
            fix = "load and save it again with a current torch"
            raise file_error(
                path, "another protocol or byte order", f"{PROTOCOL}, little-endian", fix
            )
        saved, keys = load(storages), load({})
        if sorted(keys) != sorted(storages):
            raise ValueError("different storages at the end than in the pickle")
        regions = {}
        file.seek(head.tell())
        for key in keys:
            (length,) = struct.unpack("<q", file.read(8))
            region = _Region(file.tell(), length * storages[key].dtype.itemsize)
            if length != storages[key].length or region.start + region.num_bytes > size:
                raise ValueError("a storage of a different size than in the pickle")
            regions[key] = region
            file.seek(region.num_bytes, io.SEEK_CUR)
        if file.tell() != size:
            raise ValueError(f"{size - file.tell()} bytes after the end")
    return saved, regions


# From the saved object to names.


def _state_dict(saved: Any) -> dict[Any, Any]:
    if not isinstance(saved, dict):
        raise pickle_machine.UnsupportedPickle(
            f"holds a {pickle_machine.kind_of(saved)}, not a dict"
        )
    is_wrapper = type(saved) is dict and not any(
        isinstance(v, pickle_machine.View) for v in saved.values()
    )
    for key in ("state_dict", "model"):
        if is_wrapper and isinstance(saved.get(key), dict):
            return saved[key]
    return saved


def _flatten(state: dict[Any, Any]) -> dict[str, pickle_machine.View]:
    """Returns the tensors of nested dicts by dotted names, in order; drops everything else."""
    views: dict[str, pickle_machine.View] = {}
    pending: list[tuple[str, Any]] = [("", state)]
    visited = 0
    while pending:
        name, node = pending.pop()
        if isinstance(node, pickle_machine.View):
            if name in views:
                raise ValueError(f"{name} occurs twice")
            views[name] = node
        elif isinstance(node, dict):
            visited += len(node)
            if visited > MAX_NODES or len(name) > MAX_NAME:
                raise ValueError("nested or repeated more than any model")
            dot = "." if name else ""
            children = [(key, value) for key, value in node.items() if isinstance(key, str | int)]
            pending.extend((f"{name}{dot}{key}", value) for key, value in reversed(children))
    return views


def _tensor(
    path: Path, size: int, view: pickle_machine.View, regions: dict[str, _Region]
) -> Tensor:
    storage = view.storage
    region = regions[storage.key]
    if num_bytes(view.shape, storage.dtype) > max(size, region.num_bytes):
        raise ValueError(f"a tensor of shape {view.shape}, larger than the file")
    return Tensor(view.shape, storage.dtype, partial(_read, path, region, view))


def _read(path: Path, region: _Region, view: pickle_machine.View) -> np.ndarray:
    dtype = view.storage.dtype
    start = view.offset * dtype.itemsize
    with convert_errors(path, f"a tensor of shape {view.shape}"):
        if 0 in view.shape:
            return np.empty(view.shape, dtype)
        if region.member is None:
            buffer = read_range(path, region.start + start, (view.span,), dtype)
        else:
            buffer = _decompress(path, region.member, start, np.empty(view.span, dtype))
        # `_rebuild` has checked that the last element is within the span.
        return as_strided(buffer, view.shape, [step * dtype.itemsize for step in view.strides])


def _decompress(path: Path, name: str, start: int, array: np.ndarray) -> np.ndarray:
    """Fills the array from byte `start` of a compressed zip member."""
    target = array.view(np.uint8).data
    num_filled = 0
    with _CappedFile(path) as file, zipfile.ZipFile(file) as archive, archive.open(name) as member:
        member.seek(start)
        while chunk := member.read(min(len(target) - num_filled, CHUNK)):
            target[num_filled : num_filled + len(chunk)] = chunk
            num_filled += len(chunk)
    if num_filled != len(target):
        raise EOFError("a zip member ends early")
    return array
