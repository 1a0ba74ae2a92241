"""Model folders: config.json, model.safetensors, tokenizer/, README.md, metrics.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from biclip_jax.core import files
from biclip_jax.core.errors import UserError
from biclip_jax.weights import readers

FORMAT = "biclip_jax.model/3"
CONFIG, WEIGHTS, CARD, METRICS = "config.json", "model.safetensors", "README.md", "metrics.json"
TOKENIZER = "tokenizer/tokenizer.json"


def write(
    folder: Path,
    *,
    config: Mapping[str, Any],
    variables: Mapping[str, Any],
    tokenizer: str,
    card: str,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder; the config, which names the SHA-256 of weights and tokenizer, last.

    Args:
      folder: made if missing.
      config: {"kind": "biclip", "clip" or "bert", "model": ...} and what else
        the kind needs to be opened.
      variables: as `model.apply` takes them, or flat by "/"; host arrays.
      tokenizer: JSON, as the tokenizers library writes it.
      card: README.md, Markdown.
      scores: {split: {name: value}}, for metrics.json; None: without one.

    Raises:
      UserError: the disk is full.
      OSError: the folder cannot be written.
    """
    (folder / TOKENIZER).parent.mkdir(parents=True, exist_ok=True)
    flat = {name: np.asarray(value) for name, value in flatten_dict(variables, sep="/").items()}
    digest = write_tensors(folder / WEIGHTS, flat)
    _replace(folder / TOKENIZER, tokenizer.encode())
    _replace(folder / CARD, card.encode())
    if scores is None:
        (folder / METRICS).unlink(missing_ok=True)
    else:
        _replace(folder / METRICS, _json(scores))
    hashes = {"sha256": digest, "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest()}
    _replace(folder / CONFIG, _json({**config, "format": FORMAT, **hashes}))


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> str:
    """Writes a safetensors file whole or not at all; returns its SHA-256.

    Args:
      path: in a folder that exists.
      tensors: by name; nothing is copied.
      metadata: for the file's header.

    Raises:
      UserError: the disk is full.
      OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with files.atomic_write(path) as part:
            with open(part, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode
            save_file(dict(tensors), part, dict(metadata or {}))
            os.chmod(part, mode)  # the library makes files that only their owner can read
            digest = _sha256(part)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error}); make room on the disk") from error
    return digest


def model_card(config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """What a trained model is, what it reached, and what it is not for; Markdown."""
    reached = "\n".join(
        f"- {split} {name}: {value:.4f}"
        for split, values in scores.items()
        for name, value in values.items()
        if isinstance(value, float)
    )
    size = config["model"]["image_size"]
    paper, encoders = _family(config)
    return f"""# {config["name"]}

{paper}, {size} x {size} pixels, trained on `{config["data"]}` for
{config["step"]} steps with biclip_jax. One binary mask for a picture and a sentence.
{encoders}

{reached}

    predictor = biclip_jax.load("this folder")
    mask, probability, uncertainty = predictor.predict("picture.png", "a sentence")

For research. Not a medical device: no clinical validation, and no claim
outside the pictures and the wording it was trained on.
"""


def _family(config: Mapping[str, Any]) -> tuple[str, str]:
    """The model's name with its paper, and a sentence on its encoders."""
    model = config["model"]
    if config.get("kind") == "medclipseg":
        kind = "BERT" if model["text"].get("kind") == "bert" else "CLIP's text tower"
        origin = "converted" if config["encoders_sha256"] else "random"
        return "MedCLIPSeg (arXiv 2602.20423)", f"Frozen towers, {origin}: a ViT and {kind}."
    encoders = [model.get(part, {}).get("encoder", "cnn") for part in ("text", "image")]
    names = f"Text encoder: {encoders[0]}; image encoder: {encoders[1]}."
    return "BiCLIP (arXiv 2603.00156)", names


def link_folder(source: Path, folder: Path) -> None:
    """Puts another model folder inside this one, by hard links where the disk allows them.

    A folder there with the same weights and tokenizer stays as it is. Files of model folders are
    replaced and never written into, so that a link keeps what it was made of.

    Raises:
      OSError: it cannot be written.
    """
    with contextlib.suppress(UserError):  # nothing there, or damaged
        if identity(read_config(folder)) == identity(read_config(source)):
            return
    temporary = folder.with_name(f"{folder.name}.tmp")
    for copy in (os.link, shutil.copy2):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(source, temporary, copy_function=copy)
            break
        except OSError:  # shutil.Error is one: the disk has no links, or no room
            if copy is shutil.copy2:
                raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def identity(config: Mapping[str, Any]) -> str:
    """The SHA-256 over weights and tokenizer of a model folder with this config."""
    hashes = f"{config['sha256']} {config['tokenizer_sha256']}"
    return hashlib.sha256(hashes.encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder, without its weights.

    Raises:
      UserError: it is missing, damaged, or of another format.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no model folder ({error}); expected {CONFIG} and {WEIGHTS}; "
            "give the workdir of a run or a folder written by one"
        ) from error
    if isinstance(config, dict) and "num_steps" in config:
        raise UserError(
            f"{folder}: a run that has saved no model yet; expected {CONFIG} and {WEIGHTS} in "
            "its folder model; let it train up to its first checkpoint"
        )
    described = isinstance(config, dict) and {"sha256", "tokenizer_sha256"} <= config.keys()
    if not described or config.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG}: not of the format {FORMAT}; write the folder anew")
    return config


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the variables (nested dicts of numpy arrays) of a model folder.

    Raises:
      UserError: a file is missing, damaged, or of another format.
    """
    config = read_config(folder)
    for name, digest in ((WEIGHTS, "sha256"), (TOKENIZER, "tokenizer_sha256")):
        _verify(folder / name, config[digest])
    tensors = readers.open_checkpoint(folder / WEIGHTS).tensors
    return config, unflatten_dict({name: t.read() for name, t in tensors.items()}, sep="/")


def check_shapes(
    folder: Path, variables: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError, naming the parameter, where the variables are not the model's.

    Args:
      folder: that they were read from.
      variables: nested.
      expected: {"params/...": shape}, see `architectures.shapes_of`.
    """
    found = {k: v.shape for k, v in flatten_dict(variables, sep="/").items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{folder / WEIGHTS}: {name} has shape {found.get(name, 'none')}, the model of "
                f"{CONFIG} expects {expected.get(name, 'none')}; write the folder anew"
            )


@contextlib.contextmanager
def config_errors(folder: Path) -> Iterator[None]:
    """Building a model from a config inside: what does not fit is a UserError of config.json."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise UserError(
            f"{folder / CONFIG}: does not describe a model ({type(error).__name__}: {reason}); "
            "the file was changed; write the folder anew"
        ) from error


def _verify(path: Path, expected: str) -> None:
    try:
        digest = _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); write the folder anew") from error
    if digest != expected:
        raise UserError(
            f"{path}: its SHA-256 is not the one in {CONFIG}; the file was damaged or "
            "exchanged; copy the folder again"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _replace(path: Path, data: bytes) -> None:
    with files.atomic_write(path) as part:
        part.write_bytes(data)
