"""Prediction and evaluation steps: pure functions that depend on an axis name, not on devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from biclip_jax.evaluation.metrics import overlap
from biclip_jax.models import medclipseg
from biclip_jax.models.biclip import text_inputs, to_unit_rgb

IMAGES_PER_CHUNK = 32  # limits the memory of sampling passes that run as one batch


def predict_step(
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    model: nn.Module,
    corruption: Callable[[Array, Array], Array] | None = None,
) -> Float[Array, "b h w 1"]:
    """Predicts probabilities in [0, 1] for the images and prompts of a `Batch`.

    Args:
      variables: Variables of the model.
      batch: Batch with image_hash (B,) uint32 if there is a corruption.
      model: Model; bind it and the following arguments with `functools.partial`.
      corruption: (images in [0, 1], image_hash) -> images; see `corruptions.on_device`.
    """
    image = batch["image"]
    if corruption is not None:
        # Before a grayscale image becomes RGB, so that all channels get the same noise.
        image = 255 * corruption(image.astype(jnp.float32) / 255, batch["image_hash"])
    image, text = to_unit_rgb(image), text_inputs(batch)
    if isinstance(model, medclipseg.MedCLIPSeg):
        return sampled(variables, batch, image, model=model).mean
    logits, _ = model.apply(variables, image, **text)
    return jax.nn.sigmoid(logits)


def sampled(
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    image: Float[Array, "b h w 3"],
    *,
    model: medclipseg.MedCLIPSeg,
) -> medclipseg.SampleStatistics:
    """Runs MedCLIPSeg's `num_samples` passes; the noise depends only on the image id.

    Args:
      variables: Variables of the model.
      batch: Batch with text fields, and image_hash (B,) if images have ids.
      image: RGB images in [0, 1].
      model: Model; bind it with `functools.partial`.
    """
    numbers = batch.get("image_hash", jnp.zeros(len(image), jnp.uint32))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
    chunk = min(10, max(1, IMAGES_PER_CHUNK // len(image)))
    ids, mask, num_samples = batch["text_ids"], batch["text_mask"], model.num_samples
    return medclipseg.sample_statistics(
        model, variables, image, ids, mask, keys, num_samples, chunk
    )


def sample_step(
    variables: Mapping[str, Any], batch: Mapping[str, Array], *, model: medclipseg.MedCLIPSeg
) -> Float[Array, "b h w 3"]:
    """Returns mean, entropy of the mean, and epistemic part; see `medclipseg.SampleStatistics`."""
    samples = sampled(variables, batch, to_unit_rgb(batch["image"]), model=model)
    return jnp.concatenate([samples.mean, samples.total, samples.epistemic], axis=-1)


def eval_step(
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    model: nn.Module,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """Returns `overlap.overlap_sums` at the model's image size, summed over devices.

    Padded rows are not counted. MedCLIPSeg uses one sample, as its authors do for validation.
    """
    if isinstance(model, medclipseg.MedCLIPSeg):
        model = model.clone(num_samples=1)
    probs = predict_step(variables, batch, model=model)
    sums = overlap.overlap_sums(probs, batch["mask"], batch["valid"])
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
