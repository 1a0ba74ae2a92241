"""Converts checkpoints of other frameworks by the tables of `keys`, with a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.weights import keys
from biclip_jax.weights.formats.tensor import Tensor
from biclip_jax.weights.readers import Checkpoint

MAX_LISTED = 5  # names in an error or a line

# From PyTorch's axis order to that of our parameters.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "same": lambda x: x,
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(2, 3, 1, 0),
    "conv_transpose": lambda x: x.transpose(2, 3, 0, 1),
    "patches": lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    "depthwise": lambda x: x[:, 0].transpose(1, 2, 0),
    "flat": lambda x: x.reshape(-1),
    "first": lambda x: x[0],
}
FLOATS = ("float32", "float16", "bfloat16", "float64")
RANKS = {
    "linear": 2,
    "conv": 4,
    "conv_transpose": 4,
    "patches": 4,
    "depthwise": 4,
    "flat": 3,
    "first": 3,
}


class Report(NamedTuple):
    """What a conversion did with every array.

    Attributes:
      loaded: Our parameters that were filled.
      reshaped: The parameters in `loaded` that were transposed or concatenated from several arrays.
      unused: Arrays of the checkpoint without a counterpart, each known to be unnecessary.
      fresh: Our parameters that are not in the checkpoint.
    """

    loaded: tuple[str, ...]
    reshaped: tuple[str, ...]
    unused: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} loaded, of which {len(self.reshaped)} reshaped"
        lines = [f"{counts}; {len(self.unused)} unused, {len(self.fresh)} fresh"]
        for kind, names in (("unused", self.unused), ("fresh", self.fresh)):
            lines += [f"{kind}: {_listed(names)}"] if names else []
        return "\n".join(lines)


class Converted(NamedTuple):
    """A model converted from another framework.

    Attributes:
      config: Config of the model, for its `build`.
      variables: {"params/...": array}, float32.
      report: Report of the conversion.
    """

    config: dict[str, Any]
    variables: dict[str, np.ndarray]
    report: Report


def load(
    path: Path,
    tensors: dict[str, Tensor],
    table: keys.Table,
    expected: Mapping[str, tuple[int, ...]],
    unused: Iterable[str],
) -> tuple[dict[str, np.ndarray], Report]:
    """Loads every parameter of a table, in float32.

    Args:
      path: Path of the checkpoint, for errors.
      tensors: {name in the checkpoint: tensor}; emptied while loading, so that no array is held
        twice.
      table: {our name: rule}.
      expected: {our name: shape} of the complete model.
      unused: Patterns of names in the checkpoint that are known to be unnecessary.

    Returns:
      {our name: array}, and the report.

    Raises:
      UserError: Arrays are missing, unexpected, or of the wrong shape; the message names them.
    """
    ignored = re.compile("|".join(unused) or r"(?!)")
    required = {source for rule in table.values() for source in rule.sources}
    unused_names = sorted(
        name for name in tensors if ignored.fullmatch(name) and name not in required
    )
    _refuse(path, sorted(required - tensors.keys()), "missing", "give the whole checkpoint")
    unexpected = sorted(tensors.keys() - required - set(unused_names))
    _refuse(path, unexpected, "not used by this model", "give the kind that fits the file")
    for name in unused_names:
        del tensors[name]
    variables, reshaped = {}, []
    for name, rule in table.items():
        sources = [tensors.pop(source) for source in rule.sources]
        variables[name] = _read_parameter(path, rule, sources, name, expected.get(name))
        if rule.layout != "same" or len(sources) > 1:
            reshaped.append(name)
    fresh = tuple(sorted(expected.keys() - variables.keys()))
    return variables, Report(tuple(variables), tuple(reshaped), tuple(unused_names), fresh)


def _refuse(path: Path, names: list[str], problem: str, fix: str) -> None:
    if names:
        verb = "are" if len(names) > 1 else "is"
        raise UserError(f"{path}: {_listed(names)} {verb} {problem}; {fix}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{', '.join(names[:MAX_LISTED])}{more}"


def _read_parameter(
    path: Path,
    rule: keys.Rule,
    sources: list[Tensor],
    name: str,
    shape: tuple[int, ...] | None,
) -> np.ndarray:
    rank = RANKS.get(rule.layout)
    arrays = []
    for source_name, source in zip(rule.sources, sources, strict=True):
        if rank is not None and len(source.shape) != rank:
            raise UserError(
                f"{path}: {source_name} has shape {source.shape}; expected {rank} axes; "
                "the file belongs to another model"
            )
        arrays.append(LAYOUTS[rule.layout](_read_array(path, source_name, source)))
    can_join = len({part.shape[:-1] for part in arrays}) == 1
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1) if can_join else None
    if array is None or array.shape != shape:
        found = ", ".join(str(source.shape) for source in sources)
        raise UserError(
            f"{path}: {', '.join(rule.sources)} has shape {found}, which does not make {name} "
            f"{shape}; the file belongs to another model"
        )
    # ascontiguousarray would add an axis to a scalar.
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _read_array(path: Path, name: str, source: Tensor) -> np.ndarray:
    if source.dtype.name not in FLOATS:
        raise UserError(
            f"{path}: {name} is of {source.dtype.name}; expected one of {', '.join(FLOATS)}; "
            "give weights that are not quantized"
        )
    array = source.read().astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UserError(
            f"{path}: {name} contains NaN or infinity; the file is damaged, get it again"
        )
    return array


def standard_names(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Returns the arrays with PyTorch's names and axis order, without prefixes of wrappers."""
    tensors = dict(checkpoint.tensors)
    if checkpoint.format == "flax":
        tensors = dict(_from_flax(name, tensor) for name, tensor in tensors.items())
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # Names of LayerNorm's parameters before 2019.
    renamed = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for old_suffix, new_suffix in renamed.items():
        tensors = {
            name.removesuffix(old_suffix) + new_suffix
            if name.endswith(old_suffix)
            else name: tensor
            for name, tensor in tensors.items()
        }
    return tensors


def _from_flax(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    *parents, leaf = name.split("/")
    order = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(tensor.shape))
    if leaf == "kernel" and order is not None:
        read = tensor.read
        shape = tuple(tensor.shape[axis] for axis in order)
        tensor = Tensor(shape, tensor.dtype, lambda: read().transpose(order))
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    return ".".join((*parents, leaf)), tensor
