"""Converts the weights of others to a model folder, executing nothing of what they hold.

    python -m biclip_jax.convert bert FOLDER weights/cxr_bert     CXR-BERT, PubMedBERT, BiomedBERT
    python -m biclip_jax.convert clip ViT-B-16.pt weights/clip --tokenizer FOLDER_OF_ITS_VOCABULARY
    python -m biclip_jax.convert biclip last.ckpt weights/biclip --tokenizer FOLDER_OF_CXR_BERT
    python -m biclip_jax.convert medclipseg latest.pth weights/medclipseg --tokenizer FOLDER

SOURCE is a file or a folder: Hugging Face's safetensors, Flax msgpack and .bin, whole or
sharded; OpenAI's and open_clip's CLIP, also with the BERT of UniMedCLIP and BiomedCLIP;
BiCLIP's Lightning checkpoint; MedCLIPSeg's released ones. A name such as
microsoft/BiomedVLP-CXR-BERT-specialized, where no such folder exists, is looked up on the
Hugging Face hub. OUT opens with biclip_jax.load_model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from biclip_jax.core import runtime
from biclip_jax.core.errors import UserError
from biclip_jax.data import tokenizers
from biclip_jax.encoders import clip_pair
from biclip_jax.encoders import text as text_encoders
from biclip_jax.models.transformer import ACTIVATIONS
from biclip_jax.weights import architectures, model_folder, readers
from biclip_jax.weights.medclipseg import convert_medclipseg

KINDS = ("bert", "clip", "biclip", "medclipseg")
# What a hub's repository holds beside the weights that is read.
HUB_FILES = ["config.json", "open_clip_config.json", "tokenizer.json", "tokenizer_config.json"]
HUB_FILES += ["vocab.txt", "vocab.json", "merges.txt"]


def convert(args: argparse.Namespace) -> Path:
    """Runs what the command line describes; returns the folder that was written."""
    source, output = find_source(args.source), Path(args.output)
    check_output(source, output, args.overwrite)
    checkpoint = readers.open_checkpoint(source)
    hf_config = read_hf_config(source, args.activation)
    origin = {"source": source.resolve().name, "read_as": checkpoint.format}
    if args.kind == "biclip":
        max_length = 32 if args.max_length is None else args.max_length
        network, encoder = architectures.convert_biclip(checkpoint, hf_config, max_length)
        longest = encoder.config["max_length"]
        if not 3 <= max_length <= longest:
            raise UserError(f"--max-length {max_length}: expected 3 to {longest} tokens")
        tokenizer = read_tokenizer("bert", source, args.tokenizer, encoder)
        shutil.rmtree(output / clip_pair.ENCODERS_FOLDER, ignore_errors=True)
        folder = output / text_encoders.TEXT_ENCODER
        identity = write_encoder("bert", encoder, tokenizer, folder, origin)
        write_biclip(network, tokenizer, output, origin, identity)
        return output
    load = {
        "bert": architectures.convert_bert,
        "clip": architectures.convert_clip,
        "medclipseg": convert_medclipseg,
    }[args.kind]
    converted = load(checkpoint, hf_config)
    tokenizer = read_tokenizer(args.kind, source, args.tokenizer, converted)
    if args.kind != "bert" and not hf_config:
        parts = (converted.config[part].get("activation") for part in ("image", "text"))
        assumed = " and ".join(sorted({name for name in parts if name}))
        print(f"no config.json beside the weights: {assumed} assumed (--activation)")
    # A model that is replaced may have had towers inside.
    for inside in (text_encoders.TEXT_ENCODER, clip_pair.ENCODERS_FOLDER):
        shutil.rmtree(output / inside, ignore_errors=True)
    write_encoder(args.kind, converted, tokenizer, output, origin)
    return output


def find_source(source: str) -> Path:
    """The file or folder of that name, or the hub's snapshot where it can only be a hub's name.

    Raises:
      UserError: neither is there, or it is a folder that was converted already.
    """
    path = Path(source)
    if (path / model_folder.CONFIG).is_file() and (path / model_folder.TOKENIZER).is_file():
        raise UserError(f"{source}: a model folder already; open it with biclip_jax.load_model")
    if source and path.exists():
        return path
    could_be_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    if not could_be_hub or path.parent.exists() or path.suffix in readers.SUFFIXES:
        raise UserError(f"{source!r}: no such file or folder; give the checkpoint's path")
    print(f"{source}: no such folder here; asking the Hugging Face hub")
    try:
        return fetch(source)
    except Exception as error:  # the hub's client raises whatever its libraries do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source}: no such folder, and the Hugging Face hub did not give it ({reason}); "
            "download it elsewhere and give the folder"
        ) from error


def fetch(name: str) -> Path:
    """The files of a hub's repository that a conversion reads: one format of weights, no code."""
    import huggingface_hub

    files = huggingface_hub.list_repo_files(name)
    weights = next((file for file in readers.FOLDER_ORDER if file in files), None)
    if weights is None:
        raise FileNotFoundError(f"none of {', '.join(readers.FOLDER_ORDER)} in it")
    stem = weights.removesuffix(readers.INDEX_SUFFIX)
    shards = f"{Path(stem).stem}-*{Path(stem).suffix}"
    patterns = [weights, *([shards] if weights != stem else []), *HUB_FILES]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raises UserError where writing would replace anything but a model folder of ours."""
    inside = source if source.is_dir() else source.parent
    if output.resolve() == inside.resolve():
        raise UserError(f"{output}: holds SOURCE itself; give another OUT")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: a file; give a folder as OUT")
    if not any(output.iterdir()):
        return
    if not (output / model_folder.TOKENIZER).is_file():
        raise UserError(f"{output}: holds other files; give an empty or a new folder as OUT")
    if not overwrite:
        raise UserError(f"{output}: holds a model already; give another OUT, or --overwrite")


def read_tokenizer(
    kind: str, source: Path, given: str | None, converted: architectures.Converted
) -> Any:
    """The tokenizer beside the weights, or the one that was given; it must fit the weights."""
    place = Path(given) if given else source if source.is_dir() else source.parent
    text = converted.config.get("text", converted.config)
    is_bert = kind in ("bert", "biclip") or text.get("kind") == "bert"
    try:
        tokenizer = tokenizers.read_tokenizer("bert" if is_bert else "clip", place)
    except UserError as error:
        fix = "" if given else " Or give the tokenizer's file or folder by --tokenizer."
        raise UserError(f"{error}{fix}") from error
    text_encoders.check_vocabulary(place, tokenizer, text["vocab_size"])
    return tokenizer


def read_hf_config(source: Path, activation: str | None) -> dict[str, Any]:
    """Hugging Face's config.json beside the weights, or open_clip's in its terms, or {}.

    Args:
      source: file or folder of the weights.
      activation: takes the place of what they say; None: nothing does.

    Raises:
      UserError: a file of that name that is none.
    """
    folder = source if source.is_dir() else source.parent
    config = _json_object(folder / "config.json")
    if not config:
        config = _from_open_clip(folder / "open_clip_config.json")
    if activation:
        config["hidden_act"] = activation
        for part in ("vision_config", "text_config"):
            fields = config.get(part) or {}
            if isinstance(fields, dict):
                config[part] = {**fields, "hidden_act": activation}
    return config


def _json_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({str(error)[:100]}); download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON {type(config).__name__}; expected an object")
    return config


def _from_open_clip(path: Path) -> dict[str, Any]:
    config = _json_object(path)
    if not config:
        return {}
    try:
        model = config["model_cfg"]
        activation = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        vision, text = model["vision_cfg"], model["text_cfg"]
        # open_clip leaves out what has its default, and says nothing of towers of other libraries.
        image_heads = vision.get("width", 768) // vision.get("head_width", 64)
        image = {**activation, "num_attention_heads": image_heads}
        own = {**activation, "num_attention_heads": text.get("heads", 8)}
        return {
            "vision_config": {} if "timm_model_name" in vision else image,
            "text_config": {} if "hf_model_name" in text else own,
        }
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not as open_clip writes it ({error!r}); download it again"
        ) from error


def write_encoder(
    kind: str,
    converted: architectures.Converted,
    tokenizer: Any,
    output: Path,
    origin: dict[str, Any],
) -> str:
    """Writes the folder of a tower and prints its report; returns its identity."""
    card = f"""# {kind} from {origin["source"]}

Converted by biclip_jax; the licence is that of the original weights.

    model, variables, processor = biclip_jax.load_model("this folder")
"""
    report = converted.report._asdict()
    described: dict[str, Any] = {"model": converted.config}
    if kind == "medclipseg":  # its towers lie inside; it tells no number of steps
        described |= {"encoders_sha256": "", "name": origin["source"], "data": "unknown", "step": 0}
    model_folder.write(
        output,
        config={**described, "kind": kind, "origin": {**origin, "report": report}},
        variables=converted.variables,
        tokenizer=tokenizer.to_str(),
        card=card,
    )
    print(f"{output}: {kind}, {converted.report}")
    return model_folder.identity(model_folder.read_config(output))


def write_biclip(
    network: architectures.Converted,
    tokenizer: Any,
    output: Path,
    origin: dict[str, Any],
    encoder_sha256: str,
) -> None:
    """Writes the folder of the published network, whose text tower lies inside already."""
    config = {
        "kind": "biclip",
        "model": network.config,
        "vocab_size": tokenizer.get_vocab_size(),
        "text_encoder_sha256": encoder_sha256,
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
    model_folder.write(
        output,
        config=config,
        variables=network.variables,
        tokenizer=tokenizer.to_str(),
        card=card,
    )
    print(f"{output}: biclip, {network.report}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    runtime.run_command(_main, argv)


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
        help="in place of config.json's; without either quick_gelu for clip, gelu for bert",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="of the sentences, in tokens; kind biclip alone (default: 32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in OUT")
    args = parser.parse_args(argv)
    if args.max_length is not None and args.kind != "biclip":
        parser.error("--max-length is for biclip; in training it is model.text.max_length")
    # transformers, which reads tokenizers, would say that PyTorch is missing; it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    convert(args)


if __name__ == "__main__":
    main(sys.argv[1:])
