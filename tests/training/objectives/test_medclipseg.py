"""MedCLIPSeg's losses against NumPy, and its objective: sums, devices, dropout, gradients."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import expit, log_softmax, softmax

from biclip_jax.core import config as config_lib
from biclip_jax.models import medclipseg
from biclip_jax.training import losses, steps, views
from biclip_jax.training import state as train_state
from biclip_jax.training.objectives import medclipseg as objective
from tests import tiny_medclipseg as tiny

RNG = np.random.default_rng(0)
IDENTITY = views.Geometry(0.0, 0.0, 0.0)
WEIGHTS = {"dice": 0.5, "bce": 0.5, "contrastive": 0.1}
AXIS = "devices"


# --- losses ---


def row_dice(logits, mask):
    """Computes one Dice loss per row of pixels except the first; both inputs are (B, H, W)."""
    values = []
    for z, y in zip(np.asarray(logits, float), np.asarray(mask, float), strict=True):
        rows = []
        for r in range(1, len(z)):
            p = expit(z[r])
            rows.append(1 - (2 * (p * y[r]).sum() + 1e-5) / (p.sum() + y[r].sum() + 1e-5))
        values.append(np.mean(rows))
    return np.array(values)


def test_row_dice_matches_numpy():
    logits, mask = RNG.standard_normal((3, 5, 7, 1)), RNG.integers(0, 2, (3, 5, 7, 1))
    logits, mask = jnp.asarray(logits, jnp.float32), jnp.asarray(mask, jnp.float32)
    found = losses.row_dice_loss(logits, mask)
    expected = row_dice(logits[..., 0], mask[..., 0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    other = losses.row_dice_loss(logits.at[:, 0].set(9.0), mask.at[:, 0].set(0.0))
    np.testing.assert_array_equal(other, found)
    assert np.abs(losses.soft_dice_loss(logits, mask) - expected).min() > 1e-3
    empty = losses.row_dice_loss(logits, 0 * mask)
    np.testing.assert_allclose(empty, 1, atol=1e-4)


def released_loss(pooled, text, tau):
    """Computes the contrastive loss per row, and the targets, as the released code does."""
    scores, similarity = pooled @ text.T / tau, text @ text.T / tau
    similarity = similarity / np.sqrt((similarity**2).sum(1, keepdims=True))
    targets = softmax(similarity, axis=1)
    image_to_text = -(targets * log_softmax(scores, axis=1)).sum(1)
    text_to_image = -(targets.T * log_softmax(scores.T, axis=1)).sum(1)
    return (image_to_text + text_to_image) / 2, targets


def test_pooled_patches_are_not_normalised_again():
    features = RNG.standard_normal((2, 5, 3))
    units = features / np.linalg.norm(features, axis=-1, keepdims=True)
    found = losses.pooled_patches(jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(found, units.mean(1), atol=1e-6)
    assert (np.linalg.norm(found, axis=-1) < 0.99).all()


def test_released_contrastive_loss_matches_numpy():
    pooled, text = RNG.standard_normal((4, 6)), 3 * RNG.standard_normal((4, 6))
    expected, targets = released_loss(pooled, text, 0.2)
    assert np.abs(targets.T.sum(1) - 1).max() > 0.01
    arguments = [jnp.asarray(x, jnp.float32) for x in (pooled, text)]
    found = losses.contrastive_loss(*arguments, temperature=0.2, kind="released")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # The targets do not depend on the temperature.
    np.testing.assert_allclose(released_loss(pooled, text, 0.7)[1], targets, rtol=1e-12)


@pytest.mark.parametrize("kind", ["described", "released"])
def test_contrastive_loss_of_one_example_is_zero(kind):
    loss = losses.contrastive_loss(jnp.ones((1, 3)), jnp.array([[1.0, 2.0, 3.0]]), kind=kind)
    assert float(loss[0]) == 0


@pytest.mark.parametrize("kind", ["described", "released"])
def test_contrastive_targets_have_no_gradient(kind):
    """The gradient with respect to the text is that with constant targets."""
    pooled, text = (jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32) for _ in range(2))
    constant = np.asarray(text, float)
    if kind == "described":
        constant = constant / np.linalg.norm(constant, axis=1, keepdims=True)
        targets = reverse_targets = jnp.asarray(softmax(constant @ constant.T / 0.2, axis=1))
    else:
        targets = jnp.asarray(released_loss(np.asarray(pooled, float), constant, 0.2)[1])
        reverse_targets = targets.T

    def loss_with_constant_targets(text):
        if kind == "described":
            text = text / jnp.linalg.norm(text, axis=1, keepdims=True)
        scores = pooled @ text.T / 0.2
        directions = [(targets, scores), (reverse_targets, scores.T)]
        return -sum((t * jax.nn.log_softmax(s)).sum() for t, s in directions) / 2

    grads = jax.grad(lambda t: losses.contrastive_loss(pooled, t, kind=kind).sum())(text)
    np.testing.assert_allclose(grads, jax.grad(loss_with_constant_targets)(text), atol=1e-4)


def unit_vectors(cosine, count=24):
    """Returns unit vectors with the same cosine between any two."""
    gram = np.full((count, count), cosine) + (1 - cosine) * np.eye(count)
    return np.linalg.cholesky(gram)


@pytest.mark.parametrize(
    ("cosine", "described", "released"),
    [(0.0, 0.87, 0.106), (0.5, 0.35, 0.050), (0.9, 0.067, 0.0426)],
)
def test_contrastive_targets_follow_the_similarity_of_texts(cosine, described, released):
    """For a row of scores 0, ..., 0, z the loss decreases by G z, which reveals the target G."""
    text = unit_vectors(cosine)
    for kind, diagonal, scale in [("described", described, 5.0), ("released", released, 1.0)]:
        # r T^T / tau = e_0 z for row 0 only; the expected value covers both directions.
        z = 1e-2
        pooled = np.zeros((24, 24))
        pooled[0] = np.linalg.solve(text, np.eye(24)[0]) * z * 0.2
        inputs = [jnp.asarray(x, jnp.float32) for x in (pooled, scale * text)]
        if kind == "released":
            inputs[0] = inputs[0] / scale
        loss = float(losses.contrastive_loss(*inputs, kind=kind)[0])
        uniform_loss = float(losses.contrastive_loss(0 * inputs[0], inputs[1], kind=kind)[0])
        _, targets = released_loss(pooled, text, 0.2)
        if kind == "described":
            targets = softmax(text @ text.T / 0.2, axis=1)
        assert targets[0, 0] == pytest.approx(diagonal, rel=0.02)
        reverse = targets.T if kind == "released" else targets
        scores = np.zeros((24, 24))
        scores[0, 0] = z
        forward = targets[0] @ log_softmax(scores[0])
        expected = -(forward + reverse[0] @ log_softmax(scores.T[0])) / 2
        expected_uniform = (targets[0].sum() + reverse[0].sum()) / 2 * np.log(24)
        assert loss - uniform_loss == pytest.approx(expected - expected_uniform, rel=2e-2, abs=2e-6)


# --- objective ---


def bind_objective(dropout=0.0, axis_name=None, **changes):
    """Returns the objective of the smallest model (two blocks, one adapter), and the model."""
    encoders = tiny.encoders("unimedclip", num_blocks=2)
    encoders["text"]["dropout"] = dropout
    model = medclipseg.build(tiny.fields(num_layers=1, **encoders))
    recipe = objective.Recipe(WEIGHTS, geometry=IDENTITY)._replace(**changes)
    return partial(objective.objective, model=model, recipe=recipe, axis_name=axis_name), model


@pytest.fixture(scope="module", autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def state():
    _, model = bind_objective()
    return train_state.create(tiny.variables(model), optax.sgd(0.1), medclipseg.FROZEN)


@pytest.fixture(scope="module")
def gradient(state):
    """Returns the compiled function and its result (loss, values, grads) for a batch."""
    run = jax.jit(jax.value_and_grad(bind_objective()[0], has_aux=True))
    return run, run(state.params, state, tiny.batch(), tiny.keys())


def test_loss_is_the_weighted_sum_of_its_parts(state, gradient):
    (loss, (stats, values)), _ = gradient[1]
    assert set(values) == {"loss", "loss_dice", "loss_bce", "loss_contrastive"}
    assert stats == {}
    expected = sum(weight * values[f"loss_{name}"] for name, weight in WEIGHTS.items())
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-6)
    assert float(loss) == pytest.approx(float(values["loss"].mean()), rel=1e-6)
    assert all(value.shape == (4,) and (value > 0).all() for value in values.values())


@pytest.mark.slow
@pytest.mark.parametrize(("dice", "kind"), [("image", "described"), ("rows", "released")])
def test_parts_are_the_losses_of_a_pass_with_noise_from_the_keys(state, dice, kind):
    run, model = bind_objective(dice=dice, contrastive=kind)
    batch, keys = tiny.batch(), tiny.keys()
    _, (_, values) = jax.jit(run)(state.params, state, batch, keys)
    noise = jax.vmap(jax.random.fold_in, (0, None))(keys, objective.NOISE)
    variables = {"params": {**state.params, **state.frozen}}
    image, mask = batch["image"] / 255.0, batch["mask"].astype(jnp.float32)
    logits, aux = jax.jit(model.apply)(variables, image, batch["text_ids"], noise=noise)
    expected = row_dice(logits[..., 0], mask[..., 0])
    if dice == "image":
        expected = losses.soft_dice_loss(logits, mask)
    np.testing.assert_allclose(values["loss_dice"], expected, rtol=1e-4)
    expected = optax.sigmoid_binary_cross_entropy(logits, mask).mean((1, 2, 3))
    np.testing.assert_allclose(values["loss_bce"], expected, rtol=1e-4)
    pooled = losses.pooled_patches(aux["features"])
    expected = losses.contrastive_loss(pooled, aux["text"], 0.2, kind)
    np.testing.assert_allclose(values["loss_contrastive"], expected, rtol=1e-4)


def test_part_without_weight_is_not_computed(state):
    run, _ = bind_objective(weights={**WEIGHTS, "contrastive": 0.0})
    _, (_, values) = jax.eval_shape(run, state.params, state, tiny.batch(), tiny.keys())
    assert set(values) == {"loss", "loss_dice", "loss_bce"}


def test_exactly_the_trained_parameters_have_a_gradient(gradient):
    grads = flatten_dict(gradient[1][1], sep="/")
    assert {name.split("/")[0] for name in grads} == {"adapters_0", "head"}
    for name, value in grads.items():
        assert np.isfinite(value).all(), name
        # This bias shifts all scores of a query equally: its gradient is zero up to rounding.
        if not name.endswith("norm_key/bias"):
            assert np.abs(value).max() > 0, name


def test_same_keys_give_the_same_loss_bit_for_bit(state, gradient):
    run, first = gradient
    jax.tree.map(
        np.testing.assert_array_equal, first, run(state.params, state, tiny.batch(), tiny.keys())
    )
    (other, _), _ = run(state.params, state, tiny.batch(), tiny.keys(seed=6))
    assert float(other) != float(first[0][0])


def test_contrastive_loss_compares_with_the_texts_of_all_devices():
    """The mean over two devices has the value and the gradient of the global batch."""
    recipe = objective.Recipe(WEIGHTS)
    features, text = (jnp.asarray(RNG.standard_normal(shape)) for shape in ((4, 5, 6), (4, 3)))
    params = [jnp.asarray(RNG.standard_normal((size, 7))) for size in (6, 3)]

    def loss(params, features, text, axis_name=None):
        values = objective.contrastive_part(
            features @ params[0], text @ params[1], recipe, axis_name
        )
        return values.mean(), values

    global_loss = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_grads = global_loss(params, features, text)

    def shard_loss(*batch):
        run = jax.value_and_grad(partial(loss, axis_name=AXIS), has_aux=True)
        (_, values), grads = run(params, *batch)
        return values, jax.lax.pmean(grads, AXIS)

    shards = features.reshape(2, 2, 5, 6), text.reshape(2, 2, 3)
    values, grads = jax.jit(jax.vmap(shard_loss, axis_name=AXIS))(*shards)
    np.testing.assert_allclose(values.reshape(-1), expected, rtol=1e-5)
    for found, expected_grad in zip(grads, expected_grads, strict=True):
        assert jnp.abs(expected_grad).max() > 1e-2
        np.testing.assert_allclose(found[0], expected_grad, atol=1e-5)
        np.testing.assert_allclose(found[1], expected_grad, atol=1e-5)
    local = [loss(params, *(part[i] for part in shards))[1] for i in range(2)]
    assert np.abs(np.concatenate(local) - expected).min() > 1e-3


RUN = """
import sys
import jax, numpy as np, optax
from functools import partial
from flax.traverse_util import flatten_dict
from biclip_jax.core import distributed
from biclip_jax.experiment import program
from biclip_jax.models import medclipseg
from biclip_jax.training import state as train_state
from biclip_jax.training import steps
from tests import tiny_medclipseg as tiny
from tests.training.objectives.test_medclipseg import bind_objective

devices, path, kind, mode = sys.argv[1:]
assert jax.local_device_count() == int(devices)
axis_name = distributed.axis_name_of(mode)
run, model = bind_objective(axis_name=axis_name, dice="rows", contrastive=kind, dropout=0.1)
sgd = optax.sgd(0.1)
state = train_state.create(tiny.variables(model), sgd, medclipseg.FROZEN)
step = partial(steps.train_step, objective=run, optimizer=sgd, axis_name=axis_name)
shard, layout = distributed.shard_batch, distributed.replicated(state)
if mode == "mesh":
    shard, layout = distributed.global_batch, program.state_shardings(state, "all")
    step = distributed.mesh_train_step(step, layout)
else:
    step = distributed.pmap_train_step(step)
state, key = distributed.put(state, layout), distributed.replicate(jax.random.key(1))
for seed in range(2):
    state, metrics = step(state, shard(tiny.batch(seed=seed)), key)
host = distributed.to_host(state)
assert int(host.skipped) == 0
np.savez(path, loss=metrics["loss"][0], **flatten_dict(host.params, sep="/"))
"""


def run_on(devices, path, kind, mode="pmap"):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
    }
    arguments = [sys.executable, "-c", RUN, str(devices), str(path), kind, mode]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(np.load(path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["described", "released"])
def test_two_devices_take_the_same_steps(tmp_path, kind):
    """Uses SGD, because Adam would hide a wrong scale of the gradient."""
    one, two = (run_on(n, tmp_path / f"{n}.npz", kind) for n in (1, 2))
    mesh = run_on(2, tmp_path / "mesh.npz", kind, "mesh")
    assert one.keys() == two.keys() == mesh.keys()
    for name, value in one.items():
        for found in (two, mesh):
            np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_text_encoder_dropout_is_applied_only_if_configured(state, gradient):
    batch, keys = tiny.batch(), tiny.keys()
    without_dropout = float(gradient[1][0][0])
    run = jax.jit(bind_objective(dropout=0.1)[0])
    first, second = (run(state.params, state, batch, k)[0] for k in (keys, keys))
    assert float(first) == float(second)
    assert abs(float(first) - without_dropout) > 1e-5
    # Dropout and noise use different keys.
    assert len({objective.GEOMETRY, objective.NOISE, objective.DROPOUT}) == 3


def test_optimiser_has_no_state_for_the_encoders(state):
    paths = jax.tree_util.tree_leaves_with_path(optax.adam(1e-3).init(state.params))
    assert any("adapters_0" in str(path) for path, _ in paths)
    assert not any(name in str(path) for path, _ in paths for name in medclipseg.FROZEN)
    assert set(state.frozen) == set(medclipseg.FROZEN)


@pytest.mark.slow
def test_step_updates_only_adapters_and_head(state):
    run, _ = bind_objective()
    adam = optax.adam(1e-3)
    variables = {"params": {**state.params, **state.frozen}, "batch_stats": {}}
    before = train_state.create(variables, adam, medclipseg.FROZEN)
    step = jax.jit(partial(steps.train_step, objective=run, optimizer=adam))
    after, metrics = step(before, tiny.batch(), jax.random.key(0))
    assert (int(after.step), int(after.skipped)) == (1, 0)
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    for name, value in flatten_dict(after.params, sep="/").items():
        change = np.abs(value - flatten_dict(before.params, sep="/")[name])
        assert change.max() > 0 or name.endswith("norm_key/bias"), name
        assert change.max() <= 1.001e-3
    assert float(metrics["loss"][1]) == 4


@pytest.mark.slow
def test_flipped_images_get_the_swapped_prompt(state):
    """With flip probability 1 the loss is that of the flipped image with the swapped prompt."""
    batch = tiny.batch()
    batch["swapped_text_ids"] = jnp.where(batch["text_ids"] == 5, 6, batch["text_ids"])
    batch["swapped_text_ids"] = batch["swapped_text_ids"].at[:, 1].set(7)
    swapped = {**batch, "text_ids": batch["swapped_text_ids"]}
    swapped |= {name: batch[name][:, :, ::-1] for name in ("image", "mask")}
    run, _ = bind_objective()
    flipping, _ = bind_objective(geometry=IDENTITY._replace(horizontal_flip=1.0))
    keys = tiny.keys()
    found, _ = jax.jit(flipping)(state.params, state, batch, keys)
    expected, _ = jax.jit(run)(state.params, state, swapped, keys)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    plain, _ = jax.jit(run)(state.params, state, batch, keys)
    assert abs(float(plain) - float(expected)) > 1e-5


@pytest.mark.parametrize(
    ("variant", "dice", "kind"),
    [("", "image", "described"), (":reference", "rows", "released")],
)
def test_recipe_follows_the_config(variant, dice, kind):
    recipe = objective.make_recipe(config_lib.load_config(f"medclipseg{variant}", []).to_dict())
    assert recipe.weights == WEIGHTS
    assert (recipe.dice, recipe.contrastive, recipe.temperature) == (dice, kind, 0.2)
    integer = variant == ":reference"
    expected = views.Geometry(0.0, 0.0, 0.5, 20.0, 0.0, 1.0, 1.0, integer_degrees=integer)
    assert recipe.geometry == expected
