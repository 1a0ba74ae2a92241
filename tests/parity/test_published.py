"""The published network against the PyTorch reference: logits, losses, gradients, statistics."""

import copy
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from biclip_jax.models import biclip, layers
from biclip_jax.training import state as train_state
from biclip_jax.training import views
from biclip_jax.training.objectives import biclip as objective

torch = pytest.importorskip("torch")
from reference.torch_biclip import TorchBiCLIP, published_loss, randomize_

WEIGHTS = {"gen": 0.1, "iac": 0.05, "cycle": 0.07}

# PyTorch and Flax parameter names; {...} fields depend on the number in the PyTorch name.
NAMES = [
    (r"image_feature_extractor\.conv\.(\d)", "image_encoder/conv_{half}"),
    (r"text_encoder\.project_head\.(\d)", "text_projection/{mlp}"),
    (r"text_refiner\.mlp\.(\d)", "refiner/mlp/{mlp}"),
    (r"image_to_text\.encoder\.(\d)", "cycle_head/encoder/conv_{half}"),
    (r"image_to_text\.fc", "cycle_head/out"),
    (r"generator\.(\d)", "generator/up_{half}"),
    (r"IAC_proj\.(\d)", "consistency_head/{iac}"),
    (r"inc\.double_conv\.(\d)", "unet/encoder_0/{double}"),
    (r"down(?P<level>\d)\.maxpool_conv\.1\.double_conv\.(\d)", "unet/encoder_{level}/{double}"),
    (r"up(?P<up>\d)\.up", "unet/up_{decoder}"),
    (r"up(?P<up>\d)\.conv\.double_conv\.(\d)", "unet/decoder_{decoder}/{double}"),
    (r"outc\.conv", "unet/head"),
    (r"fusions\.(?P<block>\w+)\.refiner\.mlp\.(\d)", "unet/fusion_{block}/refiner/mlp/{mlp}"),
    (r"fusions\.(?P<block>\w+)\.modulation", "unet/fusion_{block}/modulation"),
]
MLP = {0: "in", 1: "norm", 3: "out"}
DOUBLE = {0: "conv_0", 1: "norm_0", 3: "conv_1", 4: "norm_1"}
IAC = {2: "out", 3: "norm"}


def flax_name(name: str, levels: int) -> tuple[str, str, str]:
    """Converts a PyTorch name to (collection, path, kind of leaf)."""
    stem, leaf = name.rsplit(".", 1)
    for pattern, flax_path in NAMES:
        match = re.fullmatch(pattern, stem)
        if match:
            last = match.groups()[-1] if match.groups() else ""
            number = int(last) if last.isdigit() else 0
            groups = match.groupdict()
            path = flax_path.format(
                half=number // 2,
                mlp=MLP.get(number),
                double=DOUBLE.get(number),
                iac=IAC.get(number),
                level=groups.get("level"),
                block=groups.get("block"),
                decoder=levels - 1 - int(groups.get("up") or 0),
            )
            return ("batch_stats" if leaf.startswith("running") else "params"), path, leaf
    raise KeyError(name)


def to_flax(model) -> dict:
    """Converts the PyTorch model's parameters and statistics to Flax variables."""
    transposed = {n for n, m in model.named_modules() if isinstance(m, torch.nn.ConvTranspose2d)}
    levels = sum(name.endswith(".up.weight") for name in model.state_dict()) + 1
    flat = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        collection, path, leaf = flax_name(name, levels)
        value = tensor.detach().numpy()
        flax_leaf = {"running_mean": "mean", "running_var": "var", "bias": "bias"}.get(
            leaf, "scale"
        )
        if leaf == "weight" and value.ndim == 2:
            flax_leaf, value = "kernel", value.T
        elif leaf == "weight" and value.ndim == 4:
            order = (2, 3, 0, 1) if name.rsplit(".", 1)[0] in transposed else (2, 3, 1, 0)
            flax_leaf, value = "kernel", value.transpose(order)
        flat[f"{collection}/{path}/{flax_leaf}"] = jnp.asarray(value)
    return unflatten_dict(flat, sep="/")


@functools.cache
def pair(image_size: int = 112, width: int = 8, levels: int = 5):
    """Returns the PyTorch model with random values, and the Flax model with the same ones."""
    torch.manual_seed(0)
    widths = tuple(width * 2**i for i in range(levels))
    sizes = {"widths": widths, "encoder_widths": (width, 4 * width)}
    sizes |= {"cycle_widths": (width // 2, width), "image_size": image_size}
    torch_model = randomize_(TorchBiCLIP(text_feature_dim=48, **sizes), seed=1)
    return torch_model, biclip.BiCLIP(**sizes), to_flax(torch_model)


def inputs(image_size: int, batch: int = 2, seed: int = 0):
    """Returns images, text features and masks as (B, H, W, C) arrays."""
    rng = np.random.default_rng(seed)
    image = rng.random((batch, image_size, image_size, 3), np.float32)
    mask = (rng.random((batch, image_size, image_size, 1)) > 0.7).astype(np.float32)
    text = rng.standard_normal((batch, 48)).astype(np.float32)
    return jnp.asarray(image), jnp.asarray(text), jnp.asarray(mask)


def to_torch(x) -> "torch.Tensor":
    return torch.from_numpy(np.array(x))


def nchw(x) -> "torch.Tensor":
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())


def nhwc(x) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.parametrize(
    ("image_size", "levels"), [(56, 4), pytest.param(112, 5, marks=pytest.mark.slow)]
)
def test_network_matches_pytorch(image_size, levels):
    torch_model, model, variables = pair(image_size, levels=levels)
    torch_model.eval()
    image, text, _ = inputs(image_size)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        fused = torch_model.fuse(nchw(image), to_torch(text))
        expected, features = torch_model.segment(nchw(image), fused["pseudo_image"])
        logits, aux = model.apply(variables, image, text_features=text)
    scale = float(expected.std())
    assert np.abs(nhwc(expected) - logits).max() <= 1e-4 * scale
    np.testing.assert_allclose(aux["text"], fused["text"].numpy(), atol=1e-5)
    np.testing.assert_allclose(aux["refined_text"], fused["refined_text"].numpy(), atol=1e-5)
    np.testing.assert_allclose(aux["pseudo_image"], nhwc(fused["pseudo_image"]), atol=1e-5)
    np.testing.assert_allclose(aux["features"], nhwc(features), atol=1e-4 * float(features.std()))


@pytest.mark.slow
def test_network_matches_pytorch_at_full_size():
    torch_model, model, variables = pair(224, width=64)
    torch_model.eval()
    image, text, _ = inputs(224, batch=1)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = torch_model(nchw(image), to_torch(text))
        logits, _ = model.apply(variables, image, text_features=text)
    assert np.abs(nhwc(expected) - logits).max() <= 1e-4 * float(expected.std())


def test_every_parameter_has_a_pytorch_name():
    _, model, variables = pair()
    image, text = jnp.zeros((1, 112, 112, 3)), jnp.zeros((1, 48))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, text_features=text))
    expected = {k: v.shape for k, v in flatten_dict(shapes, sep="/").items()}
    found = {k: v.shape for k, v in flatten_dict(variables, sep="/").items()}
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("double_sigmoid", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_gradients_and_statistics_match_pytorch(monkeypatch, double_sigmoid):
    """Uses the training objective with a flip as geometry and a fixed photometric change."""
    monkeypatch.setattr(views, "published_photometric", lambda _, image: darker(image))
    # In float64: in float32 rounding may switch a ReLU, which changes a gradient by 0.1 %.
    with jax.enable_x64(True):
        check_training_step(double_sigmoid)


def darker(image):
    return jnp.clip(image * 0.8 + 0.05, 0, 1)


def check_training_step(double_sigmoid):
    torch_model, model, _ = pair()
    torch_model = copy.deepcopy(torch_model).double().train()
    model, variables = model.clone(dtype=jnp.float64), to_flax(torch_model)
    pixels, text, mask = inputs(112)
    # Only black and white: k / 255 may round differently under jit, enough to switch a ReLU.
    pixels, text = jnp.where(pixels > 0.5, 255, 0).astype(jnp.uint8), text.astype(jnp.float64)
    image, double = biclip.to_unit_rgb(pixels), torch.float64

    def flipped(x):
        return nchw(x[:, :, ::-1]).to(double)

    total, parts = published_loss(
        torch_model,
        nchw(image).to(double),
        to_torch(text),
        nchw(mask).to(double),
        (flipped(image), lambda pseudo: pseudo.flip(-1), flipped(mask)),
        (flipped(darker(image)), lambda pseudo: pseudo.flip(-1)),
        double_sigmoid,
    )
    total.backward()
    statistics = flatten_dict(to_flax(torch_model)["batch_stats"], sep="/")
    for parameter in torch_model.parameters():
        parameter.data = parameter.grad
    gradients = flatten_dict(to_flax(torch_model)["params"], sep="/")

    loss_fn = functools.partial(
        objective.objective,
        model=model,
        recipe=objective.Recipe(
            WEIGHTS,
            views.Geometry(horizontal_flip=1.0, vertical_flip=0.0, affine=0.0),
            double_sigmoid=double_sigmoid,
        ),
    )
    batch = {"image": pixels, "mask": mask.astype(jnp.uint8), "text_features": text}
    keys = jax.random.split(jax.random.key(0), len(pixels))
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    state = train_state.create(variables, optax.sgd(1.0))
    (loss, (updated, values)), grads = step(variables["params"], state, batch, keys)
    assert float(loss) == pytest.approx(total.item(), rel=1e-6)
    for name, part in parts.items():
        found = float(values[f"loss_{name}"].mean())
        assert found == pytest.approx(part.item(), rel=1e-6, abs=1e-11), name
    for name, value in flatten_dict(updated, sep="/").items():
        np.testing.assert_allclose(value, statistics[name], rtol=1e-5, err_msg=name)
    for name, value in flatten_dict(grads, sep="/").items():
        scale = float(jnp.abs(gradients[name]).max())
        assert float(jnp.abs(value - gradients[name]).max()) <= 1e-5 * scale, name


@pytest.mark.parametrize(
    ("module", "torch_fields"),
    [
        (layers.UpConv2x2(5), {"kernel_size": 2, "stride": 2}),
        (layers.UpConv4x4(5), {"kernel_size": 4, "stride": 2, "padding": 1}),
    ],
)
def test_transposed_convolutions_match_pytorch(module, torch_fields):
    torch.manual_seed(0)
    torch_model = torch.nn.ConvTranspose2d(3, 5, **torch_fields)
    x = np.random.default_rng(0).standard_normal((2, 7, 9, 3))
    x = jnp.asarray(x, jnp.float32)
    params = {
        "kernel": torch_model.weight.detach().numpy().transpose(2, 3, 0, 1),
        "bias": torch_model.bias.detach().numpy(),
    }
    with jax.default_matmul_precision("highest"):
        found = module.apply({"params": params}, x)
    np.testing.assert_allclose(found, nhwc(torch_model(nchw(x))), atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_and_running_statistics_match_pytorch(train):
    torch_model = randomize_(torch.nn.BatchNorm2d(4), seed=0).train(train)
    x = np.random.default_rng(0).standard_normal((3, 5, 6, 4)) * 3 + 1
    x = jnp.asarray(x, jnp.float32)
    variables = {
        "params": {
            "scale": torch_model.weight.detach().numpy(),
            "bias": torch_model.bias.detach().numpy(),
        },
        "batch_stats": {
            "mean": torch_model.running_mean.numpy().copy(),
            "var": torch_model.running_var.numpy().copy(),
        },
    }
    found, updates = layers.BatchNorm().apply(variables, x, train, mutable=["batch_stats"])
    np.testing.assert_allclose(found, nhwc(torch_model(nchw(x))), atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], torch_model.running_mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], torch_model.running_var, rtol=1e-5)
