"""MedCLIPSeg's losses in PyTorch, from the formulas of arXiv 2602.20423.

Logits and masks are (B, H, W), masks floats in {0, 1}.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reference.torch_medclipseg import unit

LOSS_WEIGHTS = {"dice": 0.5, "bce": 0.5, "contrastive": 0.1}


def row_dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Computes the soft Dice loss of every row of pixels except the first, averaged."""
    probs, mask = logits.sigmoid()[:, 1:], mask[:, 1:]
    intersection = (probs * mask).sum(dim=-1)
    area = probs.sum(dim=-1) + mask.sum(dim=-1)
    return (1 - (2 * intersection + 1e-5) / (area + 1e-5)).mean()


def bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Computes the binary cross-entropy, averaged over all pixels."""
    return F.binary_cross_entropy_with_logits(logits, mask)


def soft_targets(text: Tensor, temperature: float = 0.2) -> Tensor:
    """Computes the softmax of the unit-norm rows of T T' / temperature, (B, B)."""
    return unit(text @ text.T / temperature).softmax(dim=-1)


def contrastive_loss(features: Tensor, text: Tensor, temperature: float = 0.2) -> Tensor:
    """Computes the symmetric cross-entropy of mean unit-norm patches and texts; text-based targets.

    Args:
      features: (B, P, E).
      text: (B, E), not of unit norm; no gradient flows through the targets.
      temperature: Temperature of the similarities.
    """
    scores = unit(features).mean(dim=1) @ text.T / temperature
    targets = soft_targets(text, temperature).detach()
    return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets.T)) / 2


def total(logits: Tensor, mask: Tensor, features: Tensor, text: Tensor) -> Tensor:
    """Computes 0.5 row Dice + 0.5 binary cross-entropy + 0.1 contrastive loss."""
    parts = {
        "dice": row_dice_loss(logits, mask),
        "bce": bce(logits, mask),
        "contrastive": contrastive_loss(features, text),
    }
    return sum(LOSS_WEIGHTS[name] * part for name, part in parts.items())
