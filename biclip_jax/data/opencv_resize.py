"""OpenCV's two plain ways to resize, to the bit, in numpy: some models were trained on them.

Neither averages when it shrinks. Having them here, prepared pictures depend on no further library.
"""

from __future__ import annotations

import numpy as np

_UNIT = 2048  # weights are integers, this one being 1


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) uint8 to (height, width, C) uint8, as cv2.resize with INTER_LINEAR.

    The two nearest pixels are weighed in integers, first across, then down; the shifts drop the
    same bits as OpenCV's do. Checked against releases 4.14 and 5.0.
    """
    columns, across = _neighbours(image.shape[1], width)
    rows, down = _neighbours(image.shape[0], height)
    total = np.full((height, width, image.shape[2]), 2, np.int32)
    for row, weight in zip(rows, down, strict=True):
        pixels = image[row].astype(np.int32)
        line = sum(pixels[:, c] * w[:, None] for c, w in zip(columns, across, strict=True))
        total += ((line >> 4) * weight[:, None, None]) >> 16
    return (total >> 2).astype(np.uint8)


def nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, ...) of any dtype to (height, width, ...), as cv2.resize with INTER_NEAREST.

    Index i becomes floor(i H / height): the corner of the pixel decides, not its centre.
    """
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * _scale(old, new)).astype(np.int64), old - 1)
        for old, new in zip(mask.shape, (height, width), strict=False)
    )
    return mask[rows][:, columns]


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights (2, new) of the pixels before and after each new pixel's centre."""
    place = ((np.arange(new) + 0.5) * _scale(old, new) - 0.5).astype(np.float32)
    before = np.floor(place)
    share = place - before
    index = np.stack([before, before + 1]).astype(np.int64)
    weights = np.rint(np.stack([1 - share, share]) * np.float32(_UNIT)).astype(np.int32)
    return np.clip(index, 0, old - 1), weights


def _scale(old: int, new: int) -> float:
    # Not old / new: it rounds otherwise, and now and then an index depends on it.
    return 1 / (new / old)
