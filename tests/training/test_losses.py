"""Losses against closed forms and against SciPy's and optax's functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.distance import cosine
from scipy.special import expit

from biclip_jax.training import losses

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.standard_normal((3, 6, 5, 1)) * 3, jnp.float32)
MASK = jnp.asarray(RNG.integers(0, 2, (3, 6, 5, 1)), jnp.float32)


def test_soft_dice_is_the_formula_per_image():
    probs, mask = expit(np.asarray(LOGITS, np.float64)), np.asarray(MASK)
    for i, value in enumerate(losses.soft_dice_loss(LOGITS, MASK)):
        p, y = probs[i].ravel(), mask[i].ravel()
        expected = 1 - (2 * p @ y + 1e-5) / (p.sum() + y.sum() + 1e-5)
        assert float(value) == pytest.approx(expected, abs=1e-6)


def test_soft_dice_of_perfect_and_empty():
    sure = jnp.where(MASK == 1, 40.0, -40.0)
    np.testing.assert_allclose(losses.soft_dice_loss(sure, MASK), 0, atol=1e-6)
    empty = jnp.zeros_like(MASK)
    np.testing.assert_allclose(losses.soft_dice_loss(empty - 200.0, empty), 0, atol=1e-6)
    np.testing.assert_allclose(losses.soft_dice_loss(empty + 9.0, empty), 1, atol=1e-5)


def test_cross_entropy_is_optax_s_and_stays_finite():
    expected = optax.sigmoid_binary_cross_entropy(LOGITS, MASK).mean((1, 2, 3))
    np.testing.assert_allclose(losses.binary_cross_entropy(LOGITS, MASK), expected, rtol=1e-5)
    grad = jax.grad(lambda z: losses.binary_cross_entropy(z, MASK).sum())(LOGITS * 1e4)
    assert np.isfinite(grad).all()


def test_segmentation_loss_adds_both_and_double_sigmoid_changes_the_entropy_alone():
    dice, entropy = losses.soft_dice_loss(LOGITS, MASK), losses.binary_cross_entropy(LOGITS, MASK)
    np.testing.assert_allclose(losses.segmentation_loss(LOGITS, MASK), dice + entropy, rtol=1e-6)
    again = losses.binary_cross_entropy(jax.nn.sigmoid(LOGITS), MASK)
    doubled = losses.segmentation_loss(LOGITS, MASK, double_sigmoid=True)
    np.testing.assert_allclose(doubled, dice + again, rtol=1e-6)


def test_generator_loss_compares_with_the_masked_picture():
    image = jnp.asarray(RNG.random((3, 6, 5, 3)), jnp.float32)
    np.testing.assert_allclose(losses.generator_loss(image * MASK, image, MASK), 0, atol=1e-7)
    expected = np.abs(np.asarray(image) * (1 - np.asarray(MASK))).mean((1, 2, 3))
    np.testing.assert_allclose(losses.generator_loss(image, image, MASK), expected, rtol=1e-5)


def test_consistency_loss_is_the_cosine_distance_with_a_fixed_strong_side():
    weak = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    strong = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    expected = [cosine(w, s) for w, s in zip(weak, strong, strict=True)]
    np.testing.assert_allclose(losses.consistency_loss(weak, strong), expected, rtol=1e-5)
    into_weak, into_strong = jax.grad(
        lambda w, s: losses.consistency_loss(w, s).sum(), argnums=(0, 1)
    )(weak, strong)
    assert np.abs(into_weak).min() > 0
    assert not np.any(into_strong)


def test_cycle_loss_is_the_mean_absolute_error_with_a_fixed_text():
    text = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    guess = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    expected = np.abs(np.asarray(text) - np.asarray(guess)).mean(-1)
    np.testing.assert_allclose(losses.cycle_loss(text, guess), expected, rtol=1e-5)
    into_text = jax.grad(lambda t: losses.cycle_loss(t, guess).sum())(text)
    assert not np.any(into_text)
