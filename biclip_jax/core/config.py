"""What the command lines share: configurations by name, overrides, flags, errors as sentences."""

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

from biclip_jax.configs import common
from biclip_jax.core.errors import UserError, did_you_mean


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
# from, and up to but without
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
# What may change between two starts of one run: nothing that its numbers depend on.
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
    """Raises UserError where a field has a value that no code stands for."""
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
            f"--config.parallel.shard: {fields['parallel.shard']!r}, but under parallel.mode=pmap "
            "every device holds the whole state; set parallel.mode=mesh, or leave it out"
        )


def changed_fields(
    path: Path, resolved: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Where a run's config.json differs from a configuration, {field: (there, here)}.

    Args:
      path: of the file.
      resolved: the configuration, as JSON.
      ignored: fields beside `FREE_FIELDS` that may differ.

    Raises:
      UserError: the file is damaged.
    """
    try:
        there = dict(flatten(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); give another --workdir") from error
    here = dict(flatten(resolved))
    # A run may be older than a field: the default is what it did.
    defaults = dict(flatten(common.base()))
    there = {name: defaults[name] for name in here if name in defaults} | there
    names = sorted((here.keys() | there.keys()) - {*FREE_FIELDS, *ignored})
    pairs = {name: (there.get(name), here.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def format_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The first five of `changed_fields`, for an error."""
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
            f"--config {source}: no such file, and no configuration of that name; "
            f"the names are {', '.join(names)}{did_you_mean(path.stem, names)}"
        )
    return importlib.import_module(f"biclip_jax.configs.{path.stem}")


def config_names() -> list[str]:
    """Names of the installed experiment configurations."""
    from biclip_jax import configs

    paths = Path(next(iter(configs.__path__))).glob("*.py")
    return sorted(f.stem for f in paths if f.stem not in ("__init__", "common", "variants"))


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals:
        raise UserError(f"{override}: not an option; fields are set as --config.FIELD=VALUE")
    fields = dict(flatten(config))
    if key not in fields:
        raise UserError(f"--config.{key}: no such field{did_you_mean(key, list(fields))}")
    *parents, leaf = key.split(".")
    owner = functools.reduce(lambda fields, name: fields[name], parents, config)
    owner[leaf] = _parse_value(key, text, fields[key])


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field."""
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
        raise UserError(f"--config.{key}: {text!r} is no {expected}; the default is {current!r}")
    return value
