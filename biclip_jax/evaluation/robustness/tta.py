"""Test-time augmentation and ensembles: mean predictions and their disagreement.

A view transforms the image; the predicted probabilities are transformed back to the pixels of the
original image. The flipped view also swaps left and right in the prompt.
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
SWAPPED = "swapped_"  # prefix of the text fields of swapped prompts

# (batch) -> probabilities (B, S, S, 1), on the host
Predict = Callable[[Any], np.ndarray]
# (B, S, S, C) float32 -> the same
Change = Callable[[np.ndarray], np.ndarray]


class View(NamedTuple):
    """One view of an image.

    Attributes:
      change: Transformation of images (B, S, S, C) float32 in [0, 255].
      restore: Inverse transformation of maps (B, S, S, 1); 0 where the view does not cover the
        image.
      swapped: Whether the view takes the left-right swapped prompt.
    """

    change: Change
    restore: Change
    swapped: bool = False


def identity(image: np.ndarray) -> np.ndarray:
    """Returns the image unchanged."""
    return image


def flip(image: np.ndarray) -> np.ndarray:
    """Flips images (B, S, S, C) horizontally."""
    return image[:, :, ::-1]


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Returns clip(m + factor (x - m)) of (B, S, S, C) in [0, 255]; m is the mean of each image."""
    mean = image.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float32)
    return np.clip(mean + np.float32(factor) * (image - mean), 0, 255)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates (B, S, S, C) counter-clockwise about the center, bilinearly, with black outside."""
    return np.asarray(_rotate(image, jnp.deg2rad(jnp.float32(degrees))))


@jax.jit
def _rotate(image, angle):
    size = np.array(image.shape[1:3])
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    y, x = grid - (size[:, None, None] - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Maps output to input coordinates: with rows downwards, the content turns counter-clockwise.
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
    """Averages the predictions of several views and computes their uncertainties.

    Views are weighted per pixel by their coverage: a rotation loses the corners.

    Args:
      predict: Function from a batch to probabilities (B, S, S, 1).
      batch: A `Batch`, with text fields of the swapped prompt if a view is swapped.
      views: Views, at least one of which covers the whole image.

    Returns:
      (B, S, S, 3) float32: the mean probability, its entropy in nats, and the mutual information of
      view and prediction: that entropy minus the mean entropy of the views, at least 0.

    Raises:
      ValueError: No view covers some pixel.
    """
    total: Any = 0
    weights: Any = 0
    entropies: Any = 0
    for view in views:
        probs = predict(_view_batch(view, batch)).astype(np.float64)
        weight = np.asarray(view.restore(np.ones(probs.shape, np.float32)), np.float64)
        # Restored maps are already weighted: they are 0 outside the coverage of the view.
        restored = np.asarray(view.restore(probs.astype(np.float32)), np.float64)
        total, weights = total + restored, weights + weight
        view_mean = np.divide(restored, weight, out=np.zeros_like(restored), where=weight > 0)
        entropies = entropies + weight * entropy(view_mean)
    if not np.all(weights > 0):
        raise ValueError(
            "views: no view covers some pixels; expected one that covers the image; add identity"
        )
    return _pooled(total / weights, entropies / weights)


def predict_members(predicts: Sequence[Predict], batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Averages the predictions of K ensemble members and computes their uncertainties.

    Args:
      predicts: One function per member, from a batch to probabilities (B, S, S, 1).
      batch: A `Batch`.

    Returns:
      (B, S, S, 3 + K) float32: the maps of `predict_views`, then the probabilities of each member.
    """
    probs = [predict(batch) for predict in predicts]
    mean = np.stack(probs).mean(0, dtype=np.float64)
    pooled = _pooled(mean, np.stack([entropy(member) for member in probs]).mean(0))
    return np.concatenate([pooled, *probs], -1)


def _pooled(mean: np.ndarray, mean_entropy: np.ndarray) -> np.ndarray:
    """Returns (..., 3): mean probability, its entropy, and that entropy minus the mean entropy."""
    mean = np.clip(mean, 0, 1)
    uncertainty = entropy(mean)
    information = np.maximum(uncertainty - mean_entropy, 0)
    return np.concatenate([mean, uncertainty, information], -1).astype(np.float32)


def entropy(probs: np.ndarray) -> np.ndarray:
    """Returns -p ln p - (1 - p) ln(1 - p) in nats, 0 to 0.693, for any shape."""
    inside = np.clip(np.asarray(probs, np.float64), 1e-7, 1 - 1e-7)
    return -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)


def _view_batch(view: View, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the batch of a view, with float32 images so that all views share one program."""
    plain = {name: values for name, values in batch.items() if not name.startswith(SWAPPED)}
    if view.swapped:
        swapped = [name for name in batch if name.startswith(SWAPPED)]
        plain |= {name.removeprefix(SWAPPED): batch[name] for name in swapped}
    image = view.change(np.asarray(batch["image"], np.float32))
    return {**plain, "image": np.ascontiguousarray(image, np.float32)}
