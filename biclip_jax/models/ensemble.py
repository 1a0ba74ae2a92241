"""An ensemble of models with one architecture, as a single model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST = 1e-7  # smallest probability; its logit is finite in float32


class Ensemble(nn.Module):
    """Averages the probabilities of its members.

    The variables of the members are below "member" with a leading member axis, see `stacked`. The
    members run sequentially, in an unrolled loop; `training.steps.ensemble_step` says why.

    Attributes:
      member: The architecture; takes an image and named text inputs.
      num_members: K, number of members.
      text_encoder: Frozen text encoder shared by all members; None if each member has its own.
    """

    member: nn.Module
    num_members: int
    text_encoder: nn.Module | None = None

    @property
    def image_size(self) -> int:
        """Image side of the members, in pixels."""
        return self.member.image_size

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], **text: Array
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Returns the logit of the mean probability, and member_logits (K, B, H, W, 1)."""
        if self.text_encoder is not None and "text_features" not in text:
            ids, mask = text.pop("text_ids"), text.pop("text_mask")
            text["text_features"] = self.text_encoder(ids, mask)

        def forward(member: nn.Module, carry: tuple[()], _: None):
            logits, _aux = member(image, **text)
            return carry, logits

        scan_members = nn.scan(
            forward,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.num_members,
            unroll=self.num_members,
        )
        _, member_logits = scan_members(self.member, (), None)
        probs = jax.nn.sigmoid(member_logits).mean(0)
        probs = jnp.clip(probs, SMALLEST, 1 - SMALLEST)
        return jnp.log(probs) - jnp.log1p(-probs), {"member_logits": member_logits}


def stacked(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Nests variables that have a leading member axis below "member", as `Ensemble` expects."""
    return {name: {"member": part} for name, part in variables.items()}


def member_of(variables: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the variables of one member, as its own model expects them."""
    return {
        name: jax.tree.map(lambda x: x[index], part.get("member", {}))
        for name, part in variables.items()
    }
