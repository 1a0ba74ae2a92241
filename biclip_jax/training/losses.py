"""The losses of BiCLIP, one value an example; the reduction is the step's.

Argument names say logits or probs. Sources: arXiv 2603.00156 and the published
network, for the column `published` of docs/method.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMOOTH = 1e-5


def soft_dice_loss(
    logits: Float[Array, "b h w 1"], mask: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """1 - (2 sum(p y) + s) / (sum p + sum y + s), with p = sigmoid(logits) and s = 1e-5.

    Per image. An empty mask gives 1 - s / (sum p + s): 0 only for p = 0.
    """
    probs = jax.nn.sigmoid(logits)
    intersection = (probs * mask).sum((1, 2, 3))
    total = probs.sum((1, 2, 3)) + mask.sum((1, 2, 3))
    return 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)


def binary_cross_entropy(
    logits: Float[Array, "b h w 1"], mask: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """Mean over pixels of max(z, 0) - z y + log(1 + exp(-|z|)), z the logits."""
    entropy = jnp.maximum(logits, 0) - logits * mask + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return entropy.mean((1, 2, 3))


def segmentation_loss(
    logits: Float[Array, "b h w 1"],
    mask: Float[Array, "b h w 1"],
    double_sigmoid: bool = False,
) -> Float[Array, " b"]:
    """L_seg: soft Dice plus cross-entropy, weighted 1:1.

    Args:
      logits: the weak view's.
      mask: in {0, 1}.
      double_sigmoid: the published training code hands probabilities to a
        cross-entropy that applies the sigmoid again; true repeats that.
    """
    entropy_logits = jax.nn.sigmoid(logits) if double_sigmoid else logits
    return soft_dice_loss(logits, mask) + binary_cross_entropy(entropy_logits, mask)


def generator_loss(
    pseudo_image: Float[Array, "b h w 3"],
    image: Float[Array, "b h w 3"],
    mask: Float[Array, "b h w 1"],
) -> Float[Array, " b"]:
    """L_gen: mean |x^ - x * mask|; the target is the picture with its background set to 0.

    An empty mask makes an all-black target.
    """
    return jnp.abs(pseudo_image - image * mask).mean((1, 2, 3))


def consistency_loss(
    weak_embedding: Float[Array, "b p"], strong_embedding: Float[Array, "b p"]
) -> Float[Array, " b"]:
    """L_IAC: 1 - cos(p_w, p_s), the gradient only into p_w. 0 to 2."""
    strong_embedding = jax.lax.stop_gradient(strong_embedding)
    dot = (weak_embedding * strong_embedding).sum(-1)
    squares = jnp.square(weak_embedding).sum(-1) * jnp.square(strong_embedding).sum(-1)
    # Under the root, so that the gradient of an embedding of zeros is finite.
    return 1 - dot * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))


def cycle_loss(text: Float[Array, "b t"], cycle_text: Float[Array, "b t"]) -> Float[Array, " b"]:
    """L_cycle: mean |t - t^|, with t held fixed."""
    return jnp.abs(jax.lax.stop_gradient(text) - cycle_text).mean(-1)
