"""K models in one program: each member equals the model trained alone with its seed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models import ensemble
from biclip_jax.models.text import TextEncoder
from biclip_jax.training import optim, steps
from biclip_jax.training import state as train_state
from tests import tiny

MEMBERS, STEPS = 3, 5


@pytest.fixture(scope="module")
def runs():
    """Runs five SGD steps of three members, as an ensemble and individually."""
    step, *_ = tiny.train_step(optimizer="sgd")
    members = [
        train_state.create(tiny.init(tiny.model(), seed), tiny_optimizer())
        for seed in range(MEMBERS)
    ]
    keys = [jax.random.key(seed) for seed in range(MEMBERS)]
    single_step, ensemble_step = jax.jit(step), jax.jit(steps.ensemble_step(step))
    stacked, singles = train_state.stack(members), list(members)
    metrics = []
    for number in range(STEPS):
        batches = [tiny.batch(seed=10 * number + member) for member in range(MEMBERS)]
        joined = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
        stacked, ensemble_metrics = ensemble_step(stacked, joined, jnp.stack(keys))
        results = [single_step(*args) for args in zip(singles, batches, keys, strict=True)]
        singles = [state for state, _ in results]
        metrics.append((ensemble_metrics, [values for _, values in results]))
    return stacked, singles, metrics


def tiny_optimizer():
    fields = {"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.0, "encoder_learning_rate": 0.0}
    return optim.make_optimizer(fields, 1e-2)


@pytest.mark.slow
def test_members_equal_individually_trained_models(runs):
    stacked, singles, _ = runs
    assert train_state.step_of(stacked) == STEPS
    for member, state in enumerate(singles):
        found = jax.tree.map(lambda x, k=member: x[k], (stacked.params, stacked.batch_stats))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
            found,
            (state.params, state.batch_stats),
        )
    first, second = (jax.tree.leaves(state.params) for state in singles[:2])
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_metrics_are_summed_over_the_members(runs):
    for ensemble_metrics, single_metrics in runs[2]:
        total, count = ensemble_metrics["loss"]
        assert float(count) == sum(float(values["loss"][1]) for values in single_metrics)
        expected = sum(float(values["loss"][0]) for values in single_metrics)
        assert float(total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_ensemble_probability_is_the_mean_over_its_members(runs):
    stacked, singles, _ = runs
    batch, member = tiny.batch(2), tiny.model()
    image = jnp.asarray(batch["image"] / 255.0, jnp.float32).repeat(3, -1)
    text = {name: batch[name] for name in ("text_ids", "text_mask", "has_text")}
    variables = ensemble.stacked(train_state.inference_variables(stacked))
    model = ensemble.Ensemble(member, MEMBERS)
    logits, aux = jax.jit(model.apply)(variables, image, **text)
    member_probs = [
        jax.nn.sigmoid(member.apply(train_state.inference_variables(state), image, **text)[0])
        for state in singles
    ]
    np.testing.assert_allclose(jax.nn.sigmoid(logits), np.mean(member_probs, axis=0), atol=1e-5)
    assert aux["member_logits"].shape == (MEMBERS, 2, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 1)
    for index, expected in enumerate(member_probs):
        member_variables = ensemble.member_of(variables, index)
        found = jax.nn.sigmoid(member.apply(member_variables, image, **text)[0])
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_shared_text_encoder_encodes_once_for_all_members():
    batch, encoder = tiny.batch(2), TextEncoder(tiny.VOCAB_SIZE, tiny.MAX_LENGTH, 8, 1, 2)
    member = tiny.model().clone(text_encoder=None)
    ids = {name: batch[name] for name in ("text_ids", "text_mask")}
    image = jnp.asarray(batch["image"] / 255.0, jnp.float32).repeat(3, -1)
    model = ensemble.Ensemble(member, 2, encoder)
    variables = jax.jit(model.init)(jax.random.key(0), image, **ids)
    assert set(variables["params"]) == {"member", "text_encoder"}
    logits, _ = model.apply(variables, image, **ids)
    member_variables = {"params": {"member": variables["params"]["member"]}}
    member_variables["batch_stats"] = variables["batch_stats"]
    features = encoder.apply({"params": variables["params"]["text_encoder"]}, *ids.values())
    model = ensemble.Ensemble(member, 2)
    expected, _ = model.apply(member_variables, image, text_features=features)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


class Pixel(nn.Module):
    """A linear layer per pixel as a minimal model."""

    @nn.compact
    def __call__(self, image):
        return nn.Dense(1, name="out")(image), {}


def test_members_are_initialised_differently():
    image = jnp.asarray(np.random.default_rng(0).random((1, 2, 2, 3)), jnp.float32)
    model = ensemble.Ensemble(Pixel(), 2)
    variables = model.init(jax.random.key(0), image)
    kernels = variables["params"]["member"]["out"]["kernel"]
    assert kernels.shape == (2, 3, 1) and np.abs(kernels[0] - kernels[1]).min() > 1e-3
    _, aux = model.apply(variables, image)
    expected = np.einsum("bhwc,kcd->kbhwd", image, kernels)
    np.testing.assert_allclose(aux["member_logits"], expected, rtol=1e-5)
