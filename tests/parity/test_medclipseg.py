"""MedCLIPSeg against its twin in PyTorch: logits, samples, losses, gradients of what is trained."""

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
SIZE, TOLERANCE = 2, 5e-5  # pictures; of logits in float32


@pytest.fixture(autouse=True, scope="module")
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def converted(tensors, hf_config=None):
    """(configuration, variables) of the twin's arrays, by the released checkpoints' tables."""
    held = {
        name: tensor.Tensor(tuple(t.shape), np.dtype("float32"), t.detach().float().numpy)
        for name, t in tensors.items()
    }
    found = convert_medclipseg(readers.Checkpoint(None, "torch", held), hf_config)
    assert found.report.fresh == ()
    return found.config, unflatten_dict(found.variables, sep="/")


@pytest.fixture(scope="module", params=VARIANTS)
def both(request):
    """(twin, model, variables) of a variant, and a function of a dtype to the same model."""
    twin = torch_tiny_medclipseg.tiny_twin(request.param, num_layers=4)
    config, variables = converted(torch_medclipseg.state_dict_with_aliases(twin), tiny.HEADS)

    def build(dtype):
        return medclipseg.build({**config, "dtype": dtype})

    return twin, build("float32"), variables, build


def given():
    """Pictures in [0, 1], ids, and masks."""
    batch = tiny.batch(SIZE)
    return batch["image"] / np.float32(255), batch["text_ids"], batch["mask"]


def for_twin(model, image, ids):
    """The same as the twin takes it: normalised, channels first."""
    image = np.array(model.normalise(jnp.asarray(image)))
    return torch.tensor(image).permute(0, 3, 1, 2), torch.tensor(np.array(ids)).long()


def drawn(model, keys, length):
    shapes = medclipseg.noise_shapes(model, len(keys), length)
    return [
        np.stack([jax.random.normal(jax.random.fold_in(key, i), shape[1:]) for key in keys])
        for i, shape in enumerate(shapes)
    ]


def test_logits_and_features_without_and_with_noise(both):
    twin, model, variables, _ = both
    image, ids, _ = given()
    arrays = drawn(model, tiny.keys(SIZE), ids.shape[1])
    assert [a.shape for a in arrays] == [
        tuple(t.shape) for t in twin.draw_noise(torch.tensor(np.array(ids)))
    ]
    apply = jax.jit(model.apply)
    differ = []
    for scale in (0, 1):
        noise = [scale * part for part in arrays]
        logits, aux = apply(variables, image, ids, noise=noise)
        with torch.no_grad():
            theirs = [torch.tensor(part) for part in noise] if scale else None
            expected = twin(*for_twin(model, image, ids), theirs, return_features=True)
        found = (logits[..., 0], aux["features"], aux["text"])
        for ours, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, wanted, atol=TOLERANCE)
        differ.append(np.asarray(logits))
    assert np.abs(differ[0] - differ[1]).max() > 1e-2


@pytest.mark.slow
def test_mean_and_entropy_over_samples(both, monkeypatch):
    twin, model, variables, _ = both
    image, ids, _ = given()
    keys = tiny.keys(SIZE)
    passes = iter([drawn(model, fold_keys(keys, s), ids.shape[1]) for s in range(4)])
    monkeypatch.setattr(
        type(twin), "draw_noise", lambda *_: [torch.tensor(part) for part in next(passes)]
    )
    mean, entropy = torch_medclipseg.monte_carlo(twin, *for_twin(model, image, ids), 4)

    @jax.jit
    def sample(variables, image, ids):
        return medclipseg.sample_statistics(model, variables, image, ids, None, keys, 4, 2)

    found = sample(variables, image, ids)
    np.testing.assert_allclose(found.mean[..., 0], mean, atol=TOLERANCE)
    np.testing.assert_allclose(found.total[..., 0], entropy, atol=TOLERANCE)


def double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.mark.slow
def test_loss_and_gradients_of_what_is_trained(both):
    """In float64; a bias that raises all scores of a query alike has no gradient but rounding."""
    twin, _, variables, build = both
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        check_gradients(copy.deepcopy(twin).double(), build("float64"), double(variables))


def check_gradients(twin, model, variables):
    image, ids, mask = (np.array(part, float) for part in given())
    noise = [jnp.asarray(part, jnp.float64) for part in drawn(model, tiny.keys(SIZE), ids.shape[1])]
    variables = variables | {"batch_stats": {}}
    state = train_state.create(variables, optax.sgd(1.0), medclipseg.FROZEN)
    recipe = objective.Recipe(
        torch_losses.LOSS_WEIGHTS,
        "rows",
        "released",
        geometry=views.Geometry(0.0, 0.0, 0.0),
    )

    class Given:
        """The model with the noise that is given, whatever the objective's keys are."""

        @staticmethod
        def apply(held, images, *, text_ids, text_mask, has_text=None, **_):
            assert images.shape == image.shape
            return model.apply(held, jnp.asarray(image), text_ids, text_mask, noise=noise)

    batch = tiny.batch(SIZE)
    run = partial(objective.objective, model=Given, recipe=recipe)
    gradient = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, _), grads = gradient(state.params, state, batch, tiny.keys(SIZE))
    pixels, tokens = for_twin(model, jnp.asarray(image, jnp.float64), ids)
    theirs = twin(
        pixels, tokens, [torch.tensor(np.array(part)) for part in noise], return_features=True
    )
    expected = torch_losses.total(theirs[0], torch.tensor(mask[..., 0]), *theirs[1:])
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    # The twin's gradients under our names: as if they were its parameters.
    wanted = {
        name: value.grad.float() if value.grad is not None else torch.zeros_like(value).float()
        for name, value in twin.named_parameters()
    }
    _, wanted = converted(wanted, tiny.HEADS)
    found, wanted = (flatten_dict(tree, sep="/") for tree in (grads, wanted["params"]))
    compared = 0
    for name, value in found.items():
        if name.endswith("norm_key/bias"):
            assert np.abs(value).max() < 1e-12
            continue
        scale = np.abs(wanted[name]).max()
        assert scale > 0, name
        compared += 1
        np.testing.assert_allclose(value / scale, wanted[name] / scale, atol=1e-5, err_msg=name)
    assert compared == len(found) - 2 * len(model.layers)


# {variant: its twin's, the side of the twin's patches, tokens of a sentence, marks around it}
SIZES = {
    "clip": ("clip", 16, 77, ("<|startoftext|>", "<|endoftext|>")),
    "pubmedclip": ("clip", 32, 77, ("<|startoftext|>", "<|endoftext|>")),
    "unimedclip": ("unimedclip", 16, 256, ("[CLS]", "[SEP]")),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", SIZES)
def test_the_published_size(tmp_path, variant):
    """224 px, ten adapters: converted by the command, opened, a pass without and with noise."""
    import biclip_jax
    from tests.conversions import save_clip_tokenizer

    of_twin, patch, length, marks = SIZES[variant]
    twin = torch_clip.randomize_(torch_medclipseg.MedCLIPSeg(of_twin, patch=patch), 0)
    source = tmp_path / "latest.pth"
    torch.save({"model": torch_medclipseg.state_dict_with_aliases(twin), "epoch": 100}, source)
    size = torch_medclipseg.TEXT_SIZES[of_twin]["vocab"]
    words = save_clip_tokenizer(tmp_path / "tokenizer.json", size, marks)
    argv = ["medclipseg", str(source), str(tmp_path / "out"), "--tokenizer", str(words)]
    with pytest.raises(SystemExit) as stopped:
        convert.main(argv)
    assert stopped.value.code == 0
    source.unlink()
    described = json.loads((tmp_path / "out/config.json").read_text())["model"]
    assert described["num_layers"] == 10
    for part, fields in medclipseg.ENCODERS[variant].items():
        assert fields.items() <= {"dropout": 0.1, **described[part]}.items()
    model, variables, processor = biclip_jax.load_model(tmp_path / "out")
    image = np.random.default_rng(0).random((1, 224, 224, 3)).astype(np.float32)
    ids = jnp.asarray(processor.encode(["w5 w7 w9 w30000"])["text_ids"])
    assert ids.shape == (1, length)
    arrays, apply = drawn(model, tiny.keys(1), length), jax.jit(model.apply)
    for scale in (0, 1):
        noise = [scale * part for part in arrays]
        logits, _ = apply(variables, image, ids, noise=noise)
        with torch.no_grad():
            theirs = [torch.tensor(part) for part in noise] if scale else None
            expected = twin(*for_twin(model, image, ids), theirs).numpy()
        assert expected.std() > 1e-2
        np.testing.assert_allclose(logits[..., 0], expected, atol=TOLERANCE)
