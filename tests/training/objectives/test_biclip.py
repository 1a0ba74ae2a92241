"""The BiCLIP objective: loss terms, gradients, teachers, views and their prompts.

Most tests use a model with a few scalar parameters, whose results are computed with NumPy.
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
from tests.training.scalar_model import (
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
def test_loss_is_the_weighted_sum_of_its_parts(step, ramp_steps, ramp):
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
def test_part_without_weight_is_absent(name):
    all_names = {"loss", "loss_seg", *(f"loss_{part}" for part in PARTS)}
    assert names_of(recipe({**PARTS, name: 0.0})) == all_names - {f"loss_{name}"}


def test_strong_view_is_computed_only_if_used():
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
def test_running_statistics_see_the_weak_view_and_optionally_the_strong_one(strong_statistics):
    state, settings = plain_state(), recipe(strong_statistics=strong_statistics)
    weak, strong = (
        View(jnp.full((1, 2, 2, 3), x), jnp.zeros(1), jnp.zeros((1, 1))) for x in (3, 4)
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    out, batch_stats = objective.forward_passes(Plain(), variables, [weak, strong], settings)
    assert len(out) == 2
    assert float(batch_stats["seen"]) == (34 if strong_statistics else 3)


def supervised_loss(params, batch, box):
    """Computes L_seg of both views plus 0.3 L_gen, averaged over the labelled rows."""
    num_labelled = NUM // 2
    image = jnp.repeat(batch["image"][:num_labelled] / 255, 3, -1)
    mask, box = batch["mask"][:num_labelled].astype(jnp.float32), box[:num_labelled]
    text = params["text"] * batch["text_features"][:num_labelled]
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


def test_supervised_losses_are_averaged_over_the_labelled_rows():
    state, batch = plain_state(), plain_batch(NUM // 2)
    loss, values, grads = run(recipe({"gen": 0.3}), state, batch)
    expected, expected_grads = jax.value_and_grad(supervised_loss)(state.params, batch, boxes().box)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for name, value in grads.items():
        assert float(value) == pytest.approx(float(expected_grads[name]), rel=1e-4, abs=1e-6), name
    for name in ("loss_seg", "loss_gen"):
        assert (values[name][: NUM // 2] > 0).all()
        assert not values[name][NUM // 2 :].any()


def test_masks_of_unlabelled_rows_have_no_influence():
    batch = plain_batch(NUM // 2)
    is_unlabelled = np.arange(NUM)[:, None, None, None] >= NUM // 2
    filled = {**batch, "mask": jnp.where(is_unlabelled, 1, batch["mask"]).astype(jnp.uint8)}
    first, second = run(recipe(PARTS), batch=batch), run(recipe(PARTS), batch=filled)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def weak_probs(params):
    """Computes the probabilities of the weak view."""
    batch = plain_batch(NUM // 2)
    image = np.repeat(np.asarray(batch["image"], np.float64) / 255, 3, -1)
    p = {name: float(value) for name, value in params.items()}
    text = p["text"] * np.asarray(batch["text_features"], np.float64)
    pseudo = expit(p["pseudo"] * text.sum(-1))[:, None, None, None]
    logits = p["image"] * (image.mean(-1, keepdims=True) + pseudo)
    return expit(logits + p["level"] * text.sum(-1)[:, None, None, None])


@pytest.mark.parametrize("ema_teacher", [False, True])
def test_teacher_losses_apply_to_unlabelled_rows(ema_teacher):
    """Pseudo-labels and squared error, with the averaged or the current model as teacher."""
    state, box = plain_state(), np.asarray(boxes().box)
    state = state.replace(ema={**state.ema, "params": plain_state(seed=1).params})
    teacher = state.ema["params"] if ema_teacher else state.params
    settings = recipe({"pseudo_labels": 1.0, "mean_teacher": 1.0}, ema_teacher=ema_teacher)
    model = Plain()
    _, values, _ = run(settings, state, model=model)
    target = weak_probs(teacher)
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
    """Computes the logits of the strong view."""
    batch = plain_batch(NUM // 2)
    p = {name: float(value) for name, value in params.items()}
    image = np.asarray(batch["image"], np.float64) / 255
    text = p["text"] * np.asarray(batch["text_features"], np.float64)
    pseudo = np.broadcast_to(expit(p["pseudo"] * text.sum(-1))[:, None, None, None], image.shape)
    area, order = box.mean((1, 2, 3))[:, None], [1, 0, 3, 2]
    mixed = np.where(box, (image + pseudo)[order], image + pseudo)
    text = (1 - area) * text + area * text[order]
    return p["image"] * mixed + p["level"] * text.sum(-1)[:, None, None, None]


def test_offline_pseudo_labels_replace_the_teacher():
    """They are deformed like the strong view, and need no teacher pass."""
    state, batch, box = plain_state(), plain_batch(NUM), np.asarray(boxes().box)
    batch = {**batch, "labelled": jnp.arange(NUM) < NUM // 2}
    settings = recipe({"pseudo_labels": 1.0}, ema_teacher=True, has_offline_labels=True)
    model = Plain()
    _, values, _ = run(settings, state, batch, model)
    mask = np.asarray(batch["mask"], np.float32)
    mask = np.where(box, mask[[1, 0, 3, 2]], mask)
    assert 0 < mask[2:].mean() < 1
    labels = losses.segmentation_loss(
        jnp.asarray(strong_logits(state.params, box)), jnp.asarray(mask)
    )
    np.testing.assert_allclose(values["loss_pseudo_labels"][2:], 2 * labels[2:], rtol=1e-4)
    assert not values["loss_pseudo_labels"][:2].any()
    assert model.num_passes == 2


def test_teacher_has_no_gradient():
    """Compares with finite differences for a constant teacher."""
    state, box = plain_state(), np.asarray(boxes().box)
    _, _, grads = run(recipe({"mean_teacher": 1.0}), state)
    _, _, supervised_grads = run(recipe({}, segment_strong=True), state)
    target = weak_probs(state.params)
    target = np.where(box, target[[1, 0, 3, 2]], target)

    def loss(name, step):
        params = {**state.params, name: state.params[name] + step}
        return np.square(expit(strong_logits(params, box)) - target)[2:].mean()

    for name in ("text", "image", "level", "pseudo"):
        slope = (loss(name, 1e-3) - loss(name, -1e-3)) / 2e-3
        found = float(grads[name] - supervised_grads[name])
        assert found == pytest.approx(slope, rel=1e-2, abs=1e-5), name


def test_iac_target_is_mixed_by_the_area_of_the_box():
    rng = np.random.default_rng(0)
    weak, strong = jnp.asarray(rng.standard_normal((2, NUM, 6)), jnp.float32)
    deformation = boxes()
    area = np.asarray(deformation.box).mean((1, 2, 3))
    assert (area > 0).all()
    mixed = [(1 - area[i]) * weak[i] + area[i] * weak[i ^ 1] for i in range(NUM)]
    expected = [cosine(mixed[i], strong[i]) for i in range(NUM)]

    def iac_loss(weak, strong, learner="strong"):
        pair = [Segmented(None, {"decoder_0": jnp.asarray(x)}) for x in (weak, strong)]
        return objective.iac_loss(*pair, deformation, recipe(iac_learner=learner))

    np.testing.assert_allclose(iac_loss(weak, strong), expected, rtol=1e-5)
    for learner, learns in [("strong", (0, 1)), ("weak", (1, 0)), ("both", (1, 1))]:
        grad_fn = jax.grad(lambda *x, to=learner: iac_loss(*x, to).sum(), argnums=(0, 1))
        assert tuple(int(np.any(g)) for g in grad_fn(weak, strong)) == learns


def test_iac_is_averaged_over_the_blocks():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 2, NUM, 6)).astype(np.float32)
    identity = views.Deformation(None, None)
    pair = [Segmented(None, {"decoder_0": a, "decoder_1": b}) for a, b in jnp.asarray(rows)]
    distances = [[cosine(w, s) for w, s in zip(*rows[:, i], strict=True)] for i in (0, 1)]
    expected = np.mean(distances, axis=0)
    np.testing.assert_allclose(objective.iac_loss(*pair, identity, recipe()), expected, rtol=1e-4)


@pytest.mark.parametrize("geometry_first", [False, True])
def test_dropping_all_prompts_equals_empty_prompts(geometry_first):
    batch = plain_batch(NUM // 2)
    none = jnp.zeros(NUM, bool)
    empty_batch = {**batch, "has_text": none, "swapped_has_text": none}
    settings = recipe(PARTS, geometry_first=geometry_first)
    dropped = run(settings._replace(text_dropout=1.0), batch=batch)
    empty = run(settings, batch=empty_batch)
    jax.tree.map(np.testing.assert_array_equal, dropped, empty)
    assert dropped[0] != run(settings, batch=batch)[0]


def tiny_batch(num, **changes):
    """Returns a batch of 4 x 4 images; swapped text features have the opposite sign."""
    image = np.random.default_rng(0).integers(0, 256, (num, 4, 4, 1)).astype(np.uint8)
    features = np.arange(1, num + 1, dtype=np.float32)[:, None]
    batch = {"image": image, "mask": (image > 127).astype(np.uint8), "has_text": np.ones(num, bool)}
    batch |= {"text_features": features, "swapped_text_features": -features}
    batch |= {"swapped_has_text": np.ones(num, bool), **changes}
    return {name: jnp.asarray(value) for name, value in batch.items()}


def make_example(batch, settings):
    keys = jax.random.split(jax.random.key(0), len(batch["image"]))
    geometry_keys, _ = jax.vmap(jax.random.split, out_axes=1)(keys)
    return objective.make_example(batch, keys, geometry_keys, settings)


def test_text_dropout_has_its_probability_and_leaves_empty_prompts_empty():
    has_text = np.arange(1000) % 4 > 0
    settings = recipe(text_dropout=0.3, labelled=1.0)
    example = make_example(tiny_batch(1000, has_text=has_text), settings)
    keep = np.asarray(example.text["has_text"])
    assert not keep[~has_text].any()
    assert keep[has_text].mean() == pytest.approx(0.7, abs=0.05)


def test_level_text_dropout_has_its_probability():
    text = jnp.arange(1, 1001, dtype=jnp.float32)[:, None] * jnp.ones(3)
    keys = jax.random.split(jax.random.key(0), 1000)
    level_text = objective.drop_level_text(text, keys, 0.3)
    keep = np.asarray(level_text).any(-1)
    assert keep.mean() == pytest.approx(0.7, abs=0.05)
    np.testing.assert_array_equal(level_text, np.where(keep[:, None], text, 0))


def test_level_text_dropout_keeps_the_gradient_of_the_pseudo_image():
    settings = recipe({"gen": 0.0})
    grads, dropped_grads = run(settings)[2], run(settings._replace(level_text_dropout=1.0))[2]
    assert grads["level"] != 0 and dropped_grads["level"] == 0
    assert grads["pseudo"] != 0 and dropped_grads["pseudo"] != 0


def test_prompts_are_swapped_exactly_for_flipped_images():
    batch = tiny_batch(32, swapped_has_text=np.zeros(32, bool))
    geometry = views.Geometry(horizontal_flip=0.5, vertical_flip=0.0, affine=0.0)
    example = make_example(batch, recipe(geometry=geometry, geometry_first=True, labelled=1.0))
    pixels = np.asarray(batch["image"]) / np.float32(255)
    flipped = [
        np.allclose(image[..., :1], original[:, ::-1])
        for image, original in zip(example.image, pixels, strict=True)
    ]
    assert 0 < sum(flipped) < 32
    signs = np.where(flipped, -1, 1)[:, None]
    np.testing.assert_array_equal(example.text["text_features"], signs * batch["text_features"])
    np.testing.assert_array_equal(example.text["has_text"], ~np.array(flipped))
    masks = [m[:, ::-1] if f else m for f, m in zip(flipped, batch["mask"], strict=True)]
    np.testing.assert_array_equal(example.mask, masks)
    assert example.labelled.tolist() == [1.0] * 32


def test_published_geometry_follows_the_fusion():
    batch = tiny_batch(8)
    geometry = views.Geometry(horizontal_flip=1.0, vertical_flip=0.0, affine=0.0)
    settings = recipe(geometry=geometry, geometry_first=False, labelled=1.0)
    example = make_example(batch, settings)
    np.testing.assert_array_equal(example.text["text_features"], batch["text_features"])
    np.testing.assert_allclose(example.image[..., :1], np.asarray(batch["image"]) / 255, rtol=1e-6)
    pseudo = jnp.asarray(np.random.default_rng(1).random((8, 4, 4, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    view, mask = objective.weak_view(example, Fused(None, None, pseudo, None), keys, settings)
    np.testing.assert_array_equal(view.image, example.image[:, :, ::-1])
    np.testing.assert_array_equal(view.pseudo_image, pseudo[:, :, ::-1])
    np.testing.assert_array_equal(mask, example.mask[:, :, ::-1])


def test_recipe_follows_the_config():
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


def test_unlabelled_losses_require_unlabelled_images():
    with pytest.raises(ValueError, match=r"set data\.unlabelled, or both losses to 0"):
        tiny.recipe("semi", 1.0)


@pytest.mark.parametrize(
    ("method", "field", "value", "message"),
    [
        ("full", "model.pseudo_image", False, "loss.gen and loss.cycle require the pseudo-image"),
        ("published", "model.bmf.levels", "all", "set views.geometry_first"),
        ("full", "model.bmf.levels", "", "requires both the pseudo-image"),
        ("full", "model.bmf.text_to_vision", False, "requires both the pseudo-image"),
        ("no_generator", "model.bmf.level_text_dropout", 0.5, "requires both the pseudo-image"),
    ],
)
def test_rejects_incompatible_fields(method, field, value, message):
    config = config_lib.load_config(
        f"default:smoke,{method}", [f"--config.{field}={value}"]
    ).to_dict()
    with pytest.raises(ValueError, match=message):
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
    loss_fn = partial(objective.objective, model=model, recipe=tiny.recipe(method))
    keys = jax.random.split(jax.random.key(0), 2)
    jaxpr = jax.make_jaxpr(loss_fn)(state.params, state, tiny.batch(2), keys)
    return str(jaxpr).count("conv_general_dilated[")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # U-Net with 3 levels: 2 in each of 5 blocks (the head is a matrix product); generator 1,
        # encoders 2 each.
        ("unet", 10),
        ("ef_unet", 10 + 1),
        pytest.param("one_way", 10 + 1, marks=pytest.mark.slow),
        pytest.param("published", 2 * 10 + 1 + 2 + 2, marks=pytest.mark.slow),
        ("full", 2 * 10 + 1 + 2 + 2),
        pytest.param("no_cycle", 2 * 10 + 1 + 2, marks=pytest.mark.slow),
        pytest.param("no_generator", 2 * 10 + 2, marks=pytest.mark.slow),
    ],
)
def test_disabled_parts_cost_no_convolutions(method, expected):
    assert num_convolutions(method) == expected
