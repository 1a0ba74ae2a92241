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
    """Writes a model folder; config.json comes last, with the SHA-256 of weights and tokenizer.

    Args:
      folder: Created if missing.
      config: {"kind": "biclip", "clip" or "bert", "model": ...} and all else that opening a
        folder of this kind requires.
      variables: Host arrays, as `model.apply` takes them or with "/"-joined names.
      tokenizer: JSON, as written by the tokenizers library.
      card: README.md, Markdown.
      scores: {split: {name: value}} for metrics.json; None writes no such file.

    Raises:
      UserError: The disk is full.
      OSError: The folder cannot be written.
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
    """Writes a safetensors file atomically; returns its SHA-256.

    Args:
      path: File in an existing folder.
      tensors: {name: array}; not copied.
      metadata: Metadata for the file's header.

    Raises:
      UserError: The disk is full.
      OSError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with files.atomic_write(path) as part:
            with open(part, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode
            save_file(dict(tensors), part, dict(metadata or {}))
            os.chmod(part, mode)  # the library creates files that only their owner can read
            digest = _sha256(part)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error}); free disk space") from error
    return digest


def model_card(config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Returns the model card, Markdown: the model, its scores and its intended use."""
    score_lines = "\n".join(
        f"- {split} {name}: {value:.4f}"
        for split, values in scores.items()
        for name, value in values.items()
        if isinstance(value, float)
    )
    size = config["model"]["image_size"]
    paper, encoders = _describe_family(config)
    return f"""# {config["name"]}

{paper}, {size} x {size} pixels, trained on `{config["data"]}` for
{config["step"]} steps with biclip_jax. Predicts a binary mask from an image and a text prompt.
{encoders}

{score_lines}

    segmenter = biclip_jax.load("this folder")
    mask, probability, uncertainty = segmenter.predict("image.png", "a text prompt")

For research only. Not a medical device: no clinical validation, and no claims
beyond images and prompts like those it was trained on.
"""


def _describe_family(config: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the method with its paper, and a description of the encoders."""
    model = config["model"]
    if config.get("kind") == "medclipseg":
        kind = "BERT" if model["text"].get("kind") == "bert" else "CLIP's text encoder"
        origin = "converted" if config["encoders_sha256"] else "random"
        return "MedCLIPSeg (arXiv 2602.20423)", f"Frozen encoders, {origin}: a ViT and {kind}."
    encoders = [model.get(part, {}).get("encoder", "cnn") for part in ("text", "image")]
    names = f"Text encoder: {encoders[0]}; image encoder: {encoders[1]}."
    return "BiCLIP (arXiv 2603.00156)", names


def link_folder(source: Path, folder: Path) -> None:
    """Copies another model folder into this one, with hard links where the disk supports them.

    An existing folder with the same weights and tokenizer is kept. Files of model folders are
    replaced and never modified, so that hard links stay valid.

    Raises:
      OSError: The folder cannot be written.
    """
    with contextlib.suppress(UserError):  # missing or damaged
        if identity(read_config(folder)) == identity(read_config(source)):
            return
    temporary = folder.with_name(f"{folder.name}.tmp")
    for copy_function in (os.link, shutil.copy2):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(source, temporary, copy_function=copy_function)
            break
        except OSError:  # includes shutil.Error: the disk has no links, or is full
            if copy_function is shutil.copy2:
                raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def identity(config: Mapping[str, Any]) -> str:
    """Returns the SHA-256 over the weights and tokenizer of a model folder with this config."""
    hashes = f"{config['sha256']} {config['tokenizer_sha256']}"
    return hashlib.sha256(hashes.encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of a model folder, without its weights.

    Raises:
      UserError: The config is missing, damaged, or of another format.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: not a model folder ({error}); expected {CONFIG} and {WEIGHTS}; "
            "give the workdir of a run or a model folder"
        ) from error
    if isinstance(config, dict) and "num_steps" in config:
        raise UserError(
            f"{folder}: found a run without a saved model; expected {CONFIG} and {WEIGHTS} in "
            "its folder model; train it up to its first checkpoint"
        )
    is_complete = isinstance(config, dict) and {"sha256", "tokenizer_sha256"} <= config.keys()
    if not is_complete or config.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG}: not of the format {FORMAT}; write the folder again")
    return config


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the config and the variables (nested dicts of numpy arrays) of a model folder.

    Raises:
      UserError: A file is missing, damaged, or of another format.
    """
    config = read_config(folder)
    for name, digest in ((WEIGHTS, "sha256"), (TOKENIZER, "tokenizer_sha256")):
        _verify(folder / name, config[digest])
    tensors = readers.open_checkpoint(folder / WEIGHTS).tensors
    return config, unflatten_dict({name: t.read() for name, t in tensors.items()}, sep="/")


def check_shapes(
    folder: Path, variables: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks that variables have the shapes of the model.

    Args:
      folder: Folder that they were read from.
      variables: Nested dict of arrays.
      expected: {"params/...": shape}, see `architectures.shapes_of`.

    Raises:
      UserError: A shape differs; the message names the parameter.
    """
    found = {k: v.shape for k, v in flatten_dict(variables, sep="/").items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{folder / WEIGHTS}: {name} has shape {found.get(name, 'none')}, the model of "
                f"{CONFIG} expects {expected.get(name, 'none')}; write the folder again"
            )


@contextlib.contextmanager
def config_errors(folder: Path) -> Iterator[None]:
    """Turns errors of building a model from a config into UserErrors that name config.json."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise UserError(
            f"{folder / CONFIG}: does not describe a model ({type(error).__name__}: {reason}); "
            "the file was changed; write the folder again"
        ) from error


def _verify(path: Path, expected: str) -> None:
    try:
        digest = _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); write the folder again") from error
    if digest != expected:
        raise UserError(
            f"{path}: its SHA-256 is not the one in {CONFIG}; the file was damaged or "
            "replaced; copy the folder again"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _replace(path: Path, data: bytes) -> None:
    with files.atomic_write(path) as part:
        part.write_bytes(data)
