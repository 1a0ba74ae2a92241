"""Steps are pure functions: no effects, reproducible results, one compilation, any platform."""

from functools import partial

import jax
import jax.export
import jax.monitoring
import numpy as np
import pytest

from biclip_jax.core import distributed
from biclip_jax.evaluation import steps as eval_steps
from tests import tiny


def eval_step_and_variables(axis_name=None):
    model = tiny.model(axis_name)
    variables = tiny.init(model)
    return partial(eval_steps.eval_step, model=model, axis_name=axis_name), variables


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_train_step_has_no_effects(accumulate):
    step, state, batch, key = tiny.train_step(accumulate=accumulate)
    assert jax.make_jaxpr(step)(state, batch, key).effects == set()


@pytest.mark.slow
def test_semi_supervised_step_has_no_effects():
    step, state, batch, key = tiny.train_step(method="semi")
    assert jax.make_jaxpr(step)(state, batch, key).effects == set()


def test_evaluation_and_prediction_steps_have_no_effects():
    step, variables = eval_step_and_variables()
    assert jax.make_jaxpr(step)(variables, tiny.batch()).effects == set()
    predict = partial(eval_steps.predict_step, model=tiny.model())
    assert jax.make_jaxpr(predict)(variables, tiny.batch()).effects == set()


@pytest.mark.slow
def test_train_step_is_reproducible(tiny_step):
    check_reproducible(*tiny_step)


@pytest.mark.slow
def test_semi_supervised_step_is_reproducible():
    step, state, batch, key = tiny.train_step(method="semi")
    metrics = check_reproducible(step, state.replace(step=state.step + 1), batch, key)
    parts = ("seg", "gen", "iac", "cycle", "pseudo_labels")
    assert set(metrics) == {"loss", "grad_norm", "skipped", *(f"loss_{part}" for part in parts)}
    assert all(np.isfinite(total) for total, _ in metrics.values())
    assert metrics["skipped"][0] == 0


def check_reproducible(step, state, batch, key):
    """Takes a step twice, and once with another key; returns its metrics."""
    step = jax.jit(step)
    first, second = step(state, batch, key), step(state, batch, key)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other, _ = step(state, batch, jax.random.key(2))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first[0].params, other.params)
    assert not jax.tree.all(same)
    return first[1]


@pytest.mark.slow
def test_train_step_is_compiled_once():
    """Only the first step may trace and compile."""
    step, state, batch, key = tiny.train_step(distributed.AXIS)
    traces, compilations = [], []

    def traced_step(*args):
        traces.append(1)
        return step(*args)

    def record_compilation(event, _duration, **_details):
        if "compile" in event:
            compilations.append(event)

    train = distributed.pmap_train_step(traced_step)
    batches = [distributed.shard_batch(tiny.batch(seed=seed)) for seed in range(4)]
    state, key = distributed.replicate(state), distributed.replicate(key)
    jax.monitoring.register_event_duration_secs_listener(record_compilation)
    state, _ = jax.block_until_ready(train(state, batches[0], key))
    assert compilations
    compilations.clear()
    for batch in batches[1:]:
        state, metrics = jax.block_until_ready(train(state, batch, key))
    jax.monitoring.clear_event_listeners()
    assert compilations == []
    assert len(traces) == 1
    assert int(state.step) == 4
    assert float(metrics["loss"][1]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_mesh_train_step_lowers_for(platform):
    step, state, batch, key = tiny.train_step()
    layout = distributed.sharded(state)
    train = distributed.mesh_train_step(step, layout)
    export = jax.export.export(train, platforms=[platform])
    exported = export(distributed.put(state, layout), distributed.global_batch(batch), key)
    assert exported.platforms == (platform,)
    assert "stablehlo.convolution" in exported.mlir_module()


@pytest.mark.parametrize("method", ["published", pytest.param("semi", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "platform", ["tpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cuda", "cpu"))]
)
def test_pmap_train_step_lowers_for(platform, method):
    step, state, batch, key = tiny.train_step(distributed.AXIS, method=method)
    train = distributed.pmap_train_step(step)
    export = jax.export.export(jax.jit(train), platforms=[platform])
    exported = export(state, distributed.shard_batch(batch), key)
    assert exported.platforms == (platform,)
    assert "stablehlo.convolution" in exported.mlir_module()
    assert "stablehlo.all_reduce" in exported.mlir_module()
