"""Converts pretrained weights to a model folder, without executing anything in the files.

    biclip convert bert FOLDER weights/cxr_bert            CXR-BERT, PubMedBERT, BiomedBERT
    biclip convert clip ViT-B-16.pt weights/clip --tokenizer VOCABULARY_FOLDER
    biclip convert biclip last.ckpt weights/biclip --tokenizer CXR_BERT_FOLDER
    biclip convert medclipseg latest.pth weights/medclipseg --tokenizer FOLDER

SOURCE is a file or a folder: Hugging Face safetensors, Flax msgpack and .bin, whole or sharded;
  CLIP of OpenAI and open_clip, also with the BERT of UniMedCLIP and BiomedCLIP; BiCLIP's Lightning
  checkpoint; MedCLIPSeg's released checkpoints. If no such folder exists, a name such as
  microsoft/BiomedVLP-CXR-BERT-specialized is looked up on the Hugging Face hub. Load OUT with
  biclip_jax.load_model.
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
# Files of a hub repository that are read in addition to the weights.
HUB_FILES = ["config.json", "open_clip_config.json", "tokenizer.json", "tokenizer_config.json"]
HUB_FILES += ["vocab.txt", "vocab.json", "merges.txt"]


def convert(args: argparse.Namespace) -> Path:
    """Converts the weights that the arguments describe; returns the output folder."""
    source, output = find_source(args.source), Path(args.output)
    check_output(source, output, args.overwrite)
    checkpoint = readers.open_checkpoint(source)
    hf_config = read_hf_config(source, args.activation)
    origin = {"source": source.resolve().name, "read_as": checkpoint.format}
    if args.kind == "biclip":
        max_length = 32 if args.max_length is None else args.max_length
        network, encoder = architectures.convert_biclip(checkpoint, hf_config, max_length)
        limit = encoder.config["max_length"]
        if not 3 <= max_length <= limit:
            raise UserError(f"--max-length {max_length}: expected 3 to {limit} tokens")
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
        print(f"no config.json beside the weights; assuming {assumed} (see --activation)")
    # A replaced model folder may contain encoders.
    for name in (text_encoders.TEXT_ENCODER, clip_pair.ENCODERS_FOLDER):
        shutil.rmtree(output / name, ignore_errors=True)
    write_encoder(args.kind, converted, tokenizer, output, origin)
    return output


def find_source(source: str) -> Path:
    """Returns the file or folder, or downloads a snapshot if the name can only be a hub name.

    Raises:
      UserError: Neither exists, or the folder is already a model folder.
    """
    path = Path(source)
    if (path / model_folder.CONFIG).is_file() and (path / model_folder.TOKENIZER).is_file():
        raise UserError(f"{source}: already a model folder; load it with biclip_jax.load_model")
    if source and path.exists():
        return path
    could_be_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    if not could_be_hub or path.parent.exists() or path.suffix in readers.SUFFIXES:
        raise UserError(f"{source!r}: no such file or folder; give the path of the checkpoint")
    print(f"{source}: no such folder; trying the Hugging Face hub")
    try:
        return fetch(source)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the hub client raises the errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source}: no such folder, and the Hugging Face hub failed ({reason}); download it "
            "elsewhere and give the folder"
        ) from error


def fetch(name: str) -> Path:
    """Downloads the files of a hub repository that a conversion reads.

    One weight format, no code.
    """
    import huggingface_hub

    files = huggingface_hub.list_repo_files(name)
    weights = next((file for file in readers.FOLDER_ORDER if file in files), None)
    if weights is None:
        raise FileNotFoundError(f"found none of {', '.join(readers.FOLDER_ORDER)}")
    stem = weights.removesuffix(readers.INDEX_SUFFIX)
    shards = f"{Path(stem).stem}-*{Path(stem).suffix}"
    patterns = [weights, *([shards] if weights != stem else []), *HUB_FILES]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raises UserError if the output folder holds anything but a model folder."""
    source_folder = source if source.is_dir() else source.parent
    if output.resolve() == source_folder.resolve():
        raise UserError(f"{output}: contains SOURCE; give another OUT")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: found a file; expected a folder as OUT")
    if not any(output.iterdir()):
        return
    if not (output / model_folder.TOKENIZER).is_file():
        raise UserError(f"{output}: contains other files; give an empty or a new folder as OUT")
    if not overwrite:
        raise UserError(f"{output}: contains a model; give another OUT, or --overwrite")


def read_tokenizer(
    kind: str, source: Path, tokenizer_path: str | None, converted: architectures.Converted
) -> Any:
    """Reads the tokenizer beside the weights, or `tokenizer_path`, and checks its vocabulary."""
    path = Path(tokenizer_path) if tokenizer_path else source if source.is_dir() else source.parent
    text = converted.config.get("text", converted.config)
    is_bert = kind in ("bert", "biclip") or text.get("kind") == "bert"
    try:
        tokenizer = tokenizers.read_tokenizer("bert" if is_bert else "clip", path)
    except UserError as error:
        fix = "" if tokenizer_path else " Or give its file or folder with --tokenizer."
        raise UserError(f"{error}{fix}") from error
    text_encoders.check_vocabulary(path, tokenizer, text["vocab_size"])
    return tokenizer


def read_hf_config(source: Path, activation: str | None) -> dict[str, Any]:
    """Reads the config.json beside the weights; translates open_clip's config; {} without either.

    Args:
      source: File or folder of the weights.
      activation: Overrides the activation of the config; None keeps it.

    Raises:
      UserError: A malformed config file.
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
        raise UserError(f"{path}: invalid JSON ({str(error)[:100]}); download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: found a JSON {type(config).__name__}; expected an object")
    return config


def _from_open_clip(path: Path) -> dict[str, Any]:
    config = _json_object(path)
    if not config:
        return {}
    try:
        model = config["model_cfg"]
        activation = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        vision, text = model["vision_cfg"], model["text_cfg"]
        # open_clip omits defaults, and does not describe encoders of other libraries.
        image_heads = vision.get("width", 768) // vision.get("head_width", 64)
        image = {**activation, "num_attention_heads": image_heads}
        openai_text = {**activation, "num_attention_heads": text.get("heads", 8)}
        return {
            "vision_config": {} if "timm_model_name" in vision else image,
            "text_config": {} if "hf_model_name" in text else openai_text,
        }
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not a valid open_clip config ({error!r}); download it again"
        ) from error


def write_encoder(
    kind: str,
    converted: architectures.Converted,
    tokenizer: Any,
    output: Path,
    origin: dict[str, Any],
) -> str:
    """Writes the folder of an encoder and prints its report; returns its identity."""
    card = f"""# {kind} from {origin["source"]}

Converted by biclip_jax; the licence is that of the original weights.

    model, variables, processor = biclip_jax.load_model("this folder")
"""
    report = converted.report._asdict()
    model_config: dict[str, Any] = {"model": converted.config}
    if kind == "medclipseg":  # contains its encoders; the number of steps is unknown
        model_config |= {
            "encoders_sha256": "",
            "name": origin["source"],
            "data": "unknown",
            "step": 0,
        }
    model_folder.write(
        output,
        config={**model_config, "kind": kind, "origin": {**origin, "report": report}},
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
    """Writes the folder of the published network, which already contains its text encoder."""
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

    segmenter = biclip_jax.load("this folder")
    mask, probability, uncertainty = segmenter.predict("image.png", "a text prompt")
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
    """Runs `biclip convert`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="biclip convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "source", metavar="SOURCE", help="file, folder, or a name on the Hugging Face hub"
    )
    parser.add_argument("output", metavar="OUT", help="output folder, created if missing")
    parser.add_argument("--tokenizer", help="tokenizer file or folder (default: beside SOURCE)")
    parser.add_argument(
        "--activation",
        choices=sorted(ACTIVATIONS),
        help="overrides config.json; without either, quick_gelu for clip and gelu for bert",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens per prompt, for biclip only (default: 32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model in OUT")
    args = parser.parse_args(argv)
    if args.max_length is not None and args.kind != "biclip":
        parser.error("--max-length applies to biclip only; in training set model.text.max_length")
    # Tokenizers need transformers without PyTorch; suppress its warning.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    convert(args)


if __name__ == "__main__":
    main(sys.argv[1:])
