"""What the command lines share: configurations by name, overrides, flags, errors as sentences."""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from biclip_jax.errors import UserError

CPU_CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs a command line; a `UserError` or a file that cannot be used is exit status 2."""
    set_xla_flags()
    try:
        status = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        mend = "check that it exists, is yours to use, and that the disk has room"
        print(f"error: {error.filename}: {error.strerror}; {mend}", file=sys.stderr)
        status = 2
    sys.exit(status or 0)


def set_xla_flags() -> None:
    """Sends convolutions on a CPU to the faster library; about a fifth of a train step.

    Only for releases known to have the flag: an unknown one ends the process.
    """
    known = metadata.version("jaxlib").startswith("0.10.")
    flags = os.environ.get("XLA_FLAGS", "")
    if known and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {CPU_CONVOLUTION_FLAG}".strip()


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with --config and --workdir; what it leaves over are overrides of fields."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any field: --config.FIELD=VALUE, such as --config.batch_size=8",
    )
    parser.add_argument("--config", default="default", help="name or path, with :variant")
    parser.add_argument("--workdir", help="folder of the run (default: runs/NAME)")
    return parser


def load_config(name: str, overrides: list[str]) -> ConfigDict:
    """The resolved configuration, locked.

    Args:
      name: "qata", "qata:small", "configs/qata.py:small" or a path to another file.
      overrides: "--config.a.b=value" each.

    Raises:
      UserError: no such configuration, variant or field (with the nearest name),
        or a value of another type.
    """
    source, _, variant = name.partition(":")
    try:
        config = _config_module(source).get_config(variant or None)
    except ValueError as error:
        raise UserError(f"--config {name}: {error}") from error
    for override in overrides:
        _override(config, override)
    check(config)
    return config.lock()


CHOICES = {
    "optim.name": ("adamw", "sgd"),
    "optim.non_finite": ("skip", "abort"),
    "model.dtype": ("float32", "bfloat16"),
    "model.text.encoder": ("scratch", "bert", "clip"),
    "model.text.pooling": ("all_tokens", "masked", "embedding"),
    "model.norm": ("batch", "group"),
    "model.image.encoder": ("cnn", "clip_vit_b16", "clip_rn50"),
    "loss.views": ("weak", "both"),
    "loss.iac_learner": ("weak", "strong", "both"),
    "loss.cycle_distance": ("l1", "l2"),
    "data.sentences": ("right", "missing"),
}
POSITIVE = (
    "ensemble",
    "batch_size",
    "num_epochs",
    "log_every",
    "optim.accumulate",
    "model.num_levels",
)


def check(config: ConfigDict) -> None:
    """Raises UserError where a field has a value that no code stands for."""
    fields = dict(leaves(config))
    for name, legal in CHOICES.items():
        if fields[name] not in legal:
            near = _nearest(fields[name], list(legal))
            raise UserError(
                f"--config.{name}: {fields[name]!r}; expected one of {', '.join(legal)}{near}"
            )
    for name in POSITIVE:
        if fields[name] < 1:
            raise UserError(f"--config.{name}: {fields[name]}; expected at least 1")
    if fields["model.width"] < 2:
        raise UserError(f"--config.model.width: {fields['model.width']}; expected at least 2")


def _config_module(source: str) -> ModuleType:
    path = Path(source)
    if path.is_file():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    names = config_names()
    if path.stem not in names or source not in (path.stem, f"configs/{path.stem}.py"):
        raise UserError(
            f"--config {source}: no such file, and no configuration of that name; "
            f"the names are {', '.join(names)}{_nearest(path.stem, names)}"
        )
    return importlib.import_module(f"biclip_jax.configs.{path.stem}")


def config_names() -> list[str]:
    """Names of the installed experiment configurations."""
    from biclip_jax import configs

    files = Path(next(iter(configs.__path__))).glob("*.py")
    return sorted(f.stem for f in files if f.stem not in ("__init__", "common", "variants"))


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals:
        raise UserError(f"{override}: not an option; fields are set as --config.FIELD=VALUE")
    fields = dict(leaves(config))
    if key not in fields:
        raise UserError(f"--config.{key}: no such field{_nearest(key, list(fields))}")
    *parents, leaf = key.split(".")
    owner = functools.reduce(lambda fields, name: fields[name], parents, config)
    owner[leaf] = _parse(key, text, fields[key])


def leaves(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parse(key: str, text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(current):
        expected = type(current).__name__
        raise UserError(f"--config.{key}: {text!r} is no {expected}; the default is {current!r}")
    return value


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
