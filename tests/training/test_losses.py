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
    confidence = jnp.where(MASK == 1, 40.0, -40.0)
    np.testing.assert_allclose(losses.soft_dice_loss(confidence, MASK), 0, atol=1e-6)
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


@pytest.mark.parametrize(
    ("learner", "learns"), [("weak", (1, 0)), ("strong", (0, 1)), ("both", (1, 1))]
)
def test_the_learner_alone_gets_the_consistency_s_gradient(learner, learns):
    """d(1 - cos)/dw = (cos w/|w| - s/|s|) / |w|, and the same with both exchanged."""
    weak, strong = jnp.asarray(RNG.standard_normal((2, 3, 7)), jnp.float32)
    grads = jax.grad(lambda *x: losses.consistency_loss(*x, learner).sum(), argnums=(0, 1))
    for found, a, b, gets in zip(
        grads(weak, strong), (weak, strong), (strong, weak), learns, strict=True
    ):
        length = np.linalg.norm(a, axis=-1, keepdims=True)
        a, b = a / length, b / np.linalg.norm(b, axis=-1, keepdims=True)
        expected = gets * ((a * b).sum(-1, keepdims=True) * a - b) / length
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        losses.consistency_loss(weak, strong, learner), losses.consistency_loss(weak, strong)
    )


def test_an_embedding_of_zeros_has_a_finite_gradient():
    zeros, strong = jnp.zeros((1, 7)), jnp.ones((1, 7))
    for learner in ("weak", "strong", "both"):
        grads = jax.grad(lambda *x, to=learner: losses.consistency_loss(*x, to).sum(), (0, 1))
        assert all(np.isfinite(g).all() for g in grads(zeros, strong))


def test_cycle_loss_can_be_squared():
    text, guess = jnp.asarray(RNG.standard_normal((2, 3, 7)), jnp.float32)
    expected = np.square(np.asarray(text) - np.asarray(guess)).mean(-1)
    np.testing.assert_allclose(losses.cycle_loss(text, guess, "l2"), expected, rtol=1e-5)
    into_text, into_guess = jax.grad(lambda *x: losses.cycle_loss(*x, "l2").sum(), argnums=(0, 1))(
        text, guess
    )
    assert not np.any(into_text)
    np.testing.assert_allclose(into_guess, 2 * (guess - text) / 7, rtol=1e-5)


def pseudo_labels_by_hand(logits, target_probs, confidence):
    """One image at a time, over the pixels that count alone."""
    found = []
    for z, t in zip(np.asarray(logits, np.float64), np.asarray(target_probs), strict=True):
        certain = np.maximum(t, 1 - t) >= confidence
        if not certain.any():
            found.append(0.0)
            continue
        p, y = expit(z[certain]), (t[certain] >= 0.5).astype(np.float64)
        entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        found.append(entropy + 1 - (2 * p @ y + 1e-5) / (p.sum() + y.sum() + 1e-5))
    return found


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.999])
def test_pseudo_labels_are_the_formula_over_the_confident_pixels(confidence):
    target = RNG.random(LOGITS.shape).astype(np.float32)
    target[0], target[1, 0, 0] = 0.6, 0.9995  # no, and one confident pixel at 0.999
    target[2, 0, 0, 0] = 0.5  # p >= 0.5 is foreground
    found = losses.pseudo_label_loss(LOGITS, jnp.asarray(target), confidence)
    expected = pseudo_labels_by_hand(LOGITS, target, confidence)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (float(found[0]) == 0) == (confidence > 0.6)


def test_pseudo_labels_move_the_confident_pixels_alone():
    target = jnp.asarray(RNG.random(LOGITS.shape), jnp.float32).at[0].set(0.6)
    into_logits, into_target = jax.grad(
        lambda *x: losses.pseudo_label_loss(*x, 0.8).sum(), argnums=(0, 1)
    )(LOGITS, target)
    assert not np.any(into_target)
    certain = np.maximum(target, 1 - target) >= 0.8
    np.testing.assert_array_equal(np.asarray(into_logits) != 0, certain)
    assert np.isfinite(into_logits).all()
    huge = jax.grad(lambda z: losses.pseudo_label_loss(z, target, 0.5).sum())(LOGITS * 1e4)
    assert np.isfinite(huge).all()


def test_pseudo_labels_that_are_all_confident_are_the_segmentation_loss():
    found = losses.pseudo_label_loss(LOGITS, MASK, 0.95)
    np.testing.assert_allclose(found, losses.segmentation_loss(LOGITS, MASK), rtol=1e-5)


def test_squared_error_is_numpy_s_with_a_fixed_teacher():
    target = jnp.asarray(RNG.random(LOGITS.shape), jnp.float32)
    expected = np.square(expit(np.asarray(LOGITS)) - np.asarray(target)).mean((1, 2, 3))
    np.testing.assert_allclose(losses.squared_error(LOGITS, target), expected, rtol=1e-5)
    into_target = jax.grad(lambda t: losses.squared_error(LOGITS, t).sum())(target)
    assert not np.any(into_target)
