"""Several members of one architecture as one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST = 1e-7  # probability; its logit is finite in float32


class Ensemble(nn.Module):
    """Members that answer in turn; the probability is the mean of theirs.

    Their variables lie below "member" with a leading axis, see `stacked`. In turn
    rather than at once, and written out: see `training.steps.ensemble_step`.

    Attributes:
      member: the architecture; takes a picture and named sentence fields.
      num_members: K.
      text_encoder: a frozen tower that all members share; None where each has its own.
    """

    member: nn.Module
    num_members: int
    text_encoder: nn.Module | None = None

    @property
    def image_size(self) -> int:
        """The members', in pixels."""
        return self.member.image_size

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], **text: Array
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """The logit of the mean probability, and member_logits (K, B, H, W, 1)."""
        if self.text_encoder is not None and "text_features" not in text:
            ids, mask = text.pop("text_ids"), text.pop("text_mask")
            text["text_features"] = self.text_encoder(ids, mask)

        def answer(member: nn.Module, carry: tuple[()], _: None):
            logits, _aux = member(image, **text)
            return carry, logits

        in_turn = nn.scan(
            answer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.num_members,
            unroll=self.num_members,
        )
        _, member_logits = in_turn(self.member, (), None)
        probs = jax.nn.sigmoid(member_logits).mean(0)
        probs = jnp.clip(probs, SMALLEST, 1 - SMALLEST)
        return jnp.log(probs) - jnp.log1p(-probs), {"member_logits": member_logits}


def stacked(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with a leading axis of members, as an `Ensemble` takes them."""
    return {name: {"member": part} for name, part in variables.items()}


def member_of(variables: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The variables of one member alone, as its own model takes them."""
    return {
        name: jax.tree.map(lambda x: x[index], part.get("member", {}))
        for name, part in variables.items()
    }
