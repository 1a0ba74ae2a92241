"""What the command lines share: configurations by name, overrides, flags, errors as sentences."""

from __future__ import annotations

import argparse
import ast
import ctypes
import functools
import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from biclip_jax import places
from biclip_jax.configs import common
from biclip_jax.errors import UserError, did_you_mean

ACCELERATORS = ("nvidia[0-9]*", "accel*", "kfd", "vfio/[0-9]*")  # under /dev: GPUs, TPUs
# mallopt's M_ARENA_MAX: one arena; M_MMAP_MAX: no block of its own; M_TRIM_THRESHOLD: -1, give
# nothing back (the largest integer would be a threshold of 2 GiB); M_TOP_PAD: bytes more than are
# asked for.
MALLOC_OPTIONS = {-8: 1, -4: 0, -1: -1, -2: 2**26}
CACHE_BYTES = 2**30  # of compiled programs; those unused for longest go first
CPU_CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs a command line; exit status 2: a `UserError` or an unusable file; 130: Ctrl-C."""
    set_xla_flags()
    keep_memory()
    keep_compiled_programs()
    try:
        status = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        mend = "check that it exists, is yours to use, and that the disk has room"
        print(f"error: {error.filename}: {error.strerror}; {mend}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; the same command begins again, or goes on", file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.exit(status or 0)


def set_xla_flags() -> None:
    """Sends convolutions on a CPU to the faster library; about a fifth of a train step.

    Only for releases known to have the flag: an unknown one ends the process.
    """
    known = metadata.version("jaxlib").startswith("0.10.")
    flags = os.environ.get("XLA_FLAGS", "")
    if known and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {CPU_CONVOLUTION_FLAG}".strip()


def keep_memory() -> None:
    """Has the C library keep freed memory on hosts without an accelerator: a third of a train step.

    XLA asks for the memory of a step anew at every step: given back to the system in between, all
    its pages come as faults. glibc alone; elsewhere nothing happens.
    """
    library = _glibc()
    if library is not None:
        for option, value in MALLOC_OPTIONS.items():
            library.mallopt(option, value)


def give_back_memory() -> None:
    """Gives back what `keep_memory` keeps, once; the next step takes its memory anew.

    Between two steps something small may take a place in the memory that was the last one's; the
    next does not fit there any more, and what is left of it would be kept in vain.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any | None:
    """The C library, where it is glibc and the host has no accelerator."""
    if any(any(Path("/dev").glob(name)) for name in ACCELERATORS):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    except (OSError, AttributeError):
        return None


def keep_compiled_programs() -> None:
    """Compiled programs stay in the user's cache folder: the next start takes them from there.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(places.programs_dir()))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


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
    "model.kind": ("biclip", "medclipseg"),
    "model.variant": ("clip", "pubmedclip", "unimedclip", "biomedclip"),
    "model.input": ("clip", "imagenet_bgr"),
    "loss.dice_over": ("image", "rows"),
    "loss.contrastive_kind": ("described", "released"),
    "optim.rate_moves": ("step", "epoch"),
    "loss.views": ("weak", "both", "one"),
    "loss.iac_learner": ("weak", "strong", "both"),
    "loss.cycle_distance": ("l1", "l2"),
    "data.sentences": ("right", "missing"),
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
    "optim.tower_learning_rate": 0,
    "loss.ramp_steps": 0,
    "views.brightness": 0,
    "views.contrast": 0,
    "data.resident_steps": 1,
    "data.composed": 0,
    "data.unlabelled_ratio": 0,
    "model.num_levels": 1,
    "model.num_layers": 1,
    "model.num_samples": 1,
    "model.max_length": 4,
    "model.adapter_width": 1,
    "model.num_upscales": 0,
    "model.towers.width": 1,
    "model.towers.num_layers": 2,
    "model.towers.num_heads": 1,
    "model.towers.patch_size": 1,
    "model.towers.embedding_size": 1,
    "loss.temperature": 1e-3,
    "model.bmf.hidden": 1,
    "model.width": 2,
}
# from, and up to but without
BETWEEN = {
    "model.text.dropout": (0, 1),
    "model.bmf.dropout": (0, 1),
    "model.towers.dropout": (0, 1),
    "optim.ema_decay": (0, 1),
    "loss.confidence": (0.5, 1),
}
WEIGHTS = ("gen", "iac", "cycle", "pseudo_labels", "mean_teacher", "dice", "bce", "contrastive")
# What may change between two starts of one run: nothing that its numbers depend on.
FREE_FIELDS = (
    "data.source",
    "data.cache_dir",
    "data.in_memory",
    "model.text.weights",
    "model.image.weights",
    "model.towers.weights",
    "final_test",
    "parallel.mode",
    "parallel.shard",
    "data.resident",
    "data.resident_steps",
    "model.remat",
)


def check(config: ConfigDict) -> None:
    """Raises UserError where a field has a value that no code stands for."""
    fields = dict(leaves(config))
    for name, legal in CHOICES.items():
        if name in fields and fields[name] not in legal:
            known = [str(value) or "''" for value in legal]
            near = did_you_mean(str(fields[name]), known)
            raise UserError(
                f"--config.{name}: {fields[name]!r}; expected one of {', '.join(known)}{near}"
            )
    ranges = [f"views.strong.{name}" for name in config.views.get("strong", ()) if name != "light"]
    lowest = AT_LEAST | dict.fromkeys(ranges + [f"loss.{name}" for name in WEIGHTS], 0)
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
        there = dict(leaves(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); give another --workdir") from error
    here = dict(leaves(resolved))
    # A run may be older than a field: the default is what it did.
    defaults = dict(leaves(common.base()))
    there = {name: defaults[name] for name in here if name in defaults} | there
    names = sorted((here.keys() | there.keys()) - {*FREE_FIELDS, *ignored})
    pairs = {name: (there.get(name), here.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
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

    files = Path(next(iter(configs.__path__))).glob("*.py")
    return sorted(f.stem for f in files if f.stem not in ("__init__", "common", "variants"))


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals:
        raise UserError(f"{override}: not an option; fields are set as --config.FIELD=VALUE")
    fields = dict(leaves(config))
    if key not in fields:
        raise UserError(f"--config.{key}: no such field{did_you_mean(key, list(fields))}")
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
