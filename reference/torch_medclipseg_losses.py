"""MedCLIPSeg's losses in PyTorch, from the formulas of arXiv 2602.20423.

Logits and masks are (B, H, W), masks floats in {0, 1}.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reference.torch_medclipseg import unit

LOSS_WEIGHTS = {"dice": 0.5, "bce": 0.5, "contrastive": 0.1}


def row_dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice of every row of every picture but the first row, averaged."""
    probs, mask = logits.sigmoid()[:, 1:], mask[:, 1:]
    both = (probs * mask).sum(dim=-1)
    area = probs.sum(dim=-1) + mask.sum(dim=-1)
    return (1 - (2 * both + 1e-5) / (area + 1e-5)).mean()


def bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over all pixels."""
    return F.binary_cross_entropy_with_logits(logits, mask)


def soft_targets(text: Tensor, temperature: float = 0.2) -> Tensor:
    """softmax of the rows of T T' / temperature, each of unit length, (B, B)."""
    return unit(text @ text.T / temperature).softmax(dim=-1)


def contrastive_loss(features: Tensor, text: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of means of unit patches to sentences, both ways, targets from sentences.

    Args:
      features: (B, P, E).
      text: (B, E), not of unit length; the targets pass no gradient on.
      temperature: of the similarities.
    """
    scores = unit(features).mean(dim=1) @ text.T / temperature
    targets = soft_targets(text, temperature).detach()
    return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets.T)) / 2


def total(logits: Tensor, mask: Tensor, features: Tensor, text: Tensor) -> Tensor:
    """0.5 Dice of rows + 0.5 binary cross-entropy + 0.1 contrastive loss."""
    parts = {
        "dice": row_dice_loss(logits, mask),
        "bce": bce(logits, mask),
        "contrastive": contrastive_loss(features, text),
    }
    return sum(LOSS_WEIGHTS[name] * part for name, part in parts.items())
