"""Converts the weights of others to a model folder, executing nothing of what they hold.

    python -m biclip_jax.convert bert FOLDER weights/cxr_bert     CXR-BERT, PubMedBERT, BiomedBERT
    python -m biclip_jax.convert clip ViT-B-16.pt weights/clip --tokenizer FOLDER_OF_ITS_VOCABULARY
    python -m biclip_jax.convert biclip last.ckpt weights/biclip --tokenizer FOLDER_OF_CXR_BERT

SOURCE is a file or a folder: Hugging Face's safetensors, Flax msgpack and .bin, whole or
sharded; OpenAI's and open_clip's CLIP; BiCLIP's Lightning checkpoint. A name such as
microsoft/BiomedVLP-CXR-BERT-specialized, where no such folder exists, is looked up on the
Hugging Face hub. OUT opens with biclip_jax.load_model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from biclip_jax import cli, inference
from biclip_jax.data import tokenizers
from biclip_jax.errors import UserError
from biclip_jax.models.transformer import ACTIVATIONS
from biclip_jax.weights import architectures, readers
from biclip_jax.weights import folder as model_folder

KINDS = ("bert", "clip", "biclip")
HUB_FILES = ["*.json", "*.txt", "*.gz", "*.safetensors", "*.msgpack", "*.bin"]


def convert(args: argparse.Namespace) -> Path:
    """Runs what the command line describes; returns the folder that was written."""
    source, output = find_source(args.source), Path(args.output)
    if (output / model_folder.CONFIG).exists() and not args.overwrite:
        raise UserError(f"{output}: holds a model already; give another OUT, or --overwrite")
    place = Path(args.tokenizer) if args.tokenizer else source if source.is_dir() else source.parent
    tokenizer = tokenizers.read_tokenizer("clip" if args.kind == "clip" else "bert", place)
    checkpoint = readers.open_checkpoint(source)
    origin = {"source": Path(args.source).name, "read_as": checkpoint.format}
    if args.kind == "biclip":
        return write_biclip(checkpoint, tokenizer, output, origin)
    hf_config = read_hf_config(source, args.activation)
    write = {"bert": architectures.convert_bert, "clip": architectures.convert_clip}[args.kind]
    write_tower(args.kind, write(checkpoint, hf_config), tokenizer, output, origin)
    return output


def find_source(source: str) -> Path:
    """The file or folder of that name, or the hub's snapshot where there is none.

    Raises:
      UserError: neither is there.
    """
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"{source}: no such file or folder; give the checkpoint's path")
    from huggingface_hub import snapshot_download

    print(f"{source}: no such folder here; asking the Hugging Face hub")
    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises whatever its libraries do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source}: no such folder, and the Hugging Face hub did not give it ({reason}); "
            "download it elsewhere and give the folder"
        ) from error


def read_hf_config(source: Path, activation: str | None) -> dict[str, Any]:
    """Hugging Face's config.json beside the weights, or {}; with `activation` in all its parts.

    Raises:
      UserError: a config.json that is none.
    """
    path = (source if source.is_dir() else source.parent) / "config.json"
    config: Any = {}
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON {type(config).__name__}; expected an object")
    if activation:
        config["hidden_act"] = activation
        for part in ("vision_config", "text_config"):
            config[part] = {**(config.get(part) or {}), "hidden_act": activation}
    return config


def write_tower(
    kind: str,
    converted: architectures.Converted,
    tokenizer: Any,
    output: Path,
    origin: dict[str, Any],
) -> None:
    """Writes the folder of a tower and prints its report."""
    model = converted.config
    rows = model["vocab_size"] if kind == "bert" else model["text"]["vocab_size"]
    if tokenizer.get_vocab_size() > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} words, the weights {rows}; "
            "give the tokenizer of these weights (--tokenizer)"
        )
    tokenizers.save_tokenizer(tokenizer, output / "tokenizer")
    card = f"""# {kind} from {origin["source"]}

Converted by biclip_jax; the licence is that of the original weights.

    model, variables, processor = biclip_jax.load_model("this folder")
"""
    report = converted.report._asdict()
    config = {"kind": kind, "model": model, "origin": {**origin, "report": report}}
    model_folder.write(output, config=config, variables=converted.variables, card=card)
    print(f"{output}: {kind}, {converted.report}")


def write_biclip(
    checkpoint: readers.Checkpoint, tokenizer: Any, output: Path, origin: dict[str, Any]
) -> Path:
    """Writes the folder of the published network, its text tower inside."""
    network, tower = architectures.convert_biclip(checkpoint)
    write_tower("bert", tower, tokenizer, output / inference.TEXT_ENCODER, origin)
    tokenizers.save_tokenizer(tokenizer, output / "tokenizer")
    config = {
        "kind": "biclip",
        "model": network.config,
        "vocab_size": tokenizer.get_vocab_size(),
        "name": origin["source"],
        "data": "unknown",
        "step": 0,
        "origin": {**origin, "report": network.report._asdict()},
    }
    card = f"""# BiCLIP from {origin["source"]}

The published network (arXiv 2603.00156), converted by biclip_jax; the licence is that of
the original weights. For research. Not a medical device.

    predictor = biclip_jax.load("this folder")
    mask, probability, uncertainty = predictor.predict("picture.png", "a sentence")
"""
    model_folder.write(output, config=config, variables=network.variables, card=card)
    print(f"{output}: biclip, {network.report}")
    return output


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli.run(_main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", metavar="SOURCE", help="file, folder, or a name on the hub")
    parser.add_argument("output", metavar="OUT", help="folder, made if missing")
    parser.add_argument("--tokenizer", help="its file or folder (default: beside SOURCE)")
    parser.add_argument(
        "--activation",
        choices=sorted(ACTIVATIONS),
        help="where no config.json tells it (default: quick_gelu for clip, gelu for bert)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in OUT")
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
