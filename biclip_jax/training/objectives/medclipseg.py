"""The MedCLIPSeg objective: one stochastic pass and the sum of the loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key

from biclip_jax.models.medclipseg import MedCLIPSeg
from biclip_jax.models.transformer import fold_keys
from biclip_jax.training import losses, views
from biclip_jax.training.objectives.biclip import transform_batch
from biclip_jax.training.state import TrainState

DICE = {"image": losses.soft_dice_loss, "rows": losses.row_dice_loss}
# Indices of the random streams, folded into an example's key.
GEOMETRY, NOISE, DROPOUT = range(3)


class Recipe(NamedTuple):
    """Training settings, as values that a compiled step is bound to.

    Attributes:
      weights: {"dice", "bce", "contrastive"}: weights of the loss terms; 0 disables a term.
      dice: "image" or "rows", see `losses.row_dice_loss`.
      contrastive, temperature: See `losses.contrastive_loss`.
      geometry: Geometric transform of the images; a flip swaps left and right in the prompt.
    """

    weights: Mapping[str, float]
    dice: str = "image"
    contrastive: str = "described"
    temperature: float = 0.2
    geometry: views.Geometry = views.Geometry()

    def is_enabled(self, name: str) -> bool:
        """Whether a loss term has a positive weight."""
        return self.weights[name] > 0


def make_recipe(config: Mapping[str, Any]) -> Recipe:
    """Builds the recipe from the fields loss and views of a resolved config.

    Raises:
      ValueError: The fields of views contradict each other.
    """
    loss = config["loss"]
    return Recipe(
        weights={name: loss[name] for name in ("dice", "bce", "contrastive")},
        dice=loss["dice_over"],
        contrastive=loss["contrastive_kind"],
        temperature=loss["temperature"],
        geometry=views.make_geometry(config["views"]),
    )


def objective(
    params: Any,
    state: TrainState,
    batch: Mapping[str, Array],
    keys: Key[Array, " b"],
    *,
    model: MedCLIPSeg,
    recipe: Recipe,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], tuple[Any, dict[str, Float[Array, " b"]]]]:
    """Computes L = 0.5 L_dice + 0.5 L_bce + 0.1 L_con (published weights), averaged over the batch.

    Args:
      params: Parameters of the adapters and the head.
      state: Train state, for the frozen encoders.
      batch: A `Batch`; B is this device's shard.
      keys: (B,) one key per example.
      model: Bound with `functools.partial`, like the following arguments.
      recipe: Weights and variants of the loss terms.
      axis_name: Device axis; L_con compares the images and texts of all devices.

    Returns:
      The loss, and (unchanged batch statistics, {name: (B,) values}).
    """
    image, mask, text = transform_batch(batch, fold_keys(keys, GEOMETRY), recipe.geometry)
    logits, aux = model.apply(
        {"params": {**params, **state.frozen}},
        image,
        **text,
        noise=fold_keys(keys, NOISE),
        dropout_keys=fold_keys(keys, DROPOUT),
    )
    parts = {
        "dice": DICE[recipe.dice](logits, mask),
        "bce": losses.binary_cross_entropy(logits, mask),
    }
    if recipe.is_enabled("contrastive"):
        parts["contrastive"] = contrastive_part(aux["features"], aux["text"], recipe, axis_name)
    weighted = [recipe.weights[name] * part for name, part in parts.items()]
    total = sum(weighted[1:], weighted[0])
    values = {"loss": total, **{f"loss_{name}": part for name, part in parts.items()}}
    return total.mean(), (state.batch_stats, values)


def contrastive_part(
    features: Float[Array, "b n e"],
    text: Float[Array, "b e"],
    recipe: Recipe,
    axis_name: str | None,
) -> Float[Array, " b"]:
    """Computes L_con of this device's rows against those of all devices."""
    pooled, size = losses.pooled_patches(features), len(text)
    loss_fn = partial(
        losses.contrastive_loss, temperature=recipe.temperature, kind=recipe.contrastive
    )
    if axis_name is None:
        return loss_fn(pooled, text)
    gathered = jax.lax.all_gather((pooled, text), axis_name, tiled=True)
    start = jax.lax.axis_index(axis_name) * size
    return jax.lax.dynamic_slice_in_dim(loss_fn(*gathered), start, size)
