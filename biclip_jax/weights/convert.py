"""Foreign checkpoints to our variables, by the tables of `keys`, with a report."""

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

SHOWN = 5  # names in an error or a line

# From PyTorch's order of axes to ours.
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
    """What became of every array.

    Attributes:
      loaded: our parameters that were filled.
      reshaped: those of `loaded` whose axes were moved or which join several arrays.
      unused: foreign arrays without a counterpart, each known to be needless.
      fresh: our parameters that the checkpoint does not have.
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
    """A model out of a foreign checkpoint.

    Attributes:
      config: of the model, as its `build` takes it.
      variables: {"params/...": array}, float32.
      report: what was loaded.
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
    """Fills every parameter of the table, in float32.

    Args:
      path: of the checkpoint, for errors.
      tensors: emptied on the way, so that no array is held twice.
      table: {our name: rule}.
      expected: {our name: shape} of the whole model.
      unused: patterns of the foreign names that are known to be needless.

    Returns:
      {our name: array}, and the report.

    Raises:
      UserError: naming the arrays that are missing, too many, or misshapen.
    """
    needless = re.compile("|".join(unused) or r"(?!)")
    wanted = {source for rule in table.values() for source in rule.sources}
    left_out = sorted(name for name in tensors if needless.fullmatch(name) and name not in wanted)
    _require(path, sorted(wanted - tensors.keys()), "missing", "give the whole checkpoint")
    surplus = sorted(tensors.keys() - wanted - set(left_out))
    _require(path, surplus, "of no use in this model", "give the kind that fits the file")
    for name in left_out:
        del tensors[name]
    variables, reshaped = {}, []
    for name, rule in table.items():
        sources = [tensors.pop(source) for source in rule.sources]
        variables[name] = _parameter(path, rule, sources, name, expected.get(name))
        if rule.layout != "same" or len(sources) > 1:
            reshaped.append(name)
    fresh = tuple(sorted(expected.keys() - variables.keys()))
    return variables, Report(tuple(variables), tuple(reshaped), tuple(left_out), fresh)


def _require(path: Path, wrong: list[str], what: str, fix: str) -> None:
    if wrong:
        verb = "are" if len(wrong) > 1 else "is"
        raise UserError(f"{path}: {_listed(wrong)} {verb} {what}; {fix}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _parameter(
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
        arrays.append(LAYOUTS[rule.layout](_read(path, source_name, source)))
    fits = len({array.shape[:-1] for array in arrays}) == 1
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1) if fits else None
    if joined is None or joined.shape != shape:
        found = ", ".join(str(source.shape) for source in sources)
        raise UserError(
            f"{path}: {', '.join(rule.sources)} has shape {found}, which does not make {name} "
            f"{shape}; the file belongs to another model"
        )
    # ascontiguousarray would give a scalar an axis.
    return joined if joined.flags.c_contiguous else np.ascontiguousarray(joined)


def _read(path: Path, name: str, source: Tensor) -> np.ndarray:
    if source.dtype.name not in FLOATS:
        raise UserError(
            f"{path}: {name} is of {source.dtype.name}; expected one of {', '.join(FLOATS)}; "
            "give weights that are not quantized"
        )
    array = source.read().astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds NaN or infinity; the file is damaged, get it again")
    return array


def standard_names(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The arrays under PyTorch's names and in its order of axes, without the wrappers' prefixes."""
    tensors = dict(checkpoint.tensors)
    if checkpoint.format == "flax":
        tensors = dict(_from_flax(name, tensor) for name, tensor in tensors.items())
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # What LayerNorm's two arrays were called before 2019.
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for before, after in old.items():
        tensors = {
            name.removesuffix(before) + after if name.endswith(before) else name: tensor
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
