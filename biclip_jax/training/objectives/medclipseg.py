"""The loss of one batch of MedCLIPSeg: one stochastic pass, and the parts of L put together."""

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
# Numbers of the random streams of an example's key.
GEOMETRY, NOISE, DROPOUT = range(3)


class Recipe(NamedTuple):
    """What training does, as values that a compiled step is bound to.

    Attributes:
      weights: {"dice", "bce", "contrastive"}: of the parts; 0 is off.
      dice: "image" or "rows", see `losses.row_dice_loss`.
      contrastive: see `losses.contrastive_loss`.
      temperature: likewise.
      geometry: of the pictures; a flip exchanges the sentence's sides.
    """

    weights: Mapping[str, float]
    dice: str = "image"
    contrastive: str = "described"
    temperature: float = 0.2
    geometry: views.Geometry = views.Geometry()

    def on(self, name: str) -> bool:
        """Whether a part of the loss has a weight."""
        return self.weights[name] > 0


def make_recipe(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a resolved configuration, with the fields loss and views.

    Raises:
      ValueError: views that do not go together.
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
    """L = 0.5 L_dice + 0.5 L_bce + 0.1 L_con as published, meaned over the batch.

    Args:
      params: of the adapters and the head.
      state: for the towers.
      batch: a `Batch`; B is this device's share.
      keys: (B,) one key an example.
      model: bound with `functools.partial`, like what follows.
      recipe: weights and kinds.
      axis_name: device axis; L_con compares the pictures and sentences of all devices.

    Returns:
      The loss, and (no batch statistics, {name: (B,) values}).
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
    if recipe.on("contrastive"):
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
    """L_con of this device's rows among those of all devices."""
    pooled, size = losses.pooled_patches(features), len(text)
    of_all = partial(
        losses.contrastive_loss, temperature=recipe.temperature, kind=recipe.contrastive
    )
    if axis_name is None:
        return of_all(pooled, text)
    everybody = jax.lax.all_gather((pooled, text), axis_name, tiled=True)
    start = jax.lax.axis_index(axis_name) * size
    return jax.lax.dynamic_slice_in_dim(of_all(*everybody), start, size)
