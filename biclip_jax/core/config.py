"""Loads configs by name, applies overrides and validates the fields."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from biclip_jax.core.errors import UserError, did_you_mean


def config_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with --config and --workdir; the remaining arguments are overrides."""
    parser = argparse.ArgumentParser(
        prog=f"biclip {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Override any field with --config.FIELD=VALUE, for example --config.batch_size=8",
    )
    parser.add_argument(
        "--config", default="default", help="name or path of a config, optionally with :variant"
    )
    parser.add_argument("--workdir", help="work directory of the run (default: runs/NAME)")
    return parser


def load_config(name: str, overrides: list[str]) -> ConfigDict:
    """Loads a config, applies the overrides, validates and locks it.

    Args:
      name: "qata", "qata:small", "configs/qata.py:small" or the path of another file.
      overrides: Arguments of the form "--config.a.b=value".

    Raises:
      UserError: Unknown config, variant or field (with the nearest known name), or a value of the
        wrong type or out of range.
    """
    source, _, variant = name.partition(":")
    try:
        config = _config_module(source).get_config(variant or None)
    except ValueError as error:
        raise UserError(f"--config {name}: {error}") from error
    for override in overrides:
        _override(config, override)
    validate(config)
    return config.lock()


CHOICES = {
    "optim.name": ("adamw", "sgd"),
    "optim.non_finite": ("skip", "abort"),
    "model.dtype": ("float32", "bfloat16"),
    "model.text.encoder": ("scratch", "bert", "clip"),
    "model.text.pooling": ("all_tokens", "masked", "embedding"),
    "model.norm": ("batch", "group"),
    "model.image.encoder": ("cnn", "clip_vit_b16", "clip_rn50"),
    "model.kind": ("biclip", "medclipseg"),
    "model.variant": ("clip", "pubmedclip", "unimedclip", "biomedclip"),
    "model.input": ("clip", "imagenet_bgr"),
    "loss.dice_over": ("image", "rows"),
    "loss.contrastive_kind": ("described", "released"),
    "optim.lr_update": ("step", "epoch"),
    "loss.views": ("weak", "both", "one"),
    "loss.iac_learner": ("weak", "strong", "both"),
    "loss.cycle_distance": ("l1", "l2"),
    "data.text_condition": ("original", "empty"),
    "data.resize": ("antialiased", "opencv"),
    "data.percent": (10, 25, 50, 100),
    "parallel.mode": ("pmap", "mesh"),
    "parallel.shard": ("", "optimizer", "all"),
}
AT_LEAST = {
    "ensemble": 1,
    "batch_size": 1,
    "num_epochs": 1,
    "log_every": 1,
    "optim.accumulate": 1,
    "optim.warmup_steps": 0,
    "optim.encoder_learning_rate": 0,
    "loss.ramp_steps": 0,
    "views.brightness": 0,
    "views.contrast": 0,
    "data.steps_per_call": 1,
    "data.half_mix": 0,
    "data.unlabelled_ratio": 0,
    "model.num_levels": 1,
    "model.num_layers": 1,
    "model.num_samples": 1,
    "model.max_length": 4,
    "model.adapter_width": 1,
    "model.num_upscales": 0,
    "model.encoders.width": 1,
    "model.encoders.num_layers": 2,
    "model.encoders.num_heads": 1,
    "model.encoders.patch_size": 1,
    "model.encoders.embedding_size": 1,
    "loss.temperature": 1e-3,
    "model.bmf.hidden": 1,
    "model.width": 2,
}
# Half-open intervals [low, high).
BETWEEN = {
    "model.text.dropout": (0, 1),
    "model.bmf.level_text_dropout": (0, 1),
    "model.encoders.dropout": (0, 1),
    "optim.ema_decay": (0, 1),
    "loss.confidence": (0.5, 1),
}
LOSS_WEIGHTS = (
    "gen",
    "iac",
    "cycle",
    "pseudo_labels",
    "mean_teacher",
    "dice",
    "bce",
    "contrastive",
)
# Fields that may change when a run resumes: no result depends on them.
FREE_FIELDS = (
    "data.source",
    "data.cache_dir",
    "data.in_memory",
    "model.text.weights",
    "model.image.weights",
    "model.encoders.weights",
    "final_test",
    "parallel.mode",
    "parallel.shard",
    "data.on_device",
    "data.steps_per_call",
    "model.remat",
)


def validate(config: ConfigDict) -> None:
    """Raises UserError for a value outside the choices or the range of its field."""
    fields = dict(flatten(config))
    for name, legal in CHOICES.items():
        if name in fields and fields[name] not in legal:
            known = [str(value) or "''" for value in legal]
            near = did_you_mean(str(fields[name]), known)
            raise UserError(
                f"--config.{name}: {fields[name]!r}; expected one of {', '.join(known)}{near}"
            )
    ranges = [
        f"views.strong.{name}" for name in config.views.get("strong", ()) if name != "photometric"
    ]
    lowest = AT_LEAST | dict.fromkeys(ranges + [f"loss.{name}" for name in LOSS_WEIGHTS], 0)
    for name, least in lowest.items():
        if name in fields and fields[name] < least:
            raise UserError(f"--config.{name}: {fields[name]}; expected at least {least}")
    for name, (low, high) in BETWEEN.items():
        if name in fields and not low <= fields[name] < high:
            raise UserError(f"--config.{name}: {fields[name]}; expected {low} <= value < {high}")
    if fields.get("views.strong.cutmix", 0) > 1:
        raise UserError(
            f"--config.views.strong.cutmix: {fields['views.strong.cutmix']}; expected a probability"
        )
    if fields.get("parallel.shard") and fields["parallel.mode"] == "pmap":
        raise UserError(
            f"--config.parallel.shard: {fields['parallel.shard']!r}, but with parallel.mode=pmap "
            "every device holds the full state; set parallel.mode=mesh, or remove it"
        )


def changed_fields(
    path: Path, resolved: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Compares a run's config.json with a config.

    Args:
      path: The config.json.
      resolved: The config, as JSON values.
      ignored: Fields that may differ, in addition to `FREE_FIELDS`.

    Returns:
      {field: (value in the file, value in `resolved`)} of the fields that differ.

    Raises:
      UserError: The file is damaged.
    """
    try:
        recorded = dict(flatten(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); give another --workdir") from error
    current = dict(flatten(resolved))
    names = sorted((current.keys() | recorded.keys()) - {*FREE_FIELDS, *ignored})
    pairs = {name: (recorded.get(name), current.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def format_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Formats the first five of `changed_fields` for an error message."""
    return ", ".join(f"{name} ({a} -> {b})" for name, (a, b) in list(changed.items())[:5])


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
            f"--config {source}: no such file and no such config; expected one of "
            f"{', '.join(names)}{did_you_mean(path.stem, names)}"
        )
    return importlib.import_module(f"biclip_jax.configs.{path.stem}")


def config_names() -> list[str]:
    """Returns the names of the installed configs."""
    from biclip_jax import configs

    paths = Path(next(iter(configs.__path__))).glob("*.py")
    return sorted(f.stem for f in paths if f.stem not in ("__init__", "common", "variants"))


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals:
        raise UserError(f"{override}: unknown argument; expected --config.FIELD=VALUE")
    fields = dict(flatten(config))
    if key not in fields:
        raise UserError(f"--config.{key}: unknown field{did_you_mean(key, list(fields))}")
    *parents, leaf = key.split(".")
    owner = functools.reduce(lambda fields, name: fields[name], parents, config)
    owner[leaf] = _parse_value(key, text, fields[key])


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parse_value(key: str, text: str, current: Any) -> Any:
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
        raise UserError(
            f"--config.{key}: {text!r}; expected a value of type {expected}, such as {current!r}"
        )
    return value
