"""Segments pictures with the help of a sentence; no mask is needed anywhere.

    python -m biclip_jax.predict --workdir runs/qata --image xray.png \\
        --text "unilateral pulmonary infection, one infected area, lower left lung." --output out
    python -m biclip_jax.predict --workdir runs/qata --image FOLDER --texts sentences.csv \\
        --output out

Pictures are PNG, JPEG, BMP, TIFF, WebP or DICOM files; DICOM files are known by what is in them
and shown by the window that they name. For every picture NAME: NAME_mask.png (0 or 255),
NAME_probability.png (16 bit, 65535 = 1) and NAME_overlay.png at the picture's own size,
NAME_uncertainty.png with its scale, and one line in predictions.csv. The exit status is 0 where all
pictures were segmented, 1 where some could not be read and were left out, 2 where nothing was done.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax import inference
from biclip_jax.core import runtime
from biclip_jax.core.errors import BadImageError, UserError
from biclip_jax.data import dicom, image_io
from biclip_jax.data.text import unknown_words
from biclip_jax.evaluation.report import figures, plots, tables

# (picture, sentence) -> mask, probability, uncertainty, and the part of it that is epistemic
Predict = Callable[[np.ndarray, str], tuple[np.ndarray, ...]]


def find_images(path: Path) -> list[Path]:
    """The picture itself, or the pictures of a folder by name.

    Raises:
      UserError: nothing there, or two pictures whose outputs would have one name.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give --image a picture or a folder")
    found = sorted(p for p in path.iterdir() if _is_image(p))
    if not found:
        suffixes = ", ".join(image_io.SUFFIXES)
        raise UserError(f"{path}: no picture in this folder; expected {suffixes}, or DICOM files")
    seen: dict[str, Path] = {}
    for image in found:
        before = seen.setdefault(image_io.image_stem(image), image)
        if before != image:
            raise UserError(
                f"{image}: its outputs would overwrite those of {before.name}; rename one of them"
            )
    return found


def _is_image(path: Path) -> bool:
    # Archives name DICOM files as they like, often by numbers with dots.
    return image_io.is_image_name(path) or (path.name != "DICOMDIR" and dicom.is_dicom(path))


def read_window(text: str, images: Sequence[Path]) -> dicom.Window | None:
    """The window of --window, None for an empty text.

    Raises:
      UserError: no two numbers, a width below 1, or no DICOM file among the pictures.
    """
    if not text:
        return None
    try:
        center, width = map(float, text.split(","))
    except ValueError:
        center = width = math.nan
    if not (math.isfinite(center) and 1 <= width < math.inf):
        raise UserError(f"--window {text}: expected --window=CENTER,WIDTH, width from 1")
    if not any(map(dicom.is_dicom, images)):
        raise UserError("--window: of DICOM files alone, and there is none; leave it out")
    return dicom.Window(center, width)


def read_prompts_file(path: Path, images: Sequence[Path]) -> dict[str, str]:
    """Sentences by picture name, from a CSV with the columns image and text.

    Raises:
      UserError: the file cannot be read, a column is missing, or a picture has no line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from error
    columns = set(rows[0]) if rows else set()
    if not {"image", "text"} <= columns:
        raise UserError(
            f"{path}: its columns are {sorted(map(str, columns))}; expected image and text"
        )
    prompts = {row["image"]: row["text"] or "" for row in rows}
    missing = [image.name for image in images if image.name not in prompts]
    if missing:
        raise UserError(
            f"{path}: no line for {', '.join(missing[:5])} ({len(missing)} in all); "
            "add them, with an empty text where there is no sentence"
        )
    return prompts


def predict_image(
    predict_one: Predict, path: Path, image: np.ndarray, prompt: str, output: Path
) -> dict[str, Any]:
    """Writes one picture's mask, probability and overlay; returns its line of predictions.csv."""
    mask, probability, uncertainty, *parts = predict_one(image, prompt)
    stem = output / image_io.image_stem(path)
    image_io.write_png(f"{stem}_mask.png", mask.astype(np.uint8) * 255)
    scaled = np.rint(probability.clip(0, 1) * 65535).astype(np.uint16)
    image_io.write_png(f"{stem}_probability.png", scaled)
    image_io.write_png(f"{stem}_overlay.png", figures.overlay(image, pred=mask))
    maps = {"entropy": uncertainty}
    line = {
        "image": path.name,
        "text": prompt,
        "foreground_share": float(mask.mean()),
        "mean_uncertainty_nats": float(uncertainty.mean()),
    }
    for epistemic in parts:
        maps |= {"of it epistemic": epistemic}
        line["mean_epistemic_nats"] = float(epistemic.mean())
    plots.plot_uncertainty(maps, f"{stem}_uncertainty.png", path.name)
    return line


def predict(args: argparse.Namespace) -> int:
    """Runs what the command line describes; returns 1 where pictures were left out, else 0."""
    images = find_images(Path(args.image))
    window = read_window(args.window, images)
    prompts: Mapping[str, str] = {image.name: args.text for image in images}
    if args.texts:
        prompts = read_prompts_file(Path(args.texts), images)
        unused = sorted(map(str, prompts.keys() - {image.name for image in images}))
        if unused and Path(args.image).is_dir():
            listed = ", ".join(unused[:5])
            print(f"{args.texts}: no picture for {listed} ({len(unused)} in all)", file=sys.stderr)
    segmenter = inference.load(args.workdir)
    unknown = unknown_words(segmenter.processor.tokenizer, sorted(set(prompts.values())))
    if unknown:
        print(f"words that this model never saw: {', '.join(unknown)}", file=sys.stderr)
    if not any(prompts.values()):
        print(
            "no sentence was given (--text, --texts); a model that was trained with sentences "
            "finds much less without them",
            file=sys.stderr,
        )
    predict_one = segmenter.predict_samples if segmenter.samples else segmenter.predict
    if args.tta:
        predict_one = segmenter.predict_views
    output = Path(args.output)
    if output.resolve() == images[0].parent.resolve():
        raise UserError(f"{output}: holds the pictures themselves; give another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror}); choose another") from error
    rows, problems = [], []
    for path in images:
        try:
            image = image_io.read_image(path, window)
        except BadImageError as error:
            problems.append(str(error))
            continue
        rows.append(predict_image(predict_one, path, image, prompts[path.name], output))
    if rows:
        tables.write_csv(output / "predictions.csv", rows)
        print(tables.format_table(rows, list(rows[0])))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"{len(rows)} of {len(images)} pictures segmented, in {output}")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a training run, or a model folder")
    parser.add_argument("--image", required=True, help="a picture or a folder of pictures")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--text", default="", help="the sentence, for every picture")
    prompt.add_argument("--texts", help="CSV with the columns image and text")
    parser.add_argument(
        "--tta", action="store_true", help="the mean over flips, rotations, contrast: six passes"
    )
    parser.add_argument(
        "--window", default="", metavar="CENTER,WIDTH", help="of DICOM files, as --window=-600,1500"
    )
    parser.add_argument("--output", required=True, help="folder, made if missing")
    return predict(parser.parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
