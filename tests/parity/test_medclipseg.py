"""MedCLIPSeg against the PyTorch reference: logits, samples, losses, gradients."""

import copy
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from biclip_jax import convert
from biclip_jax.models import medclipseg
from biclip_jax.models.transformer import fold_keys
from biclip_jax.training import state as train_state
from biclip_jax.training import views
from biclip_jax.training.objectives import medclipseg as objective
from biclip_jax.weights import readers
from biclip_jax.weights.formats import tensor
from biclip_jax.weights.medclipseg import convert_medclipseg
from tests import tiny_medclipseg as tiny

torch = pytest.importorskip("torch")
from reference import torch_clip, torch_medclipseg
from reference import torch_medclipseg_losses as torch_losses
from tests import torch_tiny_medclipseg

VARIANTS = (
    "clip",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("unimedclip", "biomedclip")),
)
BATCH_SIZE, TOLERANCE = 2, 5e-5  # the tolerance is that of float32 logits


@pytest.fixture(autouse=True, scope="module")
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def convert_tensors(torch_tensors, hf_config=None):
    """Converts PyTorch tensors with the tables for released checkpoints: (config, variables)."""
    tensors = {
        name: tensor.Tensor(tuple(t.shape), np.dtype("float32"), t.detach().float().numpy)
        for name, t in torch_tensors.items()
    }
    converted = convert_medclipseg(readers.Checkpoint(None, "torch", tensors), hf_config)
    assert converted.report.fresh == ()
    return converted.config, unflatten_dict(converted.variables, sep="/")


@pytest.fixture(scope="module", params=VARIANTS)
def models(request):
    """Returns (PyTorch model, Flax model, variables, function from dtype to Flax model)."""
    torch_model = torch_tiny_medclipseg.tiny_model(request.param, num_layers=4)
    config, variables = convert_tensors(
        torch_medclipseg.state_dict_with_aliases(torch_model), tiny.HEADS
    )

    def build(dtype):
        return medclipseg.build({**config, "dtype": dtype})

    return torch_model, build("float32"), variables, build


def inputs():
    """Returns images in [0, 1], ids and masks."""
    batch = tiny.batch(BATCH_SIZE)
    return batch["image"] / np.float32(255), batch["text_ids"], batch["mask"]


def torch_inputs(model, image, ids):
    """Converts inputs for the PyTorch model: normalised images, channels first."""
    image = np.array(model.normalise(jnp.asarray(image)))
    return torch.tensor(image).permute(0, 3, 1, 2), torch.tensor(np.array(ids)).long()


def noise_arrays(model, keys, length):
    shapes = medclipseg.noise_shapes(model, len(keys), length)
    return [
        np.stack([jax.random.normal(jax.random.fold_in(key, i), shape[1:]) for key in keys])
        for i, shape in enumerate(shapes)
    ]


def test_logits_and_features_match_with_and_without_noise(models):
    torch_model, model, variables, _ = models
    image, ids, _ = inputs()
    arrays = noise_arrays(model, tiny.keys(BATCH_SIZE), ids.shape[1])
    assert [a.shape for a in arrays] == [
        tuple(t.shape) for t in torch_model.draw_noise(torch.tensor(np.array(ids)))
    ]
    apply = jax.jit(model.apply)
    all_logits = []
    for scale in (0, 1):
        noise = [scale * part for part in arrays]
        logits, aux = apply(variables, image, ids, noise=noise)
        with torch.no_grad():
            torch_noise = [torch.tensor(part) for part in noise] if scale else None
            outputs = torch_model(
                *torch_inputs(model, image, ids), torch_noise, return_features=True
            )
        results = (logits[..., 0], aux["features"], aux["text"])
        for found, expected in zip(results, outputs, strict=True):
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        all_logits.append(np.asarray(logits))
    assert np.abs(all_logits[0] - all_logits[1]).max() > 1e-2


@pytest.mark.slow
def test_mean_and_entropy_over_samples_match(models, monkeypatch):
    torch_model, model, variables, _ = models
    image, ids, _ = inputs()
    keys = tiny.keys(BATCH_SIZE)
    passes = iter([noise_arrays(model, fold_keys(keys, s), ids.shape[1]) for s in range(4)])
    monkeypatch.setattr(
        type(torch_model), "draw_noise", lambda *_: [torch.tensor(part) for part in next(passes)]
    )
    mean, entropy = torch_medclipseg.monte_carlo(torch_model, *torch_inputs(model, image, ids), 4)

    @jax.jit
    def sample(variables, image, ids):
        return medclipseg.sample_statistics(model, variables, image, ids, None, keys, 4, 2)

    found = sample(variables, image, ids)
    np.testing.assert_allclose(found.mean[..., 0], mean, atol=TOLERANCE)
    np.testing.assert_allclose(found.total[..., 0], entropy, atol=TOLERANCE)


def double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.mark.slow
def test_loss_and_gradients_match(models):
    """In float64: the gradient of a bias that shifts all scores equally is zero up to rounding."""
    torch_model, _, variables, build = models
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        check_gradients(copy.deepcopy(torch_model).double(), build("float64"), double(variables))


def check_gradients(torch_model, model, variables):
    image, ids, mask = (np.array(part, float) for part in inputs())
    noise = [
        jnp.asarray(part, jnp.float64)
        for part in noise_arrays(model, tiny.keys(BATCH_SIZE), ids.shape[1])
    ]
    variables = variables | {"batch_stats": {}}
    state = train_state.create(variables, optax.sgd(1.0), medclipseg.FROZEN)
    recipe = objective.Recipe(
        torch_losses.LOSS_WEIGHTS,
        "rows",
        "released",
        geometry=views.Geometry(0.0, 0.0, 0.0),
    )

    class FixedNoise:
        """The model with fixed images and noise instead of those of the objective."""

        @staticmethod
        def apply(variables, images, *, text_ids, text_mask, has_text=None, **_):
            assert images.shape == image.shape
            return model.apply(variables, jnp.asarray(image), text_ids, text_mask, noise=noise)

    batch = tiny.batch(BATCH_SIZE)
    run = partial(objective.objective, model=FixedNoise, recipe=recipe)
    gradient = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, _), grads = gradient(state.params, state, batch, tiny.keys(BATCH_SIZE))
    pixels, tokens = torch_inputs(model, jnp.asarray(image, jnp.float64), ids)
    outputs = torch_model(
        pixels, tokens, [torch.tensor(np.array(part)) for part in noise], return_features=True
    )
    expected_loss = torch_losses.total(outputs[0], torch.tensor(mask[..., 0]), *outputs[1:])
    expected_loss.backward()
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    # The PyTorch gradients are converted like parameters.
    torch_grads = {
        name: value.grad.float() if value.grad is not None else torch.zeros_like(value).float()
        for name, value in torch_model.named_parameters()
    }
    _, converted = convert_tensors(torch_grads, tiny.HEADS)
    found, expected = (flatten_dict(tree, sep="/") for tree in (grads, converted["params"]))
    num_compared = 0
    for name, value in found.items():
        if name.endswith("norm_key/bias"):
            assert np.abs(value).max() < 1e-12
            continue
        scale = np.abs(expected[name]).max()
        assert scale > 0, name
        num_compared += 1
        np.testing.assert_allclose(value / scale, expected[name] / scale, atol=1e-5, err_msg=name)
    assert num_compared == len(found) - 2 * len(model.layers)


# {variant: PyTorch variant, patch size, tokens of a prompt, start and end token}
SIZES = {
    "clip": ("clip", 16, 77, ("<|startoftext|>", "<|endoftext|>")),
    "pubmedclip": ("clip", 32, 77, ("<|startoftext|>", "<|endoftext|>")),
    "unimedclip": ("unimedclip", 16, 256, ("[CLS]", "[SEP]")),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", SIZES)
def test_logits_match_at_published_size(tmp_path, variant):
    """224 px, ten adapters: `convert`, load, and one pass without and with noise."""
    import biclip_jax
    from tests.conversions import save_clip_tokenizer

    torch_variant, patch, length, end_tokens = SIZES[variant]
    torch_model = torch_clip.randomize_(torch_medclipseg.MedCLIPSeg(torch_variant, patch=patch), 0)
    source = tmp_path / "latest.pth"
    torch.save(
        {"model": torch_medclipseg.state_dict_with_aliases(torch_model), "epoch": 100}, source
    )
    size = torch_medclipseg.TEXT_SIZES[torch_variant]["vocab"]
    tokenizer = save_clip_tokenizer(tmp_path / "tokenizer.json", size, end_tokens)
    argv = ["medclipseg", str(source), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    with pytest.raises(SystemExit) as exit_info:
        convert.main(argv)
    assert exit_info.value.code == 0
    source.unlink()
    config = json.loads((tmp_path / "out/config.json").read_text())["model"]
    assert config["num_layers"] == 10
    for part, fields in medclipseg.ENCODERS[variant].items():
        assert fields.items() <= {"dropout": 0.1, **config[part]}.items()
    model, variables, processor = biclip_jax.load_model(tmp_path / "out")
    image = np.random.default_rng(0).random((1, 224, 224, 3)).astype(np.float32)
    ids = jnp.asarray(processor.encode(["w5 w7 w9 w30000"])["text_ids"])
    assert ids.shape == (1, length)
    arrays, apply = noise_arrays(model, tiny.keys(1), length), jax.jit(model.apply)
    for scale in (0, 1):
        noise = [scale * part for part in arrays]
        logits, _ = apply(variables, image, ids, noise=noise)
        with torch.no_grad():
            torch_noise = [torch.tensor(part) for part in noise] if scale else None
            expected = torch_model(*torch_inputs(model, image, ids), torch_noise).numpy()
        assert expected.std() > 1e-2
        np.testing.assert_allclose(logits[..., 0], expected, atol=TOLERANCE)
