"""Segments images given a text prompt; no reference masks are needed.

    biclip predict xray.png --model runs/qata -o out \\
        --prompt "unilateral pulmonary infection, one infected area, lower left lung."
    biclip predict FOLDER MORE/*.dcm --model runs/qata --prompts-file prompts.csv -o out

INPUT is an image file or a folder of images, without its subfolders: PNG, JPEG, BMP, TIFF, WebP or
DICOM. DICOM files are recognized by their content and shown with their own window. For every image
NAME the command writes NAME_mask.png (0 or 255), NAME_probability.png (16 bit, 65535 = 1) and
NAME_overlay.png at the size of the image, NAME_uncertainty.png with its scale, and one line of
predictions.csv.

Exit status: 0 if all images were segmented, 1 if some could not be read and were skipped, 2 after
an error.
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

# (image, prompt) -> mask, probability, uncertainty, and optionally its epistemic part
Predict = Callable[[np.ndarray, str], tuple[np.ndarray, ...]]


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """Returns the image files of all inputs; folders are sorted by name.

    Raises:
      UserError: A missing file or folder, a folder without images, or two images whose outputs
        would have the same name.
    """
    images = list(dict.fromkeys(image for path in inputs for image in _images_of(path)))
    by_stem: dict[str, Path] = {}
    for image in images:
        first = by_stem.setdefault(image_io.image_stem(image), image)
        if first != image:
            raise UserError(
                f"{image}: its outputs would overwrite those of {first}; rename one of them, or "
                "segment it separately with another -o"
            )
    return images


def _images_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; expected an image or a folder of images")
    images = sorted(p for p in path.iterdir() if _is_image(p))
    if not images:
        suffixes = ", ".join(image_io.SUFFIXES)
        raise UserError(f"{path}: no images in this folder; expected {suffixes}, or DICOM files")
    return images


def _is_image(path: Path) -> bool:
    # Archives name DICOM files arbitrarily, often by numbers with dots.
    return image_io.is_image_name(path) or (path.name != "DICOMDIR" and dicom.is_dicom(path))


def read_window(text: str, images: Sequence[Path]) -> dicom.Window | None:
    """Parses --window; None for an empty string.

    Raises:
      UserError: Not two numbers, a width below 1, or no DICOM file among the images.
    """
    if not text:
        return None
    try:
        center, width = map(float, text.split(","))
    except ValueError:
        center = width = math.nan
    if not (math.isfinite(center) and 1 <= width < math.inf):
        raise UserError(
            f"--window {text}: expected --window=CENTER,WIDTH with a width of at least 1"
        )
    if not any(map(dicom.is_dicom, images)):
        raise UserError("--window: applies to DICOM files only, but there are none; remove it")
    return dicom.Window(center, width)


def read_prompts_file(path: Path, images: Sequence[Path]) -> dict[str, str]:
    """Reads prompts by image name, from a CSV with the columns image and text.

    Raises:
      UserError: The file cannot be read, a column is missing, or an image has no line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from error
    if not {"image", "text"} <= columns:
        raise UserError(
            f"{path}: found the columns {sorted(map(str, columns))}; expected image and text"
        )
    prompts = {row["image"]: row["text"] or "" for row in rows}
    missing = [image.name for image in images if image.name not in prompts]
    if missing:
        raise UserError(
            f"{path}: no line for {', '.join(missing[:5])} ({len(missing)} in total); add them, "
            "with an empty text for images without a prompt"
        )
    return prompts


def predict_image(
    predict_one: Predict, path: Path, image: np.ndarray, prompt: str, output: Path
) -> dict[str, Any]:
    """Writes mask, probability and overlay of one image; returns its line of predictions.csv."""
    mask, probability, uncertainty, *epistemic = predict_one(image, prompt)
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
    for values in epistemic:
        maps |= {"epistemic part": values}
        line["mean_epistemic_nats"] = float(values.mean())
    plots.plot_uncertainty(maps, f"{stem}_uncertainty.png", path.name)
    return line


def predict(args: argparse.Namespace) -> int:
    """Segments all inputs; returns 1 if images were skipped, else 0."""
    images = find_images([Path(path) for path in args.inputs])
    window = read_window(args.window, images)
    prompts: Mapping[str, str] = {image.name: args.prompt for image in images}
    if args.prompts_file:
        prompts = read_prompts_file(Path(args.prompts_file), images)
        _report_unused(args, prompts, images)
    output = _check_output(Path(args.output), images)
    segmenter = inference.load(args.model)
    _warn_about_prompts(segmenter, prompts)
    predict_one = segmenter.predict_samples if segmenter.samples else segmenter.predict
    if args.tta:
        predict_one = segmenter.predict_views
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
        print(f"skipped: {problem}", file=sys.stderr)
    print(f"{len(rows)} of {len(images)} images segmented, in {output}")
    return 1 if problems else 0


def _report_unused(
    args: argparse.Namespace, prompts: Mapping[str, str], images: Sequence[Path]
) -> None:
    unused = sorted(map(str, prompts.keys() - {image.name for image in images}))
    if unused and any(Path(path).is_dir() for path in args.inputs):
        names = ", ".join(unused[:5])
        print(
            f"{args.prompts_file}: no image for {names} ({len(unused)} in total)", file=sys.stderr
        )


def _check_output(output: Path, images: Sequence[Path]) -> Path:
    if output.resolve() in {image.parent.resolve() for image in images}:
        raise UserError(f"{output}: contains the input images; give another -o")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be created ({error.strerror}); give another -o"
        ) from error
    return output


def _warn_about_prompts(segmenter: inference.Segmenter, prompts: Mapping[str, str]) -> None:
    unknown = unknown_words(segmenter.processor.tokenizer, sorted(set(prompts.values())))
    if unknown:
        print(f"words that the model was not trained on: {', '.join(unknown)}", file=sys.stderr)
    if not any(prompts.values()):
        print(
            "no text prompt (--prompt, --prompts-file); a model trained with prompts finds much "
            "less without them",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> None:
    """Runs `biclip predict`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="biclip predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image file or folder of images")
    parser.add_argument(
        "--model", required=True, help="work directory of a training run, or a model folder"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text prompt for all images")
    prompt.add_argument("--prompts-file", metavar="CSV", help="CSV with the columns image and text")
    parser.add_argument(
        "--tta",
        action="store_true",
        help="mean over a flip, rotations and contrast (six forward passes)",
    )
    parser.add_argument(
        "--window",
        default="",
        metavar="CENTER,WIDTH",
        help="window of DICOM files, for example --window=-600,1500",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="output folder, created if missing"
    )
    return predict(parser.parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
