"""The prediction and evaluation steps: pure; they know an axis name and nothing of devices."""

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

IMAGES_AT_ONCE = 32  # passes of samples that run as one batch, for the sake of memory


def predict_step(
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    model: nn.Module,
    corruption: Callable[[Array, Array], Array] | None = None,
) -> Float[Array, "b h w 1"]:
    """Probabilities in [0, 1] for the pictures and sentences of a `Batch`.

    Args:
      variables: of the model.
      batch: with image_hash (B,) uint32 where there is damage.
      model: bound with `functools.partial`, like what follows.
      damage: (pictures in [0, 1], image_hash) -> pictures; see `degrade.on_device`.
    """
    image = batch["image"]
    if corruption is not None:
        # Before a grey picture becomes RGB: its noise is one noise.
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
) -> medclipseg.Samples:
    """MedCLIPSeg's `num_samples` passes; a picture's noise follows its id alone.

    Args:
      variables: of the model.
      batch: sentences; and image_hash (B,), where pictures have ids.
      image: RGB in [0, 1].
      model: bound with `functools.partial`.
    """
    numbers = batch.get("image_hash", jnp.zeros(len(image), jnp.uint32))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
    chunk = min(10, max(1, IMAGES_AT_ONCE // len(image)))
    ids, mask, num_samples = batch["text_ids"], batch["text_mask"], model.num_samples
    return medclipseg.sample_statistics(
        model, variables, image, ids, mask, keys, num_samples, chunk
    )


def sample_step(
    variables: Mapping[str, Any], batch: Mapping[str, Array], *, model: medclipseg.MedCLIPSeg
) -> Float[Array, "b h w 3"]:
    """The samples' mean, its entropy, and the epistemic part of that; see `medclipseg.Samples`."""
    found = sampled(variables, batch, to_unit_rgb(batch["image"]), model=model)
    return jnp.concatenate([found.mean, found.total, found.epistemic], axis=-1)


def eval_step(
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    model: nn.Module,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """`metrics.overlap_sums` at the model's own size, over the devices; padding is not counted.

    One sample of MedCLIPSeg, as its authors validate.
    """
    if isinstance(model, medclipseg.MedCLIPSeg):
        model = model.clone(num_samples=1)
    probs = predict_step(variables, batch, model=model)
    sums = overlap.overlap_sums(probs, batch["mask"], batch["valid"])
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
