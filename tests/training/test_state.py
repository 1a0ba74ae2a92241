"""The train state: moving averages, frozen parameters, variables for inference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from biclip_jax.training import state as train_state
from biclip_jax.training import steps


def variables():
    params = {"w": jnp.float32(1.0), "encoder": {"v": jnp.arange(3.0)}}
    return {"params": params, "batch_stats": {"seen": jnp.float32(0)}}


def quadratic(params, state, batch, keys):
    """mean((w - x)^2) plus a frozen part; the statistics sum x."""
    value = jnp.square(params["w"] - batch["x"]) + state.frozen["encoder"]["v"].sum()
    return value.mean(), ({"seen": state.batch_stats["seen"] + batch["x"].sum()}, {"loss": value})


def run(values, decay, **options):
    """Returns the states after each SGD step with rate 0.5, which sets w to the batch mean."""
    sgd = optax.sgd(0.5)
    state = train_state.create(variables(), sgd, ["encoder"], average=decay > 0)
    states = [state]
    for x in values:
        batch = {"x": jnp.array([x, x]), "row": jnp.arange(2, dtype=jnp.int32)}
        state, _ = steps.train_step(
            state,
            batch,
            jax.random.key(0),
            objective=quadratic,
            optimizer=sgd,
            ema_decay=decay,
            **options,
        )
        states.append(state)
    return states


def test_moving_averages_of_three_steps():
    """min(decay, (1 + t) / (10 + t)) is 0.1, then 2/11, then the decay of 0.2."""
    states = run([2.0, 3.0, 5.0], 0.2)
    w, seen = 1.0, 0.0
    for decay, latest, total in zip([0.1, 2 / 11, 0.2], [2, 3, 5], [4, 10, 20], strict=True):
        w, seen = decay * w + (1 - decay) * latest, decay * seen + (1 - decay) * total
    last = states[-1]
    assert float(last.params["w"]) == pytest.approx(5.0)
    assert float(last.ema["params"]["w"]) == pytest.approx(w, rel=1e-6)
    assert float(last.ema["batch_stats"]["seen"]) == pytest.approx(seen, rel=1e-6)
    assert "encoder" not in last.ema["params"]


def test_average_statistics_can_be_disabled():
    states = run([2.0, 3.0], 0.2, average_statistics=False)
    assert float(states[-1].ema["batch_stats"]["seen"]) == 10.0
    averaged = run([2.0, 3.0], 0.2)[-1]
    assert float(states[-1].ema["params"]["w"]) == float(averaged.ema["params"]["w"])


def test_skipped_step_does_not_change_the_averages():
    states = run([2.0, float("nan"), 5.0], 0.9)
    jax.tree.map(np.testing.assert_array_equal, states[1].ema, states[2].ema)
    assert int(states[3].skipped) == 1
    # The warm-up of the decay counts all steps, skipped ones included.
    w = 0.1 * 1.0 + 0.9 * 2.0
    assert float(states[3].ema["params"]["w"]) == pytest.approx(0.25 * w + 0.75 * 5.0, rel=1e-6)


def test_no_averages_without_decay():
    assert run([2.0], 0.0)[-1].ema is None


def test_frozen_parameters_do_not_change_and_have_no_optimiser_state():
    state = train_state.create(variables(), optax.adam(0.1), ["encoder"])
    assert set(state.params) == {"w"}
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    assert sizes == [1, 1, 1]  # the count, and both moments of w
    last = run([2.0, 3.0], 0.5)[-1]
    np.testing.assert_array_equal(last.frozen["encoder"]["v"], np.arange(3))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_inference_variables_are_averages_and_frozen_parameters(decay):
    last = run([2.0, 3.0], decay)[-1]
    found = train_state.inference_variables(last)
    source = last.ema if decay else {"params": last.params, "batch_stats": last.batch_stats}
    assert float(found["params"]["w"]) == float(source["params"]["w"])
    assert float(found["batch_stats"]["seen"]) == float(source["batch_stats"]["seen"])
    np.testing.assert_array_equal(found["params"]["encoder"]["v"], np.arange(3))
    assert set(found) == {"params", "batch_stats"}
    assert (float(found["params"]["w"]) == 3.0) == (decay == 0)


def test_state_with_averages_can_be_donated():
    """A donated state must not contain the same buffer twice."""
    state = train_state.create(variables(), optax.adam(0.1), ["encoder"], average=True)
    new_state = jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)(state)
    assert int(new_state.step) == 1
    assert float(new_state.ema["params"]["w"]) == float(new_state.params["w"]) == 1.0
