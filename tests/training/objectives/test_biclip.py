"""The objective: its parts, who learns from what, which view sees which sentence.

Most of it over a model of a few numbers, whose answers are worked out by hand.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.distance import cosine
from scipy.special import expit

from biclip_jax.core import config as config_lib
from biclip_jax.models.biclip import Fused, Segmented, View
from biclip_jax.training import losses, views
from biclip_jax.training import state as train_state
from biclip_jax.training.objectives import biclip as objective
from tests import tiny
from tests.training.plain import (
    NUM,
    PARTS,
    Plain,
    boxes,
    names_of,
    plain_batch,
    plain_state,
    recipe,
    run,
)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ramp_steps", "ramp"), [(0, 0, 1), (1, 4, 0.25), (9, 4, 1)])
def test_the_parts_add_up_with_their_weights(step, ramp_steps, ramp):
    loss, values, _ = run(recipe(PARTS, ramp_steps=ramp_steps), plain_state(step))
    assert set(values) == {"loss", "loss_seg", *(f"loss_{name}" for name in PARTS)}
    weights = {
        name: w * (ramp if name in ("pseudo_labels", "mean_teacher") else 1)
        for name, w in PARTS.items()
    }
    expected = values["loss_seg"] + sum(w * values[f"loss_{name}"] for name, w in weights.items())
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    assert loss == pytest.approx(values["loss"].mean(), rel=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_without_a_weight_is_absent(name):
    whole = {"loss", "loss_seg", *(f"loss_{part}" for part in PARTS)}
    assert names_of(recipe({**PARTS, name: 0.0})) == whole - {f"loss_{name}"}


def test_without_use_for_it_there_is_no_strong_view():
    for changes, num_passes in [
        ({}, 2),
        ({"segment_strong": False}, 1),
        ({"segment_strong": False, "weights": {"iac": 0.1}}, 2),
        ({"segment_strong": False, "weights": {"gen": 0.1, "cycle": 0.1}}, 1),
        ({"segment_strong": False, "weights": {"mean_teacher": 0.1}}, 2),
    ]:
        model = Plain()
        names_of(recipe(**changes), model=model)
        assert model.num_passes == num_passes, changes


@pytest.mark.parametrize("strong_statistics", [True, False])
def test_running_statistics_take_the_weak_view_first_and_the_strong_one_where_asked(
    strong_statistics,
):
    state, bound = plain_state(), recipe(strong_statistics=strong_statistics)
    weak, strong = (
        View(jnp.full((1, 2, 2, 3), x), jnp.zeros(1), jnp.zeros((1, 1))) for x in (3, 4)
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    out, after = objective.forward_passes(Plain(), variables, [weak, strong], bound)
    assert len(out) == 2
    assert float(after["seen"]) == (34 if strong_statistics else 3)


def by_hand(params, batch, box):
    """mean over the labelled rows of L_seg on both views plus 0.3 L_gen, with no help of ours."""
    half = NUM // 2
    image = jnp.repeat(batch["image"][:half] / 255, 3, -1)
    mask, box = batch["mask"][:half].astype(jnp.float32), box[:half]
    text = params["text"] * batch["text_features"][:half]
    area = box.mean((1, 2, 3))[:, None]
    pseudo = jax.nn.sigmoid(params["pseudo"] * text.sum(-1))[:, None, None, None]
    pseudo = jnp.broadcast_to(pseudo, image.shape)
    loss = 0.3 * jnp.abs(pseudo - image * mask).mean()
    strong = [jnp.where(box, x[::-1], x) for x in (image, pseudo, mask)]
    mixed = (1 - area) * text + area * text[::-1]
    for x, p, y, t in [(image, pseudo, mask, text), (*strong, mixed)]:
        z = params["image"] * (x + p).mean(-1, keepdims=True)
        probs = jax.nn.sigmoid(z + params["level"] * t.sum(-1)[:, None, None, None])
        sums = (probs * y).sum((1, 2, 3)), (probs + y).sum((1, 2, 3))
        dice = 1 - (2 * sums[0] + 1e-5) / (sums[1] + 1e-5)
        entropy = -(y * jnp.log(probs) + (1 - y) * jnp.log(1 - probs)).mean((1, 2, 3))
        loss = loss + (dice + entropy).mean() / 2
    return loss


def test_masks_teach_the_labelled_rows_alone_and_at_full_weight():
    state, batch = plain_state(), plain_batch(NUM // 2)
    loss, values, grads = run(recipe({"gen": 0.3}), state, batch)
    expected, wanted = jax.value_and_grad(by_hand)(state.params, batch, boxes().box)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for name, value in grads.items():
        assert float(value) == pytest.approx(float(wanted[name]), rel=1e-4, abs=1e-6), name
    for name in ("loss_seg", "loss_gen"):
        assert (values[name][: NUM // 2] > 0).all()
        assert not values[name][NUM // 2 :].any()


def test_masks_of_unlabelled_rows_change_nothing():
    batch = plain_batch(NUM // 2)
    unknown = np.arange(NUM)[:, None, None, None] >= NUM // 2
    filled = {**batch, "mask": jnp.where(unknown, 1, batch["mask"]).astype(jnp.uint8)}
    first, other = run(recipe(PARTS), batch=batch), run(recipe(PARTS), batch=filled)
    jax.tree.map(np.testing.assert_array_equal, first, other)


def answers(state, params):
    """Probabilities of the weak view with these parameters, by hand."""
    batch = plain_batch(NUM // 2)
    image = np.repeat(np.asarray(batch["image"], np.float64) / 255, 3, -1)
    p = {name: float(value) for name, value in params.items()}
    text = p["text"] * np.asarray(batch["text_features"], np.float64)
    pseudo = expit(p["pseudo"] * text.sum(-1))[:, None, None, None]
    logits = p["image"] * (image.mean(-1, keepdims=True) + pseudo)
    return expit(logits + p["level"] * text.sum(-1)[:, None, None, None])


@pytest.mark.parametrize("ema_teacher", [False, True])
def test_the_teacher_teaches_the_unlabelled_rows_alone(ema_teacher):
    """Pseudo-labels and squared error, against the averaged or the present model."""
    state, box = plain_state(), np.asarray(boxes().box)
    state = state.replace(ema={**state.ema, "params": plain_state(seed=1).params})
    teacher = state.ema["params"] if ema_teacher else state.params
    made = recipe({"pseudo_labels": 1.0, "mean_teacher": 1.0}, ema_teacher=ema_teacher)
    model = Plain()
    _, values, _ = run(made, state, model=model)
    target = answers(state, teacher)
    target = np.where(box, target[[1, 0, 3, 2]], target)
    student = strong_logits(state.params, box)
    expected = 2 * np.square(expit(student) - target).mean((1, 2, 3))
    np.testing.assert_allclose(values["loss_mean_teacher"][2:], expected[2:], rtol=1e-4, atol=1e-6)
    hard = (target >= 0.5).astype(np.float64)
    labels = losses.segmentation_loss(jnp.asarray(student), jnp.asarray(hard))
    np.testing.assert_allclose(values["loss_pseudo_labels"][2:], 2 * labels[2:], rtol=1e-4)
    for name in ("loss_pseudo_labels", "loss_mean_teacher"):
        assert not values[name][:2].any()
    assert model.num_passes == (3 if ema_teacher else 2)


def strong_logits(params, box):
    """Logits of the strong view, by hand."""
    batch = plain_batch(NUM // 2)
    p = {name: float(value) for name, value in params.items()}
    image = np.asarray(batch["image"], np.float64) / 255
    text = p["text"] * np.asarray(batch["text_features"], np.float64)
    pseudo = np.broadcast_to(expit(p["pseudo"] * text.sum(-1))[:, None, None, None], image.shape)
    area, order = box.mean((1, 2, 3))[:, None], [1, 0, 3, 2]
    both = np.where(box, (image + pseudo)[order], image + pseudo)
    text = (1 - area) * text + area * text[order]
    return p["image"] * both + p["level"] * text.sum(-1)[:, None, None, None]


def test_given_masks_teach_the_unlabelled_rows_in_the_teacher_s_place():
    """They are moved like the strong view, and nobody passes the weak view to make them."""
    state, batch, box = plain_state(), plain_batch(NUM), np.asarray(boxes().box)
    batch = {**batch, "labelled": jnp.arange(NUM) < NUM // 2}
    made = recipe({"pseudo_labels": 1.0}, ema_teacher=True, has_offline_labels=True)
    model = Plain()
    _, values, _ = run(made, state, batch, model)
    mask = np.asarray(batch["mask"], np.float32)
    mask = np.where(box, mask[[1, 0, 3, 2]], mask)
    assert 0 < mask[2:].mean() < 1
    labels = losses.segmentation_loss(
        jnp.asarray(strong_logits(state.params, box)), jnp.asarray(mask)
    )
    np.testing.assert_allclose(values["loss_pseudo_labels"][2:], 2 * labels[2:], rtol=1e-4)
    assert not values["loss_pseudo_labels"][:2].any()
    assert model.num_passes == 2


def test_no_gradient_enters_the_teacher():
    """The gradient is that with the teacher's masks as constants: here by finite differences."""
    state, box = plain_state(), np.asarray(boxes().box)
    _, _, grads = run(recipe({"mean_teacher": 1.0}), state)
    _, _, without = run(recipe({}, segment_strong=True), state)
    target = answers(state, state.params)
    target = np.where(box, target[[1, 0, 3, 2]], target)

    def loss(name, step):
        params = {**state.params, name: state.params[name] + step}
        return np.square(expit(strong_logits(params, box)) - target)[2:].mean()

    for name in ("text", "image", "level", "pseudo"):
        slope = (loss(name, 1e-3) - loss(name, -1e-3)) / 2e-3
        found = float(grads[name] - without[name])
        assert found == pytest.approx(slope, rel=1e-2, abs=1e-5), name


def test_the_consistency_target_is_mixed_by_the_area_of_the_box():
    rng = np.random.default_rng(0)
    weak, strong = jnp.asarray(rng.standard_normal((2, NUM, 6)), jnp.float32)
    deformation = boxes()
    area = np.asarray(deformation.box).mean((1, 2, 3))
    assert (area > 0).all()
    mixed = [(1 - area[i]) * weak[i] + area[i] * weak[i ^ 1] for i in range(NUM)]
    expected = [cosine(mixed[i], strong[i]) for i in range(NUM)]

    def found(weak, strong, learner="strong"):
        pair = [Segmented(None, {"decoder_0": jnp.asarray(x)}) for x in (weak, strong)]
        return objective.iac_loss(*pair, deformation, recipe(iac_learner=learner))

    np.testing.assert_allclose(found(weak, strong), expected, rtol=1e-5)
    for learner, learns in [("strong", (0, 1)), ("weak", (1, 0)), ("both", (1, 1))]:
        grads = jax.grad(lambda *x, to=learner: found(*x, to).sum(), argnums=(0, 1))(weak, strong)
        assert tuple(int(np.any(g)) for g in grads) == learns


def test_blocks_with_a_consistency_head_count_alike():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 2, NUM, 6)).astype(np.float32)
    still = views.Deformation(None, None)
    pair = [Segmented(None, {"decoder_0": a, "decoder_1": b}) for a, b in jnp.asarray(rows)]
    each = [[cosine(w, s) for w, s in zip(*rows[:, block], strict=True)] for block in (0, 1)]
    expected = np.mean(each, axis=0)
    np.testing.assert_allclose(objective.iac_loss(*pair, still, recipe()), expected, rtol=1e-4)


@pytest.mark.parametrize("geometry_first", [False, True])
def test_losing_every_sentence_is_having_none(geometry_first):
    batch = plain_batch(NUM // 2)
    none = jnp.zeros(NUM, bool)
    silent = {**batch, "has_text": none, "swapped_has_text": none}
    made = recipe(PARTS, geometry_first=geometry_first)
    lost, silent = run(made._replace(text_dropout=1.0), batch=batch), run(made, batch=silent)
    jax.tree.map(np.testing.assert_array_equal, lost, silent)
    assert lost[0] != run(made, batch=batch)[0]


def many(num, **changes):
    """A batch of tiny pictures; the mirrored sentence is marked by its sign."""
    image = np.random.default_rng(0).integers(0, 256, (num, 4, 4, 1)).astype(np.uint8)
    features = np.arange(1, num + 1, dtype=np.float32)[:, None]
    batch = {"image": image, "mask": (image > 127).astype(np.uint8), "has_text": np.ones(num, bool)}
    batch |= {"text_features": features, "swapped_text_features": -features}
    batch |= {"swapped_has_text": np.ones(num, bool), **changes}
    return {name: jnp.asarray(value) for name, value in batch.items()}


def read(batch, made):
    keys = jax.random.split(jax.random.key(0), len(batch["image"]))
    geometry_keys, _ = jax.vmap(jax.random.split, out_axes=1)(keys)
    return objective.make_example(batch, keys, geometry_keys, made)


def test_sentences_are_lost_with_their_probability_and_never_found():
    some = np.arange(1000) % 4 > 0
    made = recipe(text_dropout=0.3, labelled=1.0)
    kept = np.asarray(read(many(1000, has_text=some), made).text["has_text"])
    assert not kept[~some].any()
    assert kept[some].mean() == pytest.approx(0.7, abs=0.05)


def test_levels_lose_the_sentence_with_their_probability():
    text = jnp.arange(1, 1001, dtype=jnp.float32)[:, None] * jnp.ones(3)
    keys = jax.random.split(jax.random.key(0), 1000)
    heard = objective.drop_level_text(text, keys, 0.3)
    kept = np.asarray(heard).any(-1)
    assert kept.mean() == pytest.approx(0.7, abs=0.05)
    np.testing.assert_array_equal(heard, np.where(kept[:, None], text, 0))


def test_silent_levels_learn_nothing_and_the_pseudo_image_goes_on():
    made = recipe({"gen": 0.0})
    encoded_text, silent = run(made)[2], run(made._replace(level_text_dropout=1.0))[2]
    assert encoded_text["level"] != 0 and silent["level"] == 0
    assert encoded_text["pseudo"] != 0 and silent["pseudo"] != 0


def test_a_flip_swaps_the_sentence_exactly_where_it_happens():
    batch = many(32, swapped_has_text=np.zeros(32, bool))
    geometry = views.Geometry(horizontal_flip=0.5, vertical_flip=0.0, affine=0.0)
    example = read(batch, recipe(geometry=geometry, geometry_first=True, labelled=1.0))
    pixels = np.asarray(batch["image"]) / np.float32(255)
    flipped = [
        np.allclose(found[..., :1], was[:, ::-1])
        for found, was in zip(example.image, pixels, strict=True)
    ]
    assert 0 < sum(flipped) < 32
    signs = np.where(flipped, -1, 1)[:, None]
    np.testing.assert_array_equal(example.text["text_features"], signs * batch["text_features"])
    np.testing.assert_array_equal(example.text["has_text"], ~np.array(flipped))
    masks = [m[:, ::-1] if f else m for f, m in zip(flipped, batch["mask"], strict=True)]
    np.testing.assert_array_equal(example.mask, masks)
    assert example.labelled.tolist() == [1.0] * 32


def test_published_geometry_comes_after_the_sentence():
    batch = many(8)
    geometry = views.Geometry(horizontal_flip=1.0, vertical_flip=0.0, affine=0.0)
    made = recipe(geometry=geometry, geometry_first=False, labelled=1.0)
    example = read(batch, made)
    np.testing.assert_array_equal(example.text["text_features"], batch["text_features"])
    np.testing.assert_allclose(example.image[..., :1], np.asarray(batch["image"]) / 255, rtol=1e-6)
    pseudo = jnp.asarray(np.random.default_rng(1).random((8, 4, 4, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    view, mask = objective.weak_view(example, Fused(None, None, pseudo, None), keys, made)
    np.testing.assert_array_equal(view.image, example.image[:, :, ::-1])
    np.testing.assert_array_equal(view.pseudo_image, pseudo[:, :, ::-1])
    np.testing.assert_array_equal(mask, example.mask[:, :, ::-1])


def test_a_recipe_is_what_the_configuration_says():
    published, full = tiny.recipe("published"), tiny.recipe("full")
    off = {"pseudo_labels": 0.0, "mean_teacher": 0.0}
    assert published == objective.Recipe({**tiny.WEIGHTS, **off}, views.Geometry())
    assert full.weights == published.weights
    assert full.geometry == views.Geometry(0.5, 0.0, 1.0, 10.0, 0.0, 1.0, 1.0)
    assert full.strong == views.Strong(False, 0.1, 0.0, 0.3, 0.01, 0.5)
    assert (full.geometry_first, full.segment_strong, full.text_dropout) == (True, True, 0.1)
    assert (full.iac_learner, full.cycle_distance, full.labelled) == ("strong", "l2", 1.0)
    assert (published.level_text_dropout, full.level_text_dropout) == (0.0, 0.5)
    semi = tiny.recipe("semi", 0.25)
    assert (semi.labelled, semi.ema_teacher, semi.ramp_steps) == (0.25, True, 200)
    assert semi.learns_from_teacher and not full.learns_from_teacher


def test_losses_of_unlabelled_pictures_need_some():
    with pytest.raises(ValueError, match=r"set data\.unlabelled, or both to 0"):
        tiny.recipe("semi", 1.0)


@pytest.mark.parametrize(
    ("method", "field", "value", "said"),
    [
        ("full", "model.pseudo_image", False, "loss.gen and loss.cycle look at the pseudo-image"),
        ("published", "model.bmf.levels", "all", "set views.geometry_first"),
        ("full", "model.bmf.levels", "", "leaves the sentence to the pseudo-image"),
        ("full", "model.bmf.text_to_vision", False, "leaves the sentence to the pseudo-image"),
        (
            "no_generator",
            "model.bmf.level_text_dropout",
            0.5,
            "leaves the sentence to the pseudo-image",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(method, field, value, said):
    config = config_lib.load_config(
        f"default:smoke,{method}", [f"--config.{field}={value}"]
    ).to_dict()
    with pytest.raises(ValueError, match=said):
        objective.make_recipe(config)
    config["views"]["horizontal_flip"] = config["loss"]["gen"] = config["loss"]["cycle"] = 0.0
    config["model"]["bmf"]["level_text_dropout"] = 0.0
    assert objective.make_recipe(config).weights["gen"] == 0


def num_convolutions(method):
    model = tiny.model(method=method)
    ids = jnp.zeros((1, tiny.MAX_LENGTH), jnp.int32)
    image = jnp.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, ids, ids == 0)
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape), {"batch_stats": {}, **shapes})
    state = train_state.create(variables, optax.sgd(1.0))
    bound = partial(objective.objective, model=model, recipe=tiny.recipe(method))
    keys = jax.random.split(jax.random.key(0), 2)
    jaxpr = jax.make_jaxpr(bound)(state.params, state, tiny.batch(2), keys)
    return str(jaxpr).count("conv_general_dilated[")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # U-Net of 3 levels: 5 blocks of 2 (its head is a product); generator 1, encoders 2 each.
        ("unet", 10),
        ("ef_unet", 10 + 1),
        pytest.param("one_way", 10 + 1, marks=pytest.mark.slow),
        pytest.param("published", 2 * 10 + 1 + 2 + 2, marks=pytest.mark.slow),
        ("full", 2 * 10 + 1 + 2 + 2),
        pytest.param("no_cycle", 2 * 10 + 1 + 2, marks=pytest.mark.slow),
        pytest.param("no_generator", 2 * 10 + 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_off_costs_nothing(method, expected):
    assert num_convolutions(method) == expected
