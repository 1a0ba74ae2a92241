"""Overlays of reference and prediction, and figures of cases with uncertainty maps.

The reference is green and the prediction orange, from the color-blind safe palette of Okabe and
Ito; only the prediction is filled. Files are written atomically.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from biclip_jax.core import files

MASK_COLOR = (0, 158, 115)
PRED_COLOR = (230, 159, 0)
BANDS = ("best", "median", "worst")
CASES = 3  # per band
COLUMNS, IMAGE_SIZE, GAP = 3, 256, 14  # cells per row; pixels; pixels
CELL = 2 * IMAGE_SIZE + GAP


def _outline(region: np.ndarray, thickness: int) -> np.ndarray:
    """Returns the outermost `thickness` pixels of a bool (H, W) region; outside is background."""
    inner = region
    for _ in range(thickness):
        p = np.pad(inner, 1)
        inner = inner & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return region & ~inner


def _plane(region: np.ndarray, name: str, shape: tuple[int, int]) -> np.ndarray:
    plane = region[..., 0] if region.ndim == 3 else region
    if plane.shape != shape:
        raise ValueError(f"{name} {region.shape}: expected the size of the image {shape}")
    return plane.astype(bool)


def overlay(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    pred: np.ndarray | None = None,
    alpha: float = 0.35,
) -> np.ndarray:
    """Draws the reference and the prediction on an image.

    Args:
      image: (H, W), (H, W, 1) or (H, W, 3) uint8.
      mask: Reference (H, W) or (H, W, 1), bool or 0/1: green outline, drawn last.
      pred: Prediction of the same type: orange outline and a fill of opacity `alpha`.
      alpha: In [0, 1]; 0 draws only the outline.

    Returns:
      (H, W, 3) uint8. Outlines are one pixel thick per 160 of the longer side.
    """
    channels = image if image.ndim == 3 else image[..., None]
    canvas = np.broadcast_to(channels, (*channels.shape[:2], 3)).copy()
    thickness = max(1, round(max(canvas.shape) / 160))
    if pred is not None:
        region = _plane(pred, "pred", canvas.shape[:2])
        blend = (1 - alpha) * canvas[region] + alpha * np.array(PRED_COLOR)
        canvas[region] = np.round(blend).astype(np.uint8)
        canvas[_outline(region, thickness)] = PRED_COLOR
    if mask is not None:
        region = _plane(mask, "mask", canvas.shape[:2])
        canvas[_outline(region, thickness)] = MASK_COLOR
    return canvas


def bands(scores: Sequence[float]) -> dict[str, list[int]]:
    """Returns the rows of the best, median and worst `CASES` scores: {band: rows}."""
    order = np.argsort(np.asarray(scores, float), kind="stable").tolist()
    middle = max(len(order) // 2 - CASES // 2, 0)
    chosen = (order[::-1][:CASES], order[middle : middle + CASES], order[:CASES])
    return dict(zip(BANDS, chosen, strict=True))


def overlay_figure(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str) -> None:
    """Writes a PNG of cases in three bands: best, median, worst.

    A cell shows the image, the overlay, and below them id, Dice and prompt. Text is wrapped to the
    width of the cell; rows grow with their text.

    Args:
      rows: Cases with band ("best", "median" or "worst"), id, image, mask, pred (see `overlay`),
        dice (None is shown as "-") and text.
      path: Path of the PNG.
      title: Title of the figure.

    Raises:
      ValueError: A band is unknown.
    """
    unknown = {row["band"] for row in rows} - set(BANDS)
    if unknown:
        raise ValueError(f"bands {sorted(unknown)}: expected {', '.join(BANDS)}")
    page_width = COLUMNS * CELL + 2 * (COLUMNS - 1) * GAP
    blocks = [_text_block(title, page_width, size=26, bold=True), _legend()]
    for band in BANDS:
        cells = [_cell(row) for row in rows if row["band"] == band]
        if cells:
            blocks.append(_text_block(band.capitalize(), page_width, size=20, bold=True))
        for start in range(0, len(cells), COLUMNS):
            blocks.append(_stack(cells[start : start + COLUMNS], 2 * GAP, across=True))
    page = ImageOps.expand(_stack(blocks, 20), 2 * GAP, "white")
    with files.atomic_write(path) as part:
        page.save(part, format="PNG")


def uncertainty_figure(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str
) -> None:
    """Writes a PNG of cases: image, prediction, reference and entropy map, with the prompt.

    Args:
      rows: Cases as in `overlay_figure`, with uncertainty (H, W), the entropy in nats; black is 0,
        yellow ln 2.
      path: Path of the PNG.
      title: Title of the figure.
    """
    width = 4 * IMAGE_SIZE + 3 * GAP
    names = ("image", "prediction", "reference", "entropy")
    heads = [_text_block(name, IMAGE_SIZE, size=16, bold=True) for name in names]
    headline = _text_block(title, width, size=26, bold=True)
    blocks = [headline, _entropy_scale(), _stack(heads, GAP, across=True)]
    for row in rows:
        label = f"{row['band'].capitalize()} | Dice {_dice(row)} | {row['id']}"
        blocks += [
            _stack(_tiles(row), GAP, across=True),
            _text_block(label, width, size=16, bold=True),
            _text_block(row["text"] or "(no prompt)", width, size=16),
        ]
    page = ImageOps.expand(_stack(blocks, 8), 2 * GAP, "white")
    with files.atomic_write(path) as part:
        page.save(part, format="PNG")


def _entropy_scale() -> Image.Image:
    bar = Image.fromarray(_heat(np.linspace(0, math.log(2), IMAGE_SIZE)[None].repeat(22, 0)))
    ends = [_text_block(text, 200, size=16) for text in ("entropy: 0 (certain)", "ln 2 (p = 0.5)")]
    return _stack([ends[0], bar, ends[1]], GAP, across=True)


def _heat(entropy: np.ndarray) -> np.ndarray:
    """Maps entropies (H, W) in nats to colors (H, W, 3): black is 0, yellow ln 2."""
    import matplotlib

    share = np.clip(entropy / math.log(2), 0, 1)
    return (255 * matplotlib.colormaps["inferno"](share)[..., :3]).astype(np.uint8)


def _tiles(row: Mapping[str, Any]) -> list[Image.Image]:
    heat = _heat(row["uncertainty"])
    image, heat = (_fit(pixels, Image.Resampling.LANCZOS) for pixels in (row["image"], heat))
    mask, pred = (_fit(row[name], Image.Resampling.NEAREST) for name in ("mask", "pred"))
    drawn = (overlay(image), overlay(image, pred=pred), overlay(image, mask), heat)
    return [
        ImageOps.pad(Image.fromarray(d), (IMAGE_SIZE, IMAGE_SIZE), color="#EEEEEE") for d in drawn
    ]


def _dice(row: Mapping[str, Any]) -> str:
    return "-" if row["dice"] is None else f"{row['dice']:.4f}"


def _cell(row: Mapping[str, Any]) -> Image.Image:
    image = _fit(row["image"], Image.Resampling.LANCZOS)
    mask, pred = (_fit(row[name], Image.Resampling.NEAREST) for name in ("mask", "pred"))
    square = (IMAGE_SIZE, IMAGE_SIZE)
    plain, annotated = (
        ImageOps.pad(Image.fromarray(pixels), square, color="#EEEEEE")
        for pixels in (overlay(image), overlay(image, mask, pred))
    )
    label = _text_block(f"Dice {_dice(row)} | {row['id']}", CELL, size=16, bold=True)
    prompt = _text_block(row["text"] or "(no prompt)", CELL, size=16)
    return _stack([_stack([plain, annotated], GAP, across=True), label, prompt], 5)


def _fit(image: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    """Scales (H, W[, C]) to a longer side of IMAGE_SIZE; bool becomes uint8."""
    image = image[..., 0] if image.shape[2:] == (1,) else image
    scale = IMAGE_SIZE / max(image.shape[:2])
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image.astype(np.uint8)).resize((width, height), resample))


def _legend() -> Image.Image:
    entries = ((MASK_COLOR, "reference (outline)"), (PRED_COLOR, "prediction (filled)"))
    blocks: list[Image.Image] = []
    for color, name in entries:
        blocks += [Image.new("RGB", (22, 22), color), _text_block(name, 200, size=16)]
    return _stack(blocks, GAP, across=True)


def _text_block(text: str, width: int, size: int, bold: bool = False) -> Image.Image:
    """Renders wrapped text, black on white, `width` pixels wide."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)
    lines = _wrap(text, font, width)
    line_height = sum(font.getmetrics()) + 2
    block = Image.new("RGB", (width, line_height * len(lines)), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(block).text((0, row * line_height), line, font=font, fill="black")
    return block


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line] or [""]


def _stack(images: Sequence[Image.Image], gap: int, across: bool = False) -> Image.Image:
    """Stacks images vertically, or horizontally if `across`, on white."""
    widths, heights = zip(*(image.size for image in images), strict=True)
    gaps = gap * (len(images) - 1)
    size = (sum(widths) + gaps, max(heights)) if across else (max(widths), sum(heights) + gaps)
    sheet, offset = Image.new("RGB", size, "white"), 0
    for image in images:
        sheet.paste(image, (offset, 0) if across else (0, offset))
        offset += gap + (image.width if across else image.height)
    return sheet
