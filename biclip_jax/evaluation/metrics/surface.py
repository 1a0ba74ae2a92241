"""Surface metrics: normalized surface Dice (NSD) of single images.

`dsc` and `surface_dice_plate` reproduce the scores of the MedCLIPSeg reference; compare them only
with its tables. `surface_dice` is a 2-D boundary measure and usually much lower than
`surface_dice_plate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from biclip_jax.data import opencv_resize, pipeline
from biclip_jax.data.schema import Record
from biclip_jax.evaluation.metrics import overlap

TOLERANCE = 2.0  # pixels
EPSILON = 1e-8  # in the denominator of the reference's Dice

# Area of the marching-cubes surface in a cell of 2 x 2 x 2 voxels, one layer of which belongs to
# the plate, by the pattern of its 2 x 2 foreground pixels. The surface runs midway between
# foreground and background voxels: a cut corner; a slope of 1 x sqrt(1/2); two cut corners; half a
# flat pixel and a trapezoid; a flat pixel.
_ONE = np.sqrt(3) / 8
_SIDE = np.sqrt(1 / 2)
_DIAGONAL = 2 * _ONE
_THREE = 1 / 2 + 3 * _ONE
# Rows: the lower pixels, columns: the upper pixels; none, left, right, both.
_CELL_AREAS = np.array(
    [
        [0, _ONE, _ONE, _SIDE],
        [_ONE, _SIDE, _DIAGONAL, _THREE],
        [_ONE, _DIAGONAL, _SIDE, _THREE],
        [_SIDE, _THREE, _THREE, 1],
    ]
)


def dsc(prediction: np.ndarray, mask: np.ndarray) -> float:
    """Computes the Dice of one image as the MedCLIPSeg reference: 2 |P n M| / (|P| + |M| + 1e-8).

    Args:
      prediction, mask: (H, W), bool or 0/1.

    Returns:
      A value in [0, 1]; 1 if both are empty, 0 if exactly one is.

    Raises:
      ValueError: The shapes differ or are not (H, W).
    """
    prediction, mask = _as_pair(prediction, mask)
    if not (prediction.any() or mask.any()):
        return 1.0
    intersection = np.count_nonzero(prediction & mask)
    return 2 * intersection / (np.count_nonzero(prediction) + np.count_nonzero(mask) + EPSILON)


def surface_dice_plate(
    prediction: np.ndarray, mask: np.ndarray, tolerance: float = TOLERANCE
) -> float:
    """Computes the "NSD" of the MedCLIPSeg reference, which is NOT a 2-D boundary measure.

    The reference treats the masks as volumes of one slice. The two flat faces of this plate, with
    the whole area of the mask, count as surface. The value therefore follows the Dice and is much
    higher than `surface_dice`: for two discs of radius 20, shifted by 4 rows and 3 columns, it is
    0.933, while the Dice is 0.840 and `surface_dice` 0.277. It is the share of the area of both
    surfaces that lies within `tolerance` of the other surface (Nikolov et al., arXiv:1809.04430).
    The two layers of cells of a plate are equal, so one layer, in 2-D, is enough.

    Args:
      prediction, mask: (H, W), bool or 0/1; outside is background.
      tolerance: Largest distance in pixels that counts as near.

    Returns:
      A value in [0, 1]; 1 if both are empty, 0 if exactly one is.

    Raises:
      ValueError: The shapes differ or are not (H, W).
    """
    return _within(prediction, mask, tolerance, _plate)


def surface_dice(prediction: np.ndarray, mask: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Computes the 2-D normalized surface Dice (NSD).

    It is the share of both boundaries that lies within `tolerance` of the other boundary. A
    boundary consists of the foreground pixels with a background pixel above, below, left or right.
    Every boundary pixel has weight 1, whatever the direction of the contour.

    Args:
      prediction, mask: (H, W), bool or 0/1; outside is background.
      tolerance: Largest distance between pixel centers, in pixels, that counts as near.

    Returns:
      A value in [0, 1]; 1 if both are empty, 0 if exactly one is.

    Raises:
      ValueError: The shapes differ or are not (H, W).
    """
    return _within(prediction, mask, tolerance, _boundary)


MEASURES = {"dsc": dsc, "nsd_plate": surface_dice_plate, "nsd_2d": surface_dice}


def per_image(
    predict: Callable[[Any], np.ndarray],
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]],
    records: Sequence[Record],
    batch_size: int,
) -> dict[str, list[float]]:
    """Computes all `MEASURES` of N images with their original prompts: {name: N values}.

    As in the MedCLIPSeg reference, the masks at model resolution, not the probabilities, are
    resized to the size of each reference mask by nearest neighbor. The tolerance refers to that
    size.

    Args:
      predict: Function from a batch to probabilities (B, S, S, 1).
      encode: Function from prompts to the text fields of a batch.
      records: N records.
      batch_size: Images per batch.
    """
    texts = encode([record["text"] for record in records])
    scores: dict[str, list[float]] = {name: [] for name in MEASURES}
    for batch in pipeline.eval_batches(records, texts, batch_size=batch_size):
        masks = predict(batch)[..., 0] >= overlap.THRESHOLD
        for i in np.flatnonzero(batch["valid"]):
            truth = records[int(batch["index"][i])]["full_mask"][..., 0]
            prediction = opencv_resize.nearest(masks[i], *truth.shape)
            for name, measure in MEASURES.items():
                scores[name].append(measure(prediction, truth))
    return scores


def summarize(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns the surface_metrics section of results.json: the means of `per_image`."""
    return {
        **{name: float(np.mean(values)) for name, values in scores.items()},
        "tolerance": TOLERANCE,
        "num_images": len(scores["dsc"]),
        "size": "each mask's own size, masks resized by nearest neighbour",
    }


def _within(
    prediction: np.ndarray,
    mask: np.ndarray,
    tolerance: float,
    measure: Callable[[np.ndarray], np.ndarray],
) -> float:
    """Returns the share of both surfaces (see `measure`) within `tolerance` of the other."""
    from scipy import ndimage

    prediction, mask = _as_pair(prediction, mask)
    if not (prediction.any() and mask.any()):
        return float(prediction.any() == mask.any())
    pred, true = (measure(np.pad(part, 1)) for part in _cropped(prediction, mask))
    near_true, near_pred = (
        ndimage.distance_transform_edt(other == 0) <= tolerance for other in (true, pred)
    )
    near = pred[near_true].sum() + true[near_pred].sum()
    return float(near / (pred.sum() + true.sum()))


def _plate(padded: np.ndarray) -> np.ndarray:
    """Returns the surface areas (H - 1, W - 1) of both layers of cells of a padded mask (H, W)."""
    bits = padded.astype(np.int64)
    pairs = bits[:, :-1] + 2 * bits[:, 1:]
    return 2 * _CELL_AREAS[pairs[1:], pairs[:-1]]


def _boundary(padded: np.ndarray) -> np.ndarray:
    """Returns 1.0 at the boundary pixels (H, W) of a padded mask, 0.0 elsewhere."""
    from scipy import ndimage

    return (padded & ~ndimage.binary_erosion(padded)).astype(np.float64)


def _cropped(*masks: np.ndarray) -> list[np.ndarray]:
    """Crops the masks to the bounding box of their union; there is no surface outside."""
    union = np.logical_or.reduce(masks)
    rows, columns = (np.flatnonzero(union.any(axis)) for axis in (1, 0))
    return [m[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] for m in masks]


def _as_pair(prediction: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction.ndim != 2 or prediction.shape != mask.shape:
        raise ValueError(
            f"prediction {prediction.shape} and mask {mask.shape}: expected one shape (H, W)"
        )
    return prediction != 0, mask != 0
