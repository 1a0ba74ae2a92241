"""The views of the BiCLIP objective: photometric augmentation, and one view per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.models.biclip import Fused, View
from biclip_jax.training import views
from biclip_jax.training.objectives import biclip as objective
from tests.training.scalar_model import (
    NUM,
    PARTS,
    Plain,
    names_of,
    plain_batch,
    plain_state,
    recipe,
    strong_keys,
    values_of,
)

LABELLED = np.arange(NUM) < NUM // 2


@pytest.mark.parametrize("geometry_first", [True, False])
def test_photometric_augmentation_is_applied_with_the_geometry(geometry_first):
    settings = recipe(geometry_first=geometry_first, photometric=views.Photometric(0.2, 0.3))
    keys = jax.random.split(jax.random.key(3), NUM)
    original = objective.make_example(
        plain_batch(), keys, keys, settings._replace(photometric=views.Photometric())
    )
    expected = views.adjust_photometric(keys, original.image, settings.photometric)
    assert (expected != original.image).any()
    example = objective.make_example(plain_batch(), keys, keys, settings)
    np.testing.assert_array_equal(example.image, expected if geometry_first else original.image)
    weak, _ = objective.weak_view(example, Fused(None, None, None, None), keys, settings)
    np.testing.assert_allclose(weak.image, expected, atol=1e-6)


def test_losses_with_one_view_equal_those_of_the_selected_view():
    both_views = values_of(recipe(PARTS))
    weak = values_of(recipe(PARTS, segment_strong=False))
    one_view = values_of(recipe(PARTS, segment_strong=False, one_view=True))
    np.testing.assert_allclose(one_view["loss_seg"], weak["loss_seg"], rtol=1e-5, atol=1e-6)
    # L_IAC is averaged over the half of the rows with the strong view.
    weight = np.where(LABELLED, 0, 2)
    expected = weight * both_views["loss_iac"]
    np.testing.assert_allclose(one_view["loss_iac"], expected, rtol=1e-4, atol=1e-7)
    for name in ("loss_pseudo_labels", "loss_mean_teacher", "loss_gen", "loss_cycle"):
        np.testing.assert_allclose(one_view[name], both_views[name], rtol=1e-5, err_msg=name)


def test_labelled_rows_use_the_weak_view_and_unlabelled_rows_the_strong_view():
    pair = [(View(jnp.full((NUM, 1), x), None, jnp.full((NUM, 2), x)), x) for x in (3.0, 4.0)]
    pair = [(view, jnp.full((NUM, 1), mask)) for view, mask in pair]
    view, mask = objective.select_view(*pair, jnp.asarray(LABELLED, jnp.float32))
    expected = np.where(LABELLED, 3.0, 4.0)
    for found in (view.image[:, 0], view.text[:, 1], mask[:, 0]):
        np.testing.assert_array_equal(found, expected)
    assert view.pseudo_image is None


@pytest.mark.parametrize(
    ("changes", "num_passes"),
    [
        ({}, 1),
        ({"strong_statistics": False}, 2),
        ({"weights": {"iac": 0.1}}, 2),
        ({"weights": PARTS, "ema_teacher": True}, 2),
    ],
)
def test_one_view_needs_one_pass_and_a_teacher_pass_only_if_used(changes, num_passes):
    model = Plain()
    names_of(recipe(one_view=True, **changes), model=model)
    assert model.num_passes == num_passes


@pytest.mark.parametrize("ema_teacher", [False, True])
def test_teacher_pass_with_one_view_has_no_gradient(ema_teacher):
    """Teacher and running statistics come from the weak view, with either set of parameters."""
    state = plain_state()
    state = state.replace(ema={**state.ema, "params": plain_state(seed=1).params})
    settings = recipe(one_view=True, ema_teacher=ema_teacher)
    keys = jax.random.split(jax.random.key(0), NUM)
    example = objective.make_example(plain_batch(), keys, keys, settings)

    def run_teacher(params):
        variables = {"params": params, "batch_stats": {"seen": jnp.float32(2)}}
        out, stats = objective.teacher_pass(Plain(), state, variables, example, keys, settings)
        return out.logits.sum() + stats["seen"], (out.logits, stats)

    grads, (logits, stats) = jax.grad(run_teacher, has_aux=True)(state.params)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    assert float(stats["seen"]) == pytest.approx(20 + float(example.image.mean()))
    other = run_teacher(plain_state(seed=1).params)[1][0]
    assert np.allclose(logits, other) == ema_teacher


@pytest.mark.parametrize("ema_teacher", [False, True])
def test_teacher_sees_prompts_that_are_dropped_for_the_student(ema_teacher):
    state, settings = plain_state(), recipe(one_view=True, ema_teacher=ema_teacher)
    keys = jax.random.split(jax.random.key(0), NUM)
    variables = {"params": state.params, "batch_stats": {"seen": jnp.float32(0)}}
    texts, logits = [], []
    for dropout in (0.0, 1.0):
        dropping = settings._replace(text_dropout=dropout)
        example = objective.make_example(plain_batch(), keys, keys, dropping)
        fused = Plain().apply(variables, example.image, **example.text, method=Plain.fuse)
        weak, _ = objective.weak_view(example, fused, keys, dropping)
        out, _ = objective.teacher_pass(Plain(), state, variables, example, keys, dropping)
        texts.append(weak.text)
        logits.append(out.logits)
    assert not np.allclose(*texts)
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("strong_statistics", [True, False])
def test_running_statistics_are_those_of_the_selected_or_the_weak_view(strong_statistics):
    settings = recipe(
        one_view=True,
        strong_statistics=strong_statistics,
        strong=views.Strong(photometric=False, noise=0.5),
    )
    state, batch = plain_state(), plain_batch(NUM // 2)
    keys = jax.random.split(jax.random.key(3), NUM)
    _, (stats, _) = objective.objective(
        state.params, state, batch, keys, model=Plain(), recipe=settings
    )
    weak = np.asarray(batch["image"], np.float32).repeat(3, -1) / 255
    strong = jax.vmap(views.strong_photometric, (0, 0, None))(strong_keys(), weak, settings.strong)
    selected = np.where(LABELLED[:, None, None, None], weak, strong)
    assert np.abs(selected.mean() - weak.mean()) > 1e-3
    expected = selected if strong_statistics else weak
    np.testing.assert_allclose(stats["seen"], expected.mean(), rtol=1e-5)


def test_one_view_requires_unlabelled_images_and_a_strong_learner():
    field = "--config.loss.views=one"
    config = config_lib.load_config("default:smoke,full", [field]).to_dict()
    settings = objective.make_recipe(config, labelled=0.5)
    assert settings.one_view and not settings.segment_strong and settings.needs_weak_pass
    with pytest.raises(ValueError, match=r"set data\.unlabelled, or loss\.views to both"):
        objective.make_recipe(config)
    config["loss"]["iac_learner"] = "both"
    with pytest.raises(ValueError, match=r"set loss\.iac_learner to strong"):
        objective.make_recipe(config, labelled=0.5)
