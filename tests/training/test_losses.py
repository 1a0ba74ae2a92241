"""Losses against closed forms and functions of SciPy and optax."""

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


def test_soft_dice_matches_numpy_per_image():
    probs, mask = expit(np.asarray(LOGITS, np.float64)), np.asarray(MASK)
    for i, value in enumerate(losses.soft_dice_loss(LOGITS, MASK)):
        p, y = probs[i].ravel(), mask[i].ravel()
        expected = 1 - (2 * p @ y + 1e-5) / (p.sum() + y.sum() + 1e-5)
        assert float(value) == pytest.approx(expected, abs=1e-6)


def test_soft_dice_of_perfect_and_empty_masks():
    perfect = jnp.where(MASK == 1, 40.0, -40.0)
    np.testing.assert_allclose(losses.soft_dice_loss(perfect, MASK), 0, atol=1e-6)
    empty = jnp.zeros_like(MASK)
    np.testing.assert_allclose(losses.soft_dice_loss(empty - 200.0, empty), 0, atol=1e-6)
    np.testing.assert_allclose(losses.soft_dice_loss(empty + 9.0, empty), 1, atol=1e-5)


def test_cross_entropy_matches_optax_and_is_finite():
    expected = optax.sigmoid_binary_cross_entropy(LOGITS, MASK).mean((1, 2, 3))
    np.testing.assert_allclose(losses.binary_cross_entropy(LOGITS, MASK), expected, rtol=1e-5)
    grad = jax.grad(lambda z: losses.binary_cross_entropy(z, MASK).sum())(LOGITS * 1e4)
    assert np.isfinite(grad).all()


def test_segmentation_loss_is_the_sum_and_double_sigmoid_changes_only_the_entropy():
    dice, entropy = losses.soft_dice_loss(LOGITS, MASK), losses.binary_cross_entropy(LOGITS, MASK)
    np.testing.assert_allclose(losses.segmentation_loss(LOGITS, MASK), dice + entropy, rtol=1e-6)
    double_entropy = losses.binary_cross_entropy(jax.nn.sigmoid(LOGITS), MASK)
    found = losses.segmentation_loss(LOGITS, MASK, double_sigmoid=True)
    np.testing.assert_allclose(found, dice + double_entropy, rtol=1e-6)


def test_generator_loss_target_is_the_masked_image():
    image = jnp.asarray(RNG.random((3, 6, 5, 3)), jnp.float32)
    np.testing.assert_allclose(losses.generator_loss(image * MASK, image, MASK), 0, atol=1e-7)
    expected = np.abs(np.asarray(image) * (1 - np.asarray(MASK))).mean((1, 2, 3))
    np.testing.assert_allclose(losses.generator_loss(image, image, MASK), expected, rtol=1e-5)


def test_consistency_loss_is_the_cosine_distance_without_gradient_to_the_strong_view():
    weak = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    strong = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    expected = [cosine(w, s) for w, s in zip(weak, strong, strict=True)]
    np.testing.assert_allclose(losses.consistency_loss(weak, strong), expected, rtol=1e-5)
    grad_weak, grad_strong = jax.grad(
        lambda w, s: losses.consistency_loss(w, s).sum(), argnums=(0, 1)
    )(weak, strong)
    assert np.abs(grad_weak).min() > 0
    assert not np.any(grad_strong)


def test_cycle_loss_is_the_mean_absolute_error_without_gradient_to_the_text():
    text = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    cycle_text = jnp.asarray(RNG.standard_normal((3, 7)), jnp.float32)
    expected = np.abs(np.asarray(text) - np.asarray(cycle_text)).mean(-1)
    np.testing.assert_allclose(losses.cycle_loss(text, cycle_text), expected, rtol=1e-5)
    grad_text = jax.grad(lambda t: losses.cycle_loss(t, cycle_text).sum())(text)
    assert not np.any(grad_text)


@pytest.mark.parametrize(
    ("learner", "learns"), [("weak", (1, 0)), ("strong", (0, 1)), ("both", (1, 1))]
)
def test_only_the_learner_gets_the_gradient_of_the_consistency_loss(learner, learns):
    """d(1 - cos)/dw = (cos w/|w| - s/|s|) / |w|, and the same with w and s exchanged."""
    weak, strong = jnp.asarray(RNG.standard_normal((2, 3, 7)), jnp.float32)
    grads = jax.grad(lambda *x: losses.consistency_loss(*x, learner).sum(), argnums=(0, 1))
    for found, a, b, learn in zip(
        grads(weak, strong), (weak, strong), (strong, weak), learns, strict=True
    ):
        norm = np.linalg.norm(a, axis=-1, keepdims=True)
        a, b = a / norm, b / np.linalg.norm(b, axis=-1, keepdims=True)
        expected = learn * ((a * b).sum(-1, keepdims=True) * a - b) / norm
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        losses.consistency_loss(weak, strong, learner), losses.consistency_loss(weak, strong)
    )


def test_zero_embedding_has_a_finite_gradient():
    zeros, strong = jnp.zeros((1, 7)), jnp.ones((1, 7))
    for learner in ("weak", "strong", "both"):
        grads = jax.grad(lambda *x, to=learner: losses.consistency_loss(*x, to).sum(), (0, 1))
        assert all(np.isfinite(g).all() for g in grads(zeros, strong))


def test_l2_cycle_loss_is_the_mean_squared_error():
    text, cycle_text = jnp.asarray(RNG.standard_normal((2, 3, 7)), jnp.float32)
    expected = np.square(np.asarray(text) - np.asarray(cycle_text)).mean(-1)
    np.testing.assert_allclose(losses.cycle_loss(text, cycle_text, "l2"), expected, rtol=1e-5)
    grad_text, grad_cycle_text = jax.grad(
        lambda *x: losses.cycle_loss(*x, "l2").sum(), argnums=(0, 1)
    )(text, cycle_text)
    assert not np.any(grad_text)
    np.testing.assert_allclose(grad_cycle_text, 2 * (cycle_text - text) / 7, rtol=1e-5)


def pseudo_labels_by_hand(logits, target_probs, confidence):
    """Computes the loss image by image over the confident pixels."""
    values = []
    for z, t in zip(np.asarray(logits, np.float64), np.asarray(target_probs), strict=True):
        confident = np.maximum(t, 1 - t) >= confidence
        if not confident.any():
            values.append(0.0)
            continue
        p, y = expit(z[confident]), (t[confident] >= 0.5).astype(np.float64)
        entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        values.append(entropy + 1 - (2 * p @ y + 1e-5) / (p.sum() + y.sum() + 1e-5))
    return values


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.999])
def test_pseudo_label_loss_matches_numpy_over_the_confident_pixels(confidence):
    target = RNG.random(LOGITS.shape).astype(np.float32)
    target[0], target[1, 0, 0] = 0.6, 0.9995  # at 0.999: no confident pixel, and one
    target[2, 0, 0, 0] = 0.5  # p >= 0.5 is foreground
    found = losses.pseudo_label_loss(LOGITS, jnp.asarray(target), confidence)
    expected = pseudo_labels_by_hand(LOGITS, target, confidence)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (float(found[0]) == 0) == (confidence > 0.6)


def test_pseudo_label_gradient_is_limited_to_confident_pixels():
    target = jnp.asarray(RNG.random(LOGITS.shape), jnp.float32).at[0].set(0.6)
    grad_logits, grad_target = jax.grad(
        lambda *x: losses.pseudo_label_loss(*x, 0.8).sum(), argnums=(0, 1)
    )(LOGITS, target)
    assert not np.any(grad_target)
    confident = np.maximum(target, 1 - target) >= 0.8
    np.testing.assert_array_equal(np.asarray(grad_logits) != 0, confident)
    assert np.isfinite(grad_logits).all()
    huge = jax.grad(lambda z: losses.pseudo_label_loss(z, target, 0.5).sum())(LOGITS * 1e4)
    assert np.isfinite(huge).all()


def test_pseudo_label_loss_with_full_confidence_is_the_segmentation_loss():
    found = losses.pseudo_label_loss(LOGITS, MASK, 0.95)
    np.testing.assert_allclose(found, losses.segmentation_loss(LOGITS, MASK), rtol=1e-5)


def test_squared_error_matches_numpy_without_gradient_to_the_teacher():
    target = jnp.asarray(RNG.random(LOGITS.shape), jnp.float32)
    expected = np.square(expit(np.asarray(LOGITS)) - np.asarray(target)).mean((1, 2, 3))
    np.testing.assert_allclose(losses.squared_error(LOGITS, target), expected, rtol=1e-5)
    grad_target = jax.grad(lambda t: losses.squared_error(LOGITS, t).sum())(target)
    assert not np.any(grad_target)
