"""What the objective's views are: the light of both, and one of them for each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.models.biclip import Fused, View
from biclip_jax.training import views
from biclip_jax.training.objectives import biclip as objective
from tests.training.plain import (
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


@pytest.mark.parametrize("first", [True, False])
def test_the_light_changes_before_the_fusion_where_geometry_does_and_after_it_otherwise(first):
    lit = recipe(geometry_first=first, photometric=views.Photometric(0.2, 0.3))
    keys = jax.random.split(jax.random.key(3), NUM)
    before = objective.make_example(
        plain_batch(), keys, keys, lit._replace(photometric=views.Photometric())
    )
    expected = views.adjust_photometric(keys, before.image, lit.photometric)
    assert (expected != before.image).any()
    example = objective.make_example(plain_batch(), keys, keys, lit)
    np.testing.assert_array_equal(example.image, expected if first else before.image)
    weak, _ = objective.weak_view(example, Fused(None, None, None, None), keys, lit)
    np.testing.assert_allclose(weak.image, expected, atol=1e-6)


def test_of_one_view_each_row_has_what_that_view_has_with_both():
    both = values_of(recipe(PARTS))
    weak = values_of(recipe(PARTS, segment_strong=False))
    one = values_of(recipe(PARTS, segment_strong=False, one_view=True))
    np.testing.assert_allclose(one["loss_seg"], weak["loss_seg"], rtol=1e-5, atol=1e-6)
    # The consistency is meaned over the half that shows the strong view.
    share = np.where(LABELLED, 0, 2)
    np.testing.assert_allclose(one["loss_iac"], share * both["loss_iac"], rtol=1e-4, atol=1e-7)
    for name in ("loss_pseudo_labels", "loss_mean_teacher", "loss_gen", "loss_cycle"):
        np.testing.assert_allclose(one[name], both[name], rtol=1e-5, err_msg=name)


def test_labelled_rows_show_the_weak_view_and_unlabelled_ones_the_strong_view():
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
def test_one_view_is_passed_once_and_the_teacher_where_something_is_asked_of_it(
    changes, num_passes
):
    model = Plain()
    names_of(recipe(one_view=True, **changes), model=model)
    assert model.num_passes == num_passes


@pytest.mark.parametrize("ema_teacher", [False, True])
def test_the_teacher_of_one_view_has_no_gradient(ema_teacher):
    """Teacher and running statistics are those of the weak view, by either parameters."""
    state = plain_state()
    state = state.replace(ema={**state.ema, "params": plain_state(seed=1).params})
    made = recipe(one_view=True, ema_teacher=ema_teacher)
    keys = jax.random.split(jax.random.key(0), NUM)
    example = objective.make_example(plain_batch(), keys, keys, made)

    def taught(params):
        variables = {"params": params, "batch_stats": {"seen": jnp.float32(2)}}
        out, stats = objective.teacher_pass(Plain(), state, variables, example, keys, made)
        return out.logits.sum() + stats["seen"], (out.logits, stats)

    grads, (logits, stats) = jax.grad(taught, has_aux=True)(state.params)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    assert float(stats["seen"]) == pytest.approx(20 + float(example.image.mean()))
    other = taught(plain_state(seed=1).params)[1][0]
    assert np.allclose(logits, other) == ema_teacher


@pytest.mark.parametrize("ema_teacher", [False, True])
def test_a_teacher_reads_sentences_that_the_student_has_lost(ema_teacher):
    state, made = plain_state(), recipe(one_view=True, ema_teacher=ema_teacher)
    keys = jax.random.split(jax.random.key(0), NUM)
    variables = {"params": state.params, "batch_stats": {"seen": jnp.float32(0)}}
    texts, answers = [], []
    for dropout in (0.0, 1.0):
        losing = made._replace(text_dropout=dropout)
        example = objective.make_example(plain_batch(), keys, keys, losing)
        fused = Plain().apply(variables, example.image, **example.text, method=Plain.fuse)
        weak, _ = objective.weak_view(example, fused, keys, losing)
        out, _ = objective.teacher_pass(Plain(), state, variables, example, keys, losing)
        texts.append(weak.text)
        answers.append(out.logits)
    assert not np.allclose(*texts)
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("strong_statistics", [True, False])
def test_running_statistics_are_of_the_shown_rows_or_of_the_weak_view(strong_statistics):
    made = recipe(
        one_view=True,
        strong_statistics=strong_statistics,
        strong=views.Strong(photometric=False, noise=0.5),
    )
    state, batch = plain_state(), plain_batch(NUM // 2)
    keys = jax.random.split(jax.random.key(3), NUM)
    _, (stats, _) = objective.objective(
        state.params, state, batch, keys, model=Plain(), recipe=made
    )
    weak = np.asarray(batch["image"], np.float32).repeat(3, -1) / 255
    strong = jax.vmap(views.strong_photometric, (0, 0, None))(strong_keys(), weak, made.strong)
    shown = np.where(LABELLED[:, None, None, None], weak, strong)
    assert np.abs(shown.mean() - weak.mean()) > 1e-3
    expected = shown if strong_statistics else weak
    np.testing.assert_allclose(stats["seen"], expected.mean(), rtol=1e-5)


def test_one_view_wants_unlabelled_pictures_and_the_strong_one_to_learn():
    field = "--config.loss.views=one"
    config = config_lib.load_config("default:smoke,full", [field]).to_dict()
    made = objective.make_recipe(config, labelled=0.5)
    assert made.one_view and not made.segment_strong and made.needs_weak_pass
    with pytest.raises(ValueError, match=r"set data\.unlabelled, or loss\.views to both"):
        objective.make_recipe(config)
    config["loss"]["iac_learner"] = "both"
    with pytest.raises(ValueError, match=r"set loss\.iac_learner to strong"):
        objective.make_recipe(config, labelled=0.5)
