"""The prediction and evaluation steps: pure; they know an axis name and nothing of devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from biclip_jax.evaluation import metrics
from biclip_jax.models.biclip import text_inputs, to_unit_rgb


def predict_step(
    variables: Mapping[str, Any], batch: Mapping[str, Array], *, model: nn.Module
) -> Float[Array, "b h w 1"]:
    """Probabilities in [0, 1] for the pictures and sentences of a `Batch`."""
    logits, _ = model.apply(variables, to_unit_rgb(batch["image"]), **text_inputs(batch))
    return jax.nn.sigmoid(logits)


def eval_step(
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    model: nn.Module,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """`metrics.overlap_sums` at the model's own size, over the devices; padding is not counted."""
    probs = predict_step(variables, batch, model=model)
    sums = metrics.overlap_sums(probs, batch["mask"], batch["valid"])
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
