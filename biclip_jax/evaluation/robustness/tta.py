"""Means over several answers, and how much they disagree: of a few fixed views, or of members.

A view changes the picture, the model segments it, and the probabilities are brought back to the
picture's own pixels. A flip swaps the sides of the sentence, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

ROTATION = 10.0  # degrees
CONTRASTS = (0.9, 1.1)
SWAPPED = "swapped_"  # before the names of the mirrored sentences' fields

# (batch) -> probabilities (B, S, S, 1), on the host
Predict = Callable[[Any], np.ndarray]
# (B, S, S, C) float32 -> the same
Change = Callable[[np.ndarray], np.ndarray]


class View(NamedTuple):
    """One way of looking at a picture.

    Attributes:
      change: of pictures (B, S, S, C) float32 in [0, 255].
      restore: of maps (B, S, S, 1), back to the picture; 0 where the view did not see it.
      mirrored: whether the view takes the mirrored sentence.
    """

    change: Change
    restore: Change
    swapped: bool = False


def identity(image: np.ndarray) -> np.ndarray:
    """The picture as it is."""
    return image


def flip(image: np.ndarray) -> np.ndarray:
    """Left and right swapped, (B, S, S, C)."""
    return image[:, :, ::-1]


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """clip(m + factor (x - m)), m each picture's mean; (B, S, S, C) in [0, 255]."""
    mean = image.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float32)
    return np.clip(mean + np.float32(factor) * (image - mean), 0, 255)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise about the centre, bilinear, black outside; (B, S, S, C) float32."""
    return np.asarray(_rotate(image, jnp.deg2rad(jnp.float32(degrees))))


@jax.jit
def _rotate(image, angle):
    size = np.array(image.shape[1:3])
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    y, x = grid - (size[:, None, None] - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # From output to input: rows count downwards, so this turns the content counter-clockwise.
    middle = (size - 1) / 2
    source = [cos * y + sin * x + middle[0], cos * x - sin * y + middle[1]]
    plane = partial(map_coordinates, coordinates=source, order=1, mode="constant", cval=0.0)
    return jax.vmap(jax.vmap(plane, -1, -1))(image)


def _rotation(degrees: float) -> View:
    return View(partial(rotate, degrees=degrees), partial(rotate, degrees=-degrees))


VIEWS: dict[str, View] = {
    "identity": View(identity, identity),
    "horizontal_flip": View(flip, flip, swapped=True),
    "rotation_plus_10": _rotation(ROTATION),
    "rotation_minus_10": _rotation(-ROTATION),
    "contrast_0.9": View(partial(contrast, factor=CONTRASTS[0]), identity),
    "contrast_1.1": View(partial(contrast, factor=CONTRASTS[1]), identity),
}


def predict_views(
    predict: Predict, batch: Mapping[str, np.ndarray], views: Sequence[View]
) -> np.ndarray:
    """The mean over views and its uncertainties.

    A view counts at a pixel with the share of it that it saw: a rotation loses the corners.

    Args:
      predict: batch -> probabilities (B, S, S, 1).
      batch: a `Batch` with the mirrored sentence's fields where a view is mirrored.
      views: at least one of which sees the whole picture.

    Returns:
      (B, S, S, 3) float32: the mean probability; its entropy, in nats; the mutual information of
      view and answer, which is that entropy less the mean entropy of the views, at least 0.

    Raises:
      ValueError: a pixel that no view saw.
    """
    total: Any = 0
    weights: Any = 0
    entropies: Any = 0
    for view in views:
        probs = predict(_view_batch(view, batch)).astype(np.float64)
        weight = np.asarray(view.restore(np.ones(probs.shape, np.float32)), np.float64)
        # Restored maps come weighted: outside of what the view saw there is 0.
        restored = np.asarray(view.restore(probs.astype(np.float32)), np.float64)
        total, weights = total + restored, weights + weight
        own = np.divide(restored, weight, out=np.zeros_like(restored), where=weight > 0)
        entropies = entropies + weight * entropy(own)
    if not np.all(weights > 0):
        raise ValueError("views: a pixel is seen by none; expected one that sees all; add identity")
    return _pooled(total / weights, entropies / weights)


def predict_members(predicts: Sequence[Predict], batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean over the K members of an ensemble, its uncertainties, and the members.

    Args:
      predicts: of each member: batch -> probabilities (B, S, S, 1).
      batch: a `Batch`.

    Returns:
      (B, S, S, 3 + K) float32: as `predict_views`, then the members' own probabilities.
    """
    probs = [predict(batch) for predict in predicts]
    mean = np.stack(probs).mean(0, dtype=np.float64)
    pooled = _pooled(mean, np.stack([entropy(own) for own in probs]).mean(0))
    return np.concatenate([pooled, *probs], -1)


def _pooled(mean: np.ndarray, mean_entropy: np.ndarray) -> np.ndarray:
    """(..., 3): the mean probability, its entropy, and what that has above the mean entropy."""
    mean = np.clip(mean, 0, 1)
    uncertainty = entropy(mean)
    information = np.maximum(uncertainty - mean_entropy, 0)
    return np.concatenate([mean, uncertainty, information], -1).astype(np.float32)


def entropy(probs: np.ndarray) -> np.ndarray:
    """-p ln p - (1 - p) ln(1 - p) in nats, 0 to 0.693, of any shape."""
    inside = np.clip(np.asarray(probs, np.float64), 1e-7, 1 - 1e-7)
    return -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)


def _view_batch(view: View, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch that the model gets: one program for all views, so always float32 pictures."""
    plain = {name: values for name, values in batch.items() if not name.startswith(SWAPPED)}
    if view.swapped:
        swapped = [name for name in batch if name.startswith(SWAPPED)]
        plain |= {name.removeprefix(SWAPPED): batch[name] for name in swapped}
    image = view.change(np.asarray(batch["image"], np.float32))
    return {**plain, "image": np.ascontiguousarray(image, np.float32)}
