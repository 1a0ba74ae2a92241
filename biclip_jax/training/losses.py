"""Losses of both model families, one value per example; the train step reduces them.

Argument names say logits or probs. Sources: arXiv 2603.00156 and the published network, see the
column `published` in docs/method.md; from `row_dice_loss` on, arXiv 2602.20423 and its released
code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMOOTH = 1e-5


def soft_dice_loss(
    logits: Float[Array, "b h w 1"], mask: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """Computes 1 - (2 sum(p y) + s) / (sum p + sum y + s), p = sigmoid(logits), s = 1e-5.

    Sums are per image. An empty mask gives 1 - s / (sum p + s), which is 0 only for p = 0.
    """
    probs = jax.nn.sigmoid(logits)
    intersection = (probs * mask).sum((1, 2, 3))
    total = probs.sum((1, 2, 3)) + mask.sum((1, 2, 3))
    return 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)


def binary_cross_entropy(
    logits: Float[Array, "b h w 1"], mask: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """Computes the mean over pixels of max(z, 0) - z y + log(1 + exp(-|z|)), z the logits."""
    entropy = jnp.maximum(logits, 0) - logits * mask + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return entropy.mean((1, 2, 3))


def segmentation_loss(
    logits: Float[Array, "b h w 1"],
    mask: Float[Array, "b h w 1"],
    double_sigmoid: bool = False,
) -> Float[Array, " b"]:
    """Computes L_seg, the sum of soft Dice loss and cross-entropy.

    Args:
      logits: Logits of a view.
      mask: Reference masks in {0, 1}.
      double_sigmoid: True applies the sigmoid twice in the cross-entropy, as the published
        training code does: it passes probabilities to a loss that expects logits.

    Returns:
      One value per example.
    """
    entropy_logits = jax.nn.sigmoid(logits) if double_sigmoid else logits
    return soft_dice_loss(logits, mask) + binary_cross_entropy(entropy_logits, mask)


def generator_loss(
    pseudo_image: Float[Array, "b h w 3"],
    image: Float[Array, "b h w 3"],
    mask: Float[Array, "b h w 1"],
) -> Float[Array, " b"]:
    """Computes L_gen: mean |x^ - x * mask|; the target is the image with its background set to 0.

    For an empty mask the target is black.
    """
    return jnp.abs(pseudo_image - image * mask).mean((1, 2, 3))


def consistency_loss(
    weak_embedding: Float[Array, "b p"],
    strong_embedding: Float[Array, "b p"],
    learner: str = "weak",
) -> Float[Array, " b"]:
    """Computes L_IAC: 1 - cos(p_w, p_s), 0 to 2.

    Args:
      weak_embedding, strong_embedding: Embeddings of the two views.
      learner: The embedding that receives the gradient: "weak" as published, "strong" (the weak
        view is the teacher), or "both".

    Returns:
      One value per example.
    """
    if learner != "both":
        target = weak_embedding if learner == "strong" else strong_embedding
        target = jax.lax.stop_gradient(target)
        pair = (target, strong_embedding) if learner == "strong" else (weak_embedding, target)
        weak_embedding, strong_embedding = pair
    dot = (weak_embedding * strong_embedding).sum(-1)
    squares = jnp.square(weak_embedding).sum(-1) * jnp.square(strong_embedding).sum(-1)
    # The maximum is inside the root, so that the gradient of a zero embedding is finite.
    return 1 - dot * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))


def cycle_loss(
    text: Float[Array, "b t"], cycle_text: Float[Array, "b t"], distance: str = "l1"
) -> Float[Array, " b"]:
    """Computes L_cycle: mean |t - t^| ("l1", as published) or mean (t - t^)^2 ("l2").

    The gradient is stopped at t.
    """
    difference = jax.lax.stop_gradient(text) - cycle_text
    return (jnp.abs(difference) if distance == "l1" else jnp.square(difference)).mean(-1)


def pseudo_label_loss(
    logits: Float[Array, "b h w 1"], target_probs: Float[Array, "b h w 1"], confidence: float
) -> Float[Array, " b"]:
    """Computes soft Dice plus cross-entropy against the teacher's confident predictions.

    FixMatch (Sohn et al., arXiv 2001.07685) for segmentation: the pseudo-label is p >= 0.5; pixels
    with max(p, 1 - p) below `confidence` are excluded from both terms. An image without a
    confident pixel gives 0.

    Args:
      logits: Logits of the strong view.
      target_probs: Teacher's probabilities on the weak view, deformed like the strong view; their
        gradient is stopped.
      confidence: Threshold, 0.5 to 1; 0.5 keeps every pixel.

    Returns:
      One value per example.
    """
    target_probs = jax.lax.stop_gradient(target_probs)
    target = (target_probs >= 0.5).astype(logits.dtype)
    confident = jnp.maximum(target_probs, 1 - target_probs) >= confidence
    count = confident.sum((1, 2, 3))
    entropy = jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    entropy = (entropy * confident).sum((1, 2, 3)) / jnp.maximum(count, 1)
    probs = jax.nn.sigmoid(logits) * confident
    intersection = (probs * target).sum((1, 2, 3))
    total = probs.sum((1, 2, 3)) + (target * confident).sum((1, 2, 3))
    dice = 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)
    return jnp.where(count > 0, dice + entropy, 0.0)


def squared_error(
    logits: Float[Array, "b h w 1"], target_probs: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """Computes mean (p - p_teacher)^2: Mean Teacher (arXiv 1703.01780).

    The gradient is stopped at the teacher's probabilities.
    """
    difference = jax.nn.sigmoid(logits) - jax.lax.stop_gradient(target_probs)
    return jnp.square(difference).mean((1, 2, 3))


# --- MedCLIPSeg (arXiv 2602.20423) ---


def row_dice_loss(
    logits: Float[Array, "b h w 1"], mask: Float[Array, "b h w 1"]
) -> Float[Array, " b"]:
    """Computes `soft_dice_loss` for every row of pixels except the first, averaged over the rows.

    The published training code computes this: its Dice treats the rows as classes and the first
    row as background. A row without foreground gives almost 1 for any prediction.
    """
    probs = jax.nn.sigmoid(logits)[:, 1:, :, 0]
    mask = mask[:, 1:, :, 0]
    intersection, total = (probs * mask).sum(-1), probs.sum(-1) + mask.sum(-1)
    return (1 - (2 * intersection + SMOOTH) / (total + SMOOTH)).mean(-1)


def pooled_patches(features: Float[Array, "b n e"]) -> Float[Array, "b e"]:
    """Averages the unit-norm features of the patches; the average is not normalised again."""
    return (features / jnp.linalg.norm(features, axis=-1, keepdims=True)).mean(1)


def contrastive_loss(
    pooled: Float[Array, "b e"],
    text: Float[Array, "b e"],
    temperature: float = 0.2,
    kind: str = "described",
) -> Float[Array, " b"]:
    """Computes the soft contrastive loss between the images and the texts of a batch.

    The mean over both directions of the cross-entropy between S = r T^T / tau and soft targets G,
    which measure the similarity of the texts. A batch of one gives 0.

    Args:
      pooled: r, see `pooled_patches`: S is the mean similarity over the patches.
      text: T, text features of any norm.
      temperature: tau.
      kind: "described", as in the paper: unit-norm text features and G = softmax(T T^T / tau) in
        both directions. "released", as in its code: raw text features and G = softmax of the rows
        of T T^T, normalised to unit norm, which makes G almost uniform; the other direction uses G
        transposed, whose rows do not sum to 1.

    Returns:
      One value per example.
    """
    if kind == "described":
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
        targets = jax.nn.softmax(text @ text.T / temperature, axis=-1)
        reverse_targets = targets
    else:
        similarity = text @ text.T / temperature
        similarity = similarity / jnp.linalg.norm(similarity, axis=-1, keepdims=True)
        targets = jax.nn.softmax(similarity, axis=-1)
        reverse_targets = targets.T
    targets, reverse_targets = jax.lax.stop_gradient((targets, reverse_targets))
    scores = pooled @ text.T / temperature
    image_to_text = -(targets * jax.nn.log_softmax(scores, axis=-1)).sum(-1)
    text_to_image = -(reverse_targets * jax.nn.log_softmax(scores.T, axis=-1)).sum(-1)
    return (image_to_text + text_to_image) / 2
