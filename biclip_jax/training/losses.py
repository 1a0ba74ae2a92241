"""The losses of both models, one value an example; the reduction is the step's.

Argument names say logits or probs. Sources: arXiv 2603.00156 and the published
network, for the column `published` of docs/method.md; arXiv 2602.20423 and its
released code, from `row_dice_loss` on.
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
      logits: of a view.
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
    weak_embedding: Float[Array, "b p"],
    strong_embedding: Float[Array, "b p"],
    learner: str = "weak",
) -> Float[Array, " b"]:
    """L_IAC: 1 - cos(p_w, p_s). 0 to 2.

    Args:
      weak_embedding, strong_embedding: of both views.
      learner: which of them gets the gradient: "weak" as published, "strong"
        (the weak view is the teacher), or "both".
    """
    if learner != "both":
        target = weak_embedding if learner == "strong" else strong_embedding
        fixed = jax.lax.stop_gradient(target)
        pair = (fixed, strong_embedding) if learner == "strong" else (weak_embedding, fixed)
        weak_embedding, strong_embedding = pair
    dot = (weak_embedding * strong_embedding).sum(-1)
    squares = jnp.square(weak_embedding).sum(-1) * jnp.square(strong_embedding).sum(-1)
    # Under the root, so that the gradient of an embedding of zeros is finite.
    return 1 - dot * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))


def cycle_loss(
    text: Float[Array, "b t"], cycle_text: Float[Array, "b t"], distance: str = "l1"
) -> Float[Array, " b"]:
    """L_cycle: mean |t - t^| ("l1", as published) or mean (t - t^)^2 ("l2"), t held fixed."""
    difference = jax.lax.stop_gradient(text) - cycle_text
    return (jnp.abs(difference) if distance == "l1" else jnp.square(difference)).mean(-1)


def pseudo_label_loss(
    logits: Float[Array, "b h w 1"], target_probs: Float[Array, "b h w 1"], confidence: float
) -> Float[Array, " b"]:
    """Soft Dice plus cross-entropy against the teacher's own answer, where it is confident.

    FixMatch (Sohn et al., arXiv 2001.07685) for masks: the target is p >= 0.5, and pixels
    with max(p, 1 - p) below `confidence` are left out of both terms. An image without a
    confident pixel gives 0.

    Args:
      logits: of the strong view.
      target_probs: of the teacher on the weak view, moved like the strong one; held fixed.
      confidence: 0.5 to 1; 0.5 keeps every pixel.
    """
    target_probs = jax.lax.stop_gradient(target_probs)
    target = (target_probs >= 0.5).astype(logits.dtype)
    certain = jnp.maximum(target_probs, 1 - target_probs) >= confidence
    count = certain.sum((1, 2, 3))
    entropy = jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    entropy = (entropy * certain).sum((1, 2, 3)) / jnp.maximum(count, 1)
    probs = jax.nn.sigmoid(logits) * certain
    intersection = (probs * target).sum((1, 2, 3))
    total = probs.sum((1, 2, 3)) + (target * certain).sum((1, 2, 3))
    dice = 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)
    return jnp.where(count > 0, dice + entropy, 0.0)


def squared_error(
    logits: Float[Array, "b h w 1"], target_probs: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """Mean (p - p_teacher)^2, the teacher held fixed: Mean Teacher (arXiv 1703.01780)."""
    difference = jax.nn.sigmoid(logits) - jax.lax.stop_gradient(target_probs)
    return jnp.square(difference).mean((1, 2, 3))


# --- MedCLIPSeg (arXiv 2602.20423) ---


def row_dice_loss(
    logits: Float[Array, "b h w 1"], mask: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """`soft_dice_loss` of every row of pixels but the first, meaned over the rows.

    What the published training code computes: its Dice takes the rows for classes and the
    first one for background. A row without foreground gives nearly 1, whatever is predicted.
    """
    probs = jax.nn.sigmoid(logits)[:, 1:, :, 0]
    mask = mask[:, 1:, :, 0]
    intersection, total = (probs * mask).sum(-1), probs.sum(-1) + mask.sum(-1)
    return (1 - (2 * intersection + SMOOTH) / (total + SMOOTH)).mean(-1)


def pooled_patches(features: Float[Array, "b n e"]) -> Float[Array, "b e"]:
    """The mean of the patches' features, each of length 1; the mean itself is shorter."""
    return (features / jnp.linalg.norm(features, axis=-1, keepdims=True)).mean(1)


def contrastive_loss(
    pooled: Float[Array, "b e"],
    text: Float[Array, "b e"],
    temperature: float = 0.2,
    kind: str = "described",
) -> Float[Array, " b"]:
    """Soft contrastive loss between the pictures and the sentences of a batch.

    The mean of both directions' cross-entropy of S = r T^T / tau against soft targets G, which
    tell how much the sentences are alike. One row alone gives 0.

    Args:
      pooled: r, see `pooled_patches`: S is the mean over patches of their similarities.
      text: features of the sentences, of any length.
      temperature: tau.
      kind: "described", as in the paper: sentences of length 1, G = softmax(T T^T / tau), for
        either direction. "released", as its code computes: sentences as they are, G = softmax of
        the rows of T T^T, each of length 1, which makes it nearly uniform; and the other
        direction against G transposed, whose rows do not sum to 1.
    """
    if kind == "described":
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
        targets = jax.nn.softmax(text @ text.T / temperature, axis=-1)
        backwards = targets
    else:
        alike = text @ text.T / temperature
        alike = alike / jnp.linalg.norm(alike, axis=-1, keepdims=True)
        targets = jax.nn.softmax(alike, axis=-1)
        backwards = targets.T
    targets, backwards = jax.lax.stop_gradient((targets, backwards))
    scores = pooled @ text.T / temperature
    there = -(targets * jax.nn.log_softmax(scores, axis=-1)).sum(-1)
    back = -(backwards * jax.nn.log_softmax(scores.T, axis=-1)).sum(-1)
    return (there + back) / 2
