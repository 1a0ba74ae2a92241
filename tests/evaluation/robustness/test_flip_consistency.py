"""Flip consistency: 1 for an equivariant model, less for one that prefers a side."""

import numpy as np

from biclip_jax.data import text as text_lib
from biclip_jax.evaluation.metrics import overlap
from biclip_jax.evaluation.robustness import flip_consistency

PROMPTS = ["lower left lung", "upper right lung", "all left lung and right lung"]


def records(size=5):
    rng = np.random.default_rng(0)
    return [
        {
            "id": str(i),
            "image": rng.integers(0, 256, (8, 8, 1)).astype(np.uint8),
            "mask": np.zeros((8, 8, 1), np.uint8),
            "full_mask": np.zeros((8, 8, 1), np.uint8),
            "text": PROMPTS[i % 3],
        }
        for i in range(size)
    ]


def encode(prompts):
    """Encodes a prompt as -1 for left, 1 for right and 0 for both."""
    sides = [("right" in s) - 1.0 * ("left" in s) for s in prompts]
    return {"text_features": np.array(sides, np.float32)[:, None]}


def sided(batch):
    """Predicts the bright pixels of the half named in the prompt."""
    half = np.sign(np.arange(8) - 3.5)[None, None, :, None]
    selected = half * batch["text_features"][:, :, None, None] >= 0
    return (batch["image"] / 255.0) * selected


def test_an_equivariant_model_scores_one():
    counts = flip_consistency.count_agreement(sided, encode, records(), batch_size=2)
    assert counts.intersection.shape == (5,)
    assert counts.mask_area.min() > 0
    assert overlap.summarize(counts)["dice_global"] == 1


def test_a_model_that_ignores_the_swapped_prompt_scores_zero():
    def constant_encode(prompts):
        return encode([text_lib.swap_sides(PROMPTS[0])] * len(prompts))

    counts = flip_consistency.count_agreement(sided, constant_encode, records(), batch_size=2)
    assert overlap.summarize(counts)["dice_global"] == 0


def test_counts_match_a_loop_over_single_images():
    def lopsided(batch):
        return (batch["image"] / 255.0) * np.linspace(0.5, 1.5, 8)[None, None, :, None]

    counts = flip_consistency.count_agreement(lopsided, encode, records(), batch_size=3)
    for i, record in enumerate(records()):
        original = lopsided({"image": record["image"][None]})[0] >= 0.5
        flipped = lopsided({"image": record["image"][None, :, ::-1]})[0] >= 0.5
        assert counts.intersection[i] == (original[:, ::-1] & flipped).sum()
        assert counts.pred_area[i] == flipped.sum()
        assert counts.mask_area[i] == original.sum()
