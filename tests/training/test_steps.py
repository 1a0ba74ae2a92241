"""The train step: accumulation, skipped steps, random keys, metrics as (sum, count)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from biclip_jax.models import biclip
from biclip_jax.training import state as train_state
from biclip_jax.training import steps, views
from biclip_jax.training.objectives import biclip as objective
from tests import tiny


def flat(tree):
    return {k: np.asarray(v) for k, v in flatten_dict(tree, sep="/").items()}


def quadratic(params, state, batch, keys):
    """mean((w - x)^2) over the batch, a loss with a known gradient."""
    value = jnp.square(params["w"] - batch["x"])
    stats = {"seen": state.batch_stats["seen"] + batch["x"].size}
    return value.mean(), (stats, {"loss": value})


def quadratic_state(optimizer):
    variables = {"params": {"w": jnp.float32(1.0)}, "batch_stats": {"seen": jnp.float32(0)}}
    return train_state.create(variables, optimizer)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_step_is_gradient_descent_for_any_accumulation(accumulate):
    sgd = optax.sgd(0.1)
    batch = {"x": jnp.array([0.0, 1.0, 2.0, 5.0]), "row": jnp.arange(4, dtype=jnp.int32)}
    state, metrics = steps.train_step(
        quadratic_state(sgd),
        batch,
        jax.random.key(0),
        objective=quadratic,
        optimizer=sgd,
        accumulate=accumulate,
    )
    # d/dw mean((w - x)^2) = 2 (w - mean x) = 2 (1 - 2) = -2
    assert float(state.params["w"]) == pytest.approx(1.2)
    assert float(state.batch_stats["seen"]) == 4
    assert int(state.step) == 1
    total, count = metrics["loss"]
    assert (float(total), float(count)) == (1 + 0 + 1 + 16, 4)
    assert float(metrics["grad_norm"][0]) == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_step_changes_only_the_counters(bad):
    adam = optax.adam(0.1)
    before = quadratic_state(adam)
    batch = {"x": jnp.array([0.0, bad]), "row": jnp.arange(2, dtype=jnp.int32)}
    after, metrics = steps.train_step(
        before, batch, jax.random.key(0), objective=quadratic, optimizer=adam
    )
    for name in ("params", "batch_stats", "opt_state"):
        old, new = getattr(before, name), getattr(after, name)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), old, new)), name
    assert (int(after.step), int(after.skipped)) == (1, 1)
    assert float(metrics["skipped"][0]) == 1


def test_mean_metrics_exclude_skipped_steps():
    first = {"loss": (6.0, 3.0), "skipped": (0.0, 1.0)}
    second = {"loss": (4.0, 2.0), "skipped": (0.0, 1.0)}
    skipped = {"loss": (float("nan"), 3.0), "skipped": (1.0, 1.0)}
    assert steps.mean_metrics([first, skipped, second]) == {"loss": 2.0, "skipped": 1}
    assert steps.mean_metrics([skipped]) == {"skipped": 1}


def test_keys_depend_only_on_stream_step_and_global_row():
    key, rows = jax.random.key(7), jnp.arange(6, dtype=jnp.int32)
    all_keys = jax.random.key_data(steps.example_keys(key, jnp.int32(3), rows))
    parts = [
        jax.random.key_data(steps.example_keys(key, jnp.int32(3), rows[i : i + 2]))
        for i in (0, 2, 4)
    ]
    np.testing.assert_array_equal(all_keys, np.concatenate(parts))
    next_keys = jax.random.key_data(steps.example_keys(key, jnp.int32(4), rows))
    assert len(np.unique(np.concatenate([all_keys, next_keys]), axis=0)) == 12


@pytest.mark.slow
def test_loss_decreases_and_is_the_weighted_sum_of_its_parts(tiny_step):
    step, state, batch, key = tiny_step
    step, first = jax.jit(step), None
    for _ in range(30):
        state, metrics = step(state, batch, key)
        first = first or metrics
    parts = {k: float(v[0] / v[1]) for k, v in metrics.items()}
    weighted = sum(w * parts[f"loss_{name}"] for name, w in tiny.WEIGHTS.items())
    assert parts["loss"] == pytest.approx(parts["loss_seg"] + weighted, rel=1e-5)
    # The targets of the other terms change with the network.
    assert parts["loss_seg"] < 0.9 * float(first["loss_seg"][0] / first["loss_seg"][1])


@pytest.mark.slow
def test_iac_has_no_gradient_through_the_strong_view():
    """L_IAC's gradient is that of 1 - cos(p_w, p_s) with p_s a constant."""
    _, state, batch, key = tiny.train_step()
    model = tiny.model()
    recipe = objective.Recipe({"iac": 1.0}, views.Geometry(0.0, 0.0, 0.0))
    keys = steps.example_keys(key, state.step, batch["row"])

    def iac(params):
        _, (_, values) = objective.objective(params, state, batch, keys, model=model, recipe=recipe)
        return values["loss_iac"].mean()

    def embeddings(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        image, prompt = biclip.to_unit_rgb(batch["image"]), biclip.text_inputs(batch)
        pseudo = model.apply(variables, image, **prompt, method=model.fuse).pseudo_image
        photometric = jax.vmap(lambda k, x: views.published_photometric(jax.random.split(k)[1], x))(
            keys, image
        )
        passes = [biclip.View(image, pseudo), biclip.View(photometric, pseudo)]
        out, _ = objective.forward_passes(model, variables, passes, recipe)
        return [part.embeddings["decoder_0"] for part in out]

    _, target = embeddings(state.params)

    def iac_with_constant_target(params):
        weak, _ = embeddings(params)
        norms = jnp.linalg.norm(weak, axis=-1) * jnp.linalg.norm(target, axis=-1)
        return (1 - (weak * target).sum(-1) / norms).mean()

    found = flat(jax.jit(jax.grad(iac))(state.params))
    expected = flat(jax.jit(jax.grad(iac_with_constant_target))(state.params))
    for name in ("consistency_head/out/bias", "consistency_head/norm/scale"):
        assert np.abs(expected[name]).max() > 0
        np.testing.assert_allclose(
            found[name], expected[name], atol=1e-2 * np.abs(expected[name]).max(), err_msg=name
        )


@pytest.mark.slow
def test_greyscale_and_equal_rgb_images_give_the_same_step(tiny_step):
    step, state, batch, key = tiny_step
    colour = {**batch, "image": np.repeat(batch["image"], 3, axis=-1)}
    step = jax.jit(step)
    grey_state, _ = step(state, batch, key)
    colour_state, _ = step(state, colour, key)
    for name, value in flat(grey_state.params).items():
        np.testing.assert_allclose(value, flat(colour_state.params)[name], atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    model = tiny.model(dtype="bfloat16")
    variables = jax.jit(model.init)(
        jax.random.key(0),
        jnp.zeros((1, 56, 56, 3)),
        jnp.zeros((1, 8), jnp.int32),
        jnp.ones((1, 8), bool),
    )
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    image = jnp.asarray(np.random.default_rng(0).random((2, 56, 56, 3)), jnp.float32)
    ids, mask = jnp.ones((2, 8), jnp.int32), jnp.ones((2, 8), bool)
    narrow, aux = model.apply(variables, image, ids, mask)
    wide, _ = tiny.model().apply(variables, image, ids, mask)
    assert aux["features"].dtype == jnp.bfloat16
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(narrow - wide).max() < 0.1 * float(wide.std()) + 0.05


def test_gather_batch_selects_records():
    data = {"image": jnp.arange(6.0), "mask": jnp.arange(1, 7, dtype=jnp.uint8).reshape(6, 1, 1, 1)}
    rows = {"index": jnp.array([4, 0]), "row": jnp.array([0, 1]), "labelled": jnp.array([1, 0])}
    batch = steps.gather_batch(data, rows)
    assert batch["image"].tolist() == [4.0, 0.0]
    assert batch["mask"].ravel().tolist() == [5, 1] and batch["mask"].dtype == jnp.uint8
    assert batch["row"].tolist() == [0, 1] and batch["labelled"].tolist() == [1, 0]
    # The member axis of an ensemble is the first.
    stacked = steps.gather_batch(data, {name: jnp.stack([x, x[::-1]]) for name, x in rows.items()})
    assert stacked["image"].tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert stacked["mask"].shape == (2, 2, 1, 1, 1)


@pytest.mark.parametrize("length", [1, 4])
def test_multi_step_equals_single_steps_and_compiles_once(length):
    adam = optax.adam(0.1)

    def noisy_loss(params, state, batch, keys):
        noise = jax.vmap(jax.random.normal)(keys)
        return quadratic(params, state, {"x": batch["image"] + noise}, keys)

    traces = []

    def step(*args):
        traces.append(0)
        return steps.train_step(*args, objective=noisy_loss, optimizer=adam)

    data = {"image": jnp.arange(6.0), "mask": jnp.ones((6, 1, 1, 1), jnp.uint8)}
    index = jnp.array([[0, 5], [1, 1], [3, 2], [4, 0]])
    rows = {"index": index, "row": jnp.tile(jnp.arange(2), (4, 1)), "labelled": index >= 0}
    rows = jax.tree.map(lambda x: x[:length], rows)
    multi_step, key = jax.jit(steps.multi_step(step, length)), jax.random.key(3)
    multi_step(quadratic_state(adam), data, rows, np.int32(1), key)
    num_traces = len(traces)
    for count in range(1, length + 1):
        expected, losses = quadratic_state(adam), []
        state, metrics = multi_step(expected, data, rows, np.int32(count), key)
        for i in range(count):
            batch = steps.gather_batch(data, jax.tree.map(lambda x, i=i: x[i], rows))
            expected, single = steps.train_step(
                expected, batch, key, objective=noisy_loss, optimizer=adam
            )
            losses.append(float(single["loss"][0]))
        assert int(state.step) == count
        np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-6)
        found = metrics["loss"][0]
        assert found.shape == (length,)
        np.testing.assert_allclose(found[:count], losses, rtol=1e-6)
    assert len(traces) == num_traces
