"""Schedules against their formulas, optimisers against manually computed steps."""

import math

import jax
import jax.numpy as jnp
import pytest

from biclip_jax.training import optim

SCHEDULE = {"final_learning_rate": 0.0, "warmup_steps": 0, "lr_update": "step"}
ADAMW = {"name": "adamw", "weight_decay": 0.01, "clip_norm": 0.0, "encoder_learning_rate": 0.0}


@pytest.mark.parametrize("step", [0, 1, 37, 99, 100])
def test_published_schedule_is_one_cosine_to_zero(step):
    schedule = optim.make_schedule({**SCHEDULE, "learning_rate": 1e-4}, 100)
    expected = 0.5e-4 * (1 + math.cos(math.pi * step / 100))
    assert float(schedule(step)) == pytest.approx(expected, abs=1e-10)


def test_linear_warmup_is_followed_by_the_cosine():
    schedule = optim.make_schedule({**SCHEDULE, "learning_rate": 1.0, "warmup_steps": 10}, 110)
    assert [float(schedule(s)) for s in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    assert float(schedule(60)) == pytest.approx(0.5)
    assert float(schedule(110)) == pytest.approx(0, abs=1e-7)


def test_warmup_is_limited_to_a_quarter_of_the_run():
    schedule = optim.make_schedule({**SCHEDULE, "learning_rate": 1.0, "warmup_steps": 100}, 40)
    assert [float(schedule(s)) for s in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    assert float(schedule(25)) == pytest.approx(0.5)


@pytest.mark.parametrize("epoch", [0, 1, 37, 99])
def test_medclipseg_rate_is_updated_once_per_epoch(epoch):
    """lr(e) = 1e-4 + 1e-4 (1 + cos(pi e / E)), in every step of epoch e."""
    fields = {**SCHEDULE, "learning_rate": 3e-4, "final_learning_rate": 1e-4}
    schedule = optim.make_schedule({**fields, "lr_update": "epoch"}, 700, steps_per_epoch=7)
    expected = 1e-4 + 1e-4 * (1 + math.cos(math.pi * epoch / 100))
    for step in range(7 * epoch, 7 * epoch + 7):
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)
    per_step = optim.make_schedule(fields, 700, steps_per_epoch=7)
    assert float(per_step(7 * epoch)) == pytest.approx(expected, rel=1e-5)
    assert float(per_step(7 * epoch + 6)) < expected * (1 - 1e-6)
    assert float(per_step(700)) == pytest.approx(1e-4, rel=1e-5)


def test_first_adamw_step_is_the_sign_of_the_gradient_plus_decay():
    optimizer = optim.make_optimizer(ADAMW, lambda step: 0.1)
    params = {"w": jnp.array([2.0, -3.0])}
    state = optimizer.init(params)
    updates, _ = optimizer.update({"w": jnp.array([0.3, -0.2])}, state, params)
    expected = [-0.1 * (1 + 0.01 * 2), -0.1 * (-1 - 0.01 * 3)]
    assert updates["w"].tolist() == pytest.approx(expected, rel=1e-4)


def test_adamw_without_decay_is_adam():
    """MedCLIPSeg's optimiser: m / sqrt(v), computed for two steps."""
    optimizer = optim.make_optimizer({**ADAMW, "weight_decay": 0.0}, lambda step: 3e-4)
    params, first, second = jnp.array([2.0]), 0.3, -0.2
    updates, state = optimizer.update(jnp.array([first]), optimizer.init(params), params)
    assert float(updates[0]) == pytest.approx(-3e-4, rel=1e-4)
    updates, _ = optimizer.update(jnp.array([second]), state, params)
    mean = (0.09 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    assert float(updates[0]) == pytest.approx(-3e-4 * mean / math.sqrt(square), rel=1e-4)


def test_clipping_rescales_to_the_global_norm():
    optimizer = optim.make_optimizer({**ADAMW, "name": "sgd", "clip_norm": 1.0}, lambda step: 1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert float(updates["a"][0]) == pytest.approx(-0.6)
    assert float(updates["b"][0]) == pytest.approx(-0.8)


def nested():
    """Returns parameters with encoders as in the models, and a part with a similar name."""
    leaf = jnp.array([1.0])
    return {
        "image_encoder": {"pretrained": {"blocks_0": {"kernel": leaf}}},
        "text_encoder": {"pretrained": {"words": leaf}},
        "unet": {"encoders": leaf, "head": leaf},
    }


def test_encoder_labels_select_pretrained_encoders():
    assert optim.encoder_labels(nested()) == {
        "image_encoder": {"pretrained": {"blocks_0": {"kernel": "pretrained"}}},
        "text_encoder": {"pretrained": {"words": "pretrained"}},
        "unet": {"encoders": "rest", "head": "rest"},
    }


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_encoders_use_the_scaled_schedule(name):
    config = {**ADAMW, "name": name, "learning_rate": 0.1, "encoder_learning_rate": 0.001}
    schedule = optim.make_schedule({**SCHEDULE, "learning_rate": 0.1, "warmup_steps": 2}, 10)
    optimizer = optim.make_optimizer(config, schedule)
    params = nested()
    state = optimizer.init(params)
    gradient = jax.tree.map(lambda x: 0.5 * x, params)
    for step in range(4):
        updates, state = optimizer.update(gradient, state, params)
        rate = float(schedule(step))
        # With a constant gradient the AdamW update is its sign plus the decay.
        expected = -rate * (0.5 if name == "sgd" else 1.01)
        encoder_updates = (
            updates["image_encoder"]["pretrained"]["blocks_0"]["kernel"],
            updates["text_encoder"]["pretrained"]["words"],
        )
        assert float(updates["unet"]["head"][0]) == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert float(updates["unet"]["encoders"][0]) == pytest.approx(expected, rel=1e-3, abs=1e-9)
        for update in encoder_updates:
            assert float(update[0]) == pytest.approx(expected / 100, rel=1e-3, abs=1e-11)


def test_global_norm_includes_encoders_and_rest():
    config = {**ADAMW, "name": "sgd", "learning_rate": 1.0, "encoder_learning_rate": 0.1}
    optimizer = optim.make_optimizer({**config, "clip_norm": 1.0}, lambda step: 1.0)
    params = {"pretrained": jnp.zeros(1), "rest": jnp.zeros(1)}
    gradient = {"pretrained": jnp.array([3.0]), "rest": jnp.array([4.0])}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert float(updates["pretrained"][0]) == pytest.approx(-0.06)
    assert float(updates["rest"][0]) == pytest.approx(-0.8)
