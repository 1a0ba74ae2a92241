"""Published results, for comparison in reports.

Values are in percent. Global and mean Dice (see `metrics.overlap`) are never compared with each
other. The number of test images is that of the public split; papers rarely state it.
"""

from __future__ import annotations

from typing import NamedTuple


class PublishedResult(NamedTuple):
    """One published result of one method.

    Attributes:
      data: Name of the dataset, as in `config.data.name`.
      method: Name of the method in its paper.
      kind: "global" or "mean".
      dice: Dice in percent.
      iou: IoU in percent; None if not reported.
      num_images: Size of the test split.
      source: Where the result was published.
      labels: Share of the training labels, in percent.
    """

    data: str
    method: str
    kind: str
    dice: float
    iou: float | None
    num_images: int
    source: str
    labels: float = 100


class CorruptedResult(NamedTuple):
    """One published result on corrupted images, global Dice.

    Attributes:
      data, method, source: As in `PublishedResult`.
      name, severity: The corruption with the same parameter; severity None if the unit is not
        stated.
      setting: The setting in the words of the source.
      dice: Global Dice in percent.
    """

    data: str
    method: str
    name: str
    severity: int | None
    setting: str
    dice: float
    source: str


BICLIP = "arXiv 2603.00156"
TIRNET = "arXiv 2606.27794"
RERUN = f"{TIRNET} (reproduced)"
UNKNOWN = "not recorded"
QATA, MOSMED = ("qata_cov19", 2113), ("mosmed_plus", 273)


def _rows(
    data: tuple[str, int], kind: str, *rows: tuple[str, float, float | None, str]
) -> list[PublishedResult]:
    return [
        PublishedResult(data[0], m, kind, dice, iou, data[1], source)
        for m, dice, iou, source in rows
    ]


def _shares(data: tuple[str, int], method: str, *dice: float) -> list[PublishedResult]:
    shares = zip((25, 10, 5, 1), dice, strict=True)
    return [
        PublishedResult(data[0], method, "global", d, None, data[1], BICLIP, s) for s, d in shares
    ]


RESULTS: tuple[PublishedResult, ...] = (
    *_rows(
        QATA,
        "global",
        ("CMMG-UNet", 91.45, 84.22, UNKNOWN),
        ("TIRNet", 91.23, 83.88, TIRNET),
        ("LViT", 90.63, 82.86, RERUN),
        ("BiCLIP", 90.59, 82.81, BICLIP),
        ("EF-UNet", 90.46, 82.58, "arXiv 2510.12482"),
        ("nnU-Net", 87.37, None, RERUN),
        ("U-Net", 86.66, None, RERUN),
    ),
    *_rows(
        QATA,
        "mean",
        ("C2Seg", 85.25, 76.97, "ICLR 2026"),
        ("TIRNet", 84.77, 76.47, TIRNET),
        ("LViT", 83.40, 74.78, RERUN),
        ("nnU-Net", 79.13, None, RERUN),
        ("U-Net", 78.46, None, RERUN),
    ),
    *_rows(
        MOSMED,
        "global",
        ("TIRNet", 81.38, None, TIRNET),
        ("BiCLIP", 80.80, 67.79, BICLIP),
        ("EF-UNet", 80.50, None, BICLIP),
        ("nnU-Net", 80.46, None, UNKNOWN),
    ),
    *_rows(
        MOSMED,
        "mean",
        ("TIRNet", 75.41, None, TIRNET),
        ("nnU-Net", 73.18, None, UNKNOWN),
    ),
    *_shares(QATA, "BiCLIP", 88.78, 87.14, 84.92, 74.79),
    *_shares(QATA, "EF-UNet", 88.78, 87.84, 84.87, 66.76),
    *_shares(MOSMED, "BiCLIP", 72.18, 68.29, 64.71, 46.49),
    *_shares(MOSMED, "EF-UNet", 65.63, 64.24, 55.48, 33.68),
)

_NOISE = "low-dose noise, level {} of 3, unit not stated"


def _corrupted(
    name: str, severity: int | None, setting: str, **dice: float
) -> list[CorruptedResult]:
    methods = {"biclip": "BiCLIP", "ef_unet": "EF-UNet", "lvit": "LViT"}
    return [
        CorruptedResult("qata_cov19", methods[m], name, severity, setting, d, BICLIP)
        for m, d in dice.items()
    ]


CORRUPTED: tuple[CorruptedResult, ...] = (
    *_corrupted("motion_blur", 2, "motion blur, kernel 7", biclip=88.01, ef_unet=87.20),
    *_corrupted("motion_blur", 4, "motion blur, kernel 15", biclip=85.91, ef_unet=79.32),
    *_corrupted("gaussian_noise", 3, "Gaussian noise, sd 0.1", biclip=87.23, ef_unet=82.15),
    *_corrupted("low_contrast", 3, "low contrast, 0.5", biclip=88.76, ef_unet=85.41),
    *_corrupted("low_dose_ct", None, _NOISE.format(1), biclip=81.90, ef_unet=70.97, lvit=70.07),
    *_corrupted("low_dose_ct", None, _NOISE.format(2), biclip=78.03, ef_unet=67.68, lvit=68.27),
    *_corrupted("low_dose_ct", None, _NOISE.format(3), biclip=74.84, ef_unet=65.70, lvit=67.60),
)


def published_on(data: str) -> list[PublishedResult]:
    """Returns the results on a dataset, best first within each kind and label fraction."""
    rows = [row for row in RESULTS if row.data == data]
    return sorted(rows, key=lambda row: (-row.labels, row.kind, -row.dice))


def published_on_corrupted(data: str) -> list[CorruptedResult]:
    """Returns the results on corrupted images of a dataset."""
    return [row for row in CORRUPTED if row.data == data]
