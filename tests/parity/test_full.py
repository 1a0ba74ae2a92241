"""`full` against the PyTorch reference: logits, losses, gradients, statistics."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from biclip_jax.models import biclip
from biclip_jax.models.unet import block_names
from biclip_jax.training import state as train_state
from biclip_jax.training import views
from biclip_jax.training.objectives import biclip as objective
from tests import tiny

torch = pytest.importorskip("torch")
from reference.torch_biclip import TorchBiCLIP, full_loss, randomize_
from tests.parity.test_published import nchw, nhwc, to_flax, to_torch

SIZE, WIDTH, FEATURES = 56, 4, 24


@functools.cache
def pair(norm: str, levels: int = 3):
    """Returns the PyTorch model with random values at every level, and the same Flax model."""
    torch.manual_seed(0)
    widths = tuple(WIDTH * 2**i for i in range(levels))
    sizes = {"widths": widths, "encoder_widths": (WIDTH, 4 * WIDTH), "norm": norm}
    sizes |= {"cycle_widths": (WIDTH // 2, WIDTH), "image_size": SIZE, "level_hidden": 20}
    torch_model = randomize_(TorchBiCLIP(text_feature_dim=FEATURES, **sizes), seed=1)
    model = biclip.BiCLIP(**sizes, levels=block_names(levels))
    return torch_model, model, {"batch_stats": {}, **to_flax(torch_model)}


def inputs(batch: int, seed: int = 0):
    """Returns black and white uint8 images, text features and masks, as (B, H, W, C) arrays."""
    rng = np.random.default_rng(seed)
    # Only black and white: k / 255 may round differently under jit, enough to switch a ReLU.
    pixels = np.where(rng.random((batch, SIZE, SIZE, 3)) > 0.5, 255, 0).astype(np.uint8)
    mask = (rng.random((batch, SIZE, SIZE, 1)) > 0.7).astype(np.uint8)
    return jnp.asarray(pixels), rng.standard_normal((batch, FEATURES)), jnp.asarray(mask)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_parameter_has_a_pytorch_name(norm):
    _, model, variables = pair(norm)
    image, text = jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros((1, FEATURES))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, text_features=text))
    expected = {k: v.shape for k, v in flatten_dict(shapes, sep="/").items()}
    found = {k: v.shape for k, v in flatten_dict(variables, sep="/").items() if k != "batch_stats"}
    assert found == expected


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.slow
def test_network_matches_pytorch(norm):
    torch_model, model, variables = pair(norm)
    torch_model.eval()
    pixels, text, _ = inputs(2)
    image = biclip.to_unit_rgb(pixels)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = torch_model(nchw(image), to_torch(text).float())
        logits, _ = model.apply(variables, image, text_features=jnp.asarray(text, jnp.float32))
    assert np.abs(nhwc(expected) - logits).max() <= 1e-4 * float(expected.std())


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_losses_gradients_and_statistics_match_pytorch(monkeypatch, norm):
    """Uses a flip with the swapped prompt, a fixed box per pair and a fixed photometric change."""
    box = np.zeros((4, SIZE, SIZE, 1), bool)
    box[:2, 3:30, 8:40], box[2:, 20:44, :16] = True, True
    deformation = views.Deformation(None, jnp.asarray(box))
    monkeypatch.setattr(views, "random_deformation", lambda *_: deformation)
    monkeypatch.setattr(views, "strong_photometric", lambda _key, image, _strong: darker(image))
    with jax.enable_x64(True):  # see test_published
        check_training_step(norm, box)


def darker(image):
    return jnp.clip(image * 0.8 + 0.05, 0, 1)


def check_training_step(norm, box):
    # Two levels, because compilation dominates the time.
    torch_model, model, _ = pair(norm, levels=2)
    torch_model = copy.deepcopy(torch_model).double().train()
    model, variables = model.clone(dtype=jnp.float64), {"batch_stats": {}, **to_flax(torch_model)}
    pixels, text, mask = inputs(4)
    image, double = biclip.to_unit_rgb(pixels), torch.float64
    total, parts = full_loss(
        torch_model,
        nchw(image[:, :, ::-1]).to(double),
        to_torch(text),
        nchw(mask[:, :, ::-1]).to(double),
        nchw(box),
        lambda x: (x * 0.8 + 0.05).clamp(0, 1),
    )
    total.backward()
    statistics = flatten_dict(to_flax(torch_model).get("batch_stats", {}), sep="/")
    for parameter in torch_model.parameters():
        parameter.data = parameter.grad
    gradients = flatten_dict(to_flax(torch_model)["params"], sep="/")

    geometry = views.Geometry(1.0, 0.0, 0.0)
    recipe = tiny.recipe("full", geometry=geometry, text_dropout=0.0, level_text_dropout=0.0)
    loss_fn = functools.partial(objective.objective, model=model, recipe=recipe)
    # Every example is flipped, so only the swapped prompt may be used.
    batch = {"image": pixels, "mask": mask, "text_features": jnp.full(text.shape, jnp.nan)}
    batch["swapped_text_features"] = jnp.asarray(text)
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    state = train_state.create(variables, optax.sgd(1.0))
    keys = jax.random.split(jax.random.key(0), len(pixels))
    (loss, (updated, values)), grads = step(variables["params"], state, batch, keys)
    assert float(loss) == pytest.approx(total.item(), rel=1e-6)
    for name, part in parts.items():
        found = float(values[f"loss_{name}"].mean())
        assert found == pytest.approx(part.item(), rel=1e-6, abs=1e-11), name
    assert (norm == "batch") == bool(statistics)
    for name, value in flatten_dict(updated, sep="/").items():
        np.testing.assert_allclose(value, statistics[name], rtol=1e-5, err_msg=name)
    assert grads.keys() == variables["params"].keys()
    for name, value in flatten_dict(grads, sep="/").items():
        scale = float(jnp.abs(gradients[name]).max())
        assert scale > 0, name
        assert float(jnp.abs(value - gradients[name]).max()) <= 1e-5 * scale, name
