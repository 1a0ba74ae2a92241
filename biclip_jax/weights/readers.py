"""Reads weight files of other frameworks without executing anything in them.

The format is detected from the content, not from the name. `open_checkpoint` checks every size in a
header against the file. Arrays stay on disk until they are read individually.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from biclip_jax.weights.formats import msgpack, safetensors, torch_zip
from biclip_jax.weights.formats.tensor import (
    MAX_JSON,
    Tensor,
    convert_errors,
    file_error,
    unique_keys,
)

# File names to look for in a folder; the first match is read.
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


class Checkpoint(NamedTuple):
    """The arrays of a weight file, or of a folder's shards, by flat names.

    Names in torch and safetensors files stay unchanged, with nested dicts joined by dots; those of
    Flax files are joined by "/".
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]


def open_checkpoint(path: Path) -> Checkpoint:
    """Lists the arrays of a weight file or a Hugging Face folder without reading them.

    Args:
      path: A safetensors, Flax msgpack or torch file, the index of a sharded one, or a folder
        with one of them (`FOLDER_ORDER`).

    Returns:
      The names, shapes and dtypes. `Tensor.read` opens the file again, so that only the arrays
      that the caller holds are in memory; it raises UserError if the file has changed since.

    Raises:
      UserError: No file exists, several files are possible, the file is damaged, its format or a
        dtype is unknown, or a pickle requires more than tensors and plain containers.
    """
    path = Path(path)
    with convert_errors(path, "a weight file, or a folder with one"):
        weight_file = _find_weight_file(path) if path.is_dir() else path
    return (
        _open_index(weight_file)
        if weight_file.name.endswith(INDEX_SUFFIX)
        else _open_file(weight_file)
    )


def _find_weight_file(folder: Path) -> Path:
    """Returns the weight file of a folder; raises UserError if it is ambiguous."""
    for name in FOLDER_ORDER:
        if (folder / name).is_file():
            return folder / name
    with convert_errors(folder, "a readable folder"):
        names = sorted(item.name for item in folder.iterdir())
    matches = [name for name in names if name.endswith(SUFFIXES) and (folder / name).is_file()]
    if len(matches) == 1:
        return folder / matches[0]
    shown = ", ".join((matches or names)[:8]) + (", ..." if len(matches or names) > 8 else "")
    raise file_error(
        folder,
        f"{len(matches)} weight files in the folder ({shown or 'it is empty'})",
        f"one of {', '.join(FOLDER_ORDER)}, or one other file of {' '.join(SUFFIXES)}",
        "name the file itself" if matches else "download the weights into it",
    )


def _open_file(path: Path) -> Checkpoint:
    expected = "a safetensors, Flax msgpack or torch file"
    with convert_errors(path, expected):
        if not path.exists():
            raise FileNotFoundError(path)
        if not path.is_file():
            raise ValueError("not a regular file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    kind = _detect_format(path, head, size, expected)
    with convert_errors(path, f"a {kind} file"):
        if kind == "safetensors":
            tensors = safetensors.read(path, size)
        elif kind == "flax":
            tensors = msgpack.read(path, size)
        else:
            tensors = torch_zip.read(path, size)
        if not tensors:
            raise file_error(
                path,
                f"a {kind} file without any array",
                "a model's weights",
                "export the file again",
            )
        return Checkpoint(path, kind, tensors)


def _detect_format(path: Path, head: bytes, size: int, expected: str) -> str:
    """Returns "safetensors", "flax" or "torch", from the first bytes or else the suffix."""
    if not head:
        raise file_error(path, "an empty file", expected, "download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        fix = "run `git lfs pull` in its folder, or download the file itself"
        raise file_error(path, "a git-lfs pointer, not the weights", expected, fix)
    if head[257:262] == b"ustar":
        fix = "load and save it again with a current torch"
        raise file_error(path, "a tar file (torch before 0.1.10)", expected, fix)
    if head.startswith(b"PK") or (head[0] == 0x80 and 1 <= int.from_bytes(head[1:2]) <= 5):
        return "torch"
    if 2 <= int.from_bytes(head[:8], "little") <= size - 8 and head[8:9] == b"{":
        return "safetensors"
    if head[0] < 0x80 and not re.search(rb"[^\t\n\f\r -\xff]", head):
        quoted = ascii(head[:40].decode("latin-1"))
        raise file_error(
            path, f"a text file that begins {quoted}", expected, "download the file itself"
        )
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix == ".msgpack" or 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return "flax"
    raise file_error(path, "a file of another kind", expected, "give a weight file")


def _open_index(index: Path) -> Checkpoint:
    """Opens a sharded checkpoint by its index {"weight_map": {name: file}}."""
    shards = _weight_map(index)
    checkpoints = {}
    for shard in sorted(set(shards.values())):
        if not (index.parent / shard).is_file():
            fix = "download the missing shards into the folder"
            raise file_error(
                index, f"the shard {shard}, which is not in the folder", "every shard", fix
            )
        checkpoints[shard] = _open_file(index.parent / shard)
    formats = {checkpoint.format for checkpoint in checkpoints.values()}
    counts = Counter(name for checkpoint in checkpoints.values() for name in checkpoint.tensors)
    fix = "download the index and its shards again, from one version"
    if len(formats) != 1:
        raise file_error(index, f"shards of {len(formats)} formats", "shards of one format", fix)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise file_error(index, f"{repeated[0]} in more than one shard", "every array once", fix)
    for name, shard in shards.items():
        if name not in checkpoints[shard].tensors:
            raise file_error(
                index, f"{name}, which {shard} does not contain", "every array in its shard", fix
            )
    tensors = {name: checkpoints[shard].tensors[name] for name, shard in shards.items()}
    return Checkpoint(index.parent, formats.pop(), tensors)


def _weight_map(index: Path) -> dict[str, str]:
    expected = 'an index {"weight_map": {name: file}}'
    with convert_errors(index, expected):
        with open(index, "rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON} bytes")
        shards = json.loads(text, object_pairs_hook=unique_keys)["weight_map"]
        if not isinstance(shards, dict) or not shards:
            raise ValueError("an empty weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"(?!\.)[^/\\\0]+", shard):
            fix = "download index and shards from the same source"
            raise file_error(index, f"the shard {ascii(shard)[:80]}", "a plain file name", fix)
    return shards
