"""How well two masks agree by area and by boundary, one image at a time.

`dsc` and `surface_dice_plate` are the scores of the MedCLIPSeg reference, to be compared with its
tables alone; `surface_dice` is a 2-D boundary measure, usually much lower than the plate's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from biclip_jax.data import opencv_resize, pipeline
from biclip_jax.data.schema import Record
from biclip_jax.evaluation.metrics import overlap

TOLERANCE = 2.0  # pixels
EPSILON = 1e-8  # the reference's, in the denominator of its Dice

# Area of the surface through a cell of 2 x 2 x 2 voxels one layer of which is the plate, by which
# of its 2 x 2 pixels are foreground. It runs midway between voxels in and out, as marching cubes
# draws it: a cut corner; a slope of 1 x sqrt(1/2); two cut corners; half a flat pixel and a
# trapezoid; a flat pixel.
_ONE = np.sqrt(3) / 8
_SIDE = np.sqrt(1 / 2)
_DIAGONAL = 2 * _ONE
_THREE = 1 / 2 + 3 * _ONE
# By the pixels below, then above: none, the left one, the right one, both.
_CELL_AREAS = np.array(
    [
        [0, _ONE, _ONE, _SIDE],
        [_ONE, _SIDE, _DIAGONAL, _THREE],
        [_ONE, _DIAGONAL, _SIDE, _THREE],
        [_SIDE, _THREE, _THREE, 1],
    ]
)


def dsc(prediction: np.ndarray, mask: np.ndarray) -> float:
    """The MedCLIPSeg reference's Dice of one image: 2 |P n M| / (|P| + |M| + 1e-8).

    Args:
      prediction, mask: (H, W), bool or 0/1.

    Returns:
      In [0, 1]; 1 where both are empty, 0 where one is.

    Raises:
      ValueError: other shapes, or two of them.
    """
    prediction, mask = _as_pair(prediction, mask)
    if not (prediction.any() or mask.any()):
        return 1.0
    overlap = np.count_nonzero(prediction & mask)
    return 2 * overlap / (np.count_nonzero(prediction) + np.count_nonzero(mask) + EPSILON)


def surface_dice_plate(
    prediction: np.ndarray, mask: np.ndarray, tolerance: float = TOLERANCE
) -> float:
    """The MedCLIPSeg reference's "NSD": of plates one voxel thick, NOT a 2-D boundary measure.

    The masks are taken for volumes of one slice, whose two flat faces, all of the mask's area,
    count as surface. So it follows the Dice and is much higher than `surface_dice`: of two discs of
    radius 20, one 4 pixels down and 3 across, 0.933 where Dice is 0.840 and `surface_dice` 0.277.
    It is the share of both surfaces' area that lies within `tolerance` of the other surface
    (Nikolov et al., arXiv:1809.04430). Both layers of cells of a plate are alike and see the same
    distances, so one of them, in 2-D, is enough.

    Args:
      prediction, mask: (H, W), bool or 0/1; beyond their edges is background.
      tolerance: in pixels, included.

    Returns:
      In [0, 1]; 1 where both are empty, 0 where one is.

    Raises:
      ValueError: other shapes, or two of them.
    """
    return _within(prediction, mask, tolerance, _plate)


def surface_dice(prediction: np.ndarray, mask: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """The 2-D normalized surface distance: the share of both boundaries near the other one.

    A boundary is the foreground pixels with a background pixel above, below, left or right; each
    counts as one, whatever the direction of the contour there.

    Args:
      prediction, mask: (H, W), bool or 0/1; beyond their edges is background.
      tolerance: in pixels between pixels' centres, included.

    Returns:
      In [0, 1]; 1 where both are empty, 0 where one is.

    Raises:
      ValueError: other shapes, or two of them.
    """
    return _within(prediction, mask, tolerance, _boundary)


MEASURES = {"dsc": dsc, "nsd_plate": surface_dice_plate, "nsd_2d": surface_dice}


def per_image(
    predict: Callable[[Any], np.ndarray],
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]],
    records: Sequence[Record],
    batch_size: int,
) -> dict[str, list[float]]:
    """All `MEASURES` of N pictures with their right sentences, {name: N values}.

    As the MedCLIPSeg reference does it, the masks at the model's own size, not the probabilities,
    are brought to each ground truth's size, by nearest neighbour. The tolerance is of that size.

    Args:
      predict: batch -> probabilities (B, S, S, 1).
      encode: sentences -> the sentence fields of a batch.
      records: N of them.
      batch_size: pictures at a time.
    """
    texts = encode([record["text"] for record in records])
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for batch in pipeline.eval_batches(records, texts, batch_size=batch_size):
        masks = predict(batch)[..., 0] >= overlap.THRESHOLD
        for i in np.flatnonzero(batch["valid"]):
            truth = records[int(batch["index"][i])]["full_mask"][..., 0]
            prediction = opencv_resize.nearest(masks[i], *truth.shape)
            for name, measure in MEASURES.items():
                found[name].append(measure(prediction, truth))
    return found


def summarize(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What results.json holds of `per_image`: means over the pictures, and how they were taken."""
    return {
        **{name: float(np.mean(values)) for name, values in found.items()},
        "tolerance": TOLERANCE,
        "num_images": len(found["dsc"]),
        "size": "each mask's own size, masks resized by nearest neighbour",
    }


def _within(
    prediction: np.ndarray,
    mask: np.ndarray,
    tolerance: float,
    measure: Callable[[np.ndarray], np.ndarray],
) -> float:
    """The share of what `measure` finds of both that lies within `tolerance` of the other's."""
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
    """(H, W) bool, padded, to the areas (H - 1, W - 1) of both layers of the plate's cells."""
    bits = padded.astype(np.int64)
    pairs = bits[:, :-1] + 2 * bits[:, 1:]
    return 2 * _CELL_AREAS[pairs[1:], pairs[:-1]]


def _boundary(padded: np.ndarray) -> np.ndarray:
    """(H, W) bool, padded, to the pixels (H, W) on the boundary, 1.0 each."""
    return (padded & ~ndimage.binary_erosion(padded)).astype(np.float64)


def _cropped(*masks: np.ndarray) -> list[np.ndarray]:
    """The smallest rectangle that holds all foreground; nothing outside it has a surface."""
    ensemble_with = np.logical_or.reduce(masks)
    rows, columns = (np.flatnonzero(ensemble_with.any(axis)) for axis in (1, 0))
    return [m[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] for m in masks]


def _as_pair(prediction: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction.ndim != 2 or prediction.shape != mask.shape:
        raise ValueError(
            f"prediction {prediction.shape} and mask {mask.shape}: expected one shape (H, W)"
        )
    return prediction != 0, mask != 0
