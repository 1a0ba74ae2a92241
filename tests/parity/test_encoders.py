"""Encoders of the published sizes with random weights, against transformers and OpenAI's layout.

Hidden states agree to 1e-4 in float32, gradients of a scalar to 1e-3 of each parameter's maximum.
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from biclip_jax.convert import read_hf_config
from biclip_jax.models import bert, clip
from biclip_jax.weights import architectures, readers
from biclip_jax.weights.convert import standard_names
from biclip_jax.weights.formats import tensor

torch = pytest.importorskip("torch")
from reference import torch_clip

pytestmark = pytest.mark.slow
END = 49407


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield
    gc.collect()


def converted_from(folder, kind):
    """Returns (config, variables) of a checkpoint written by transformers."""
    convert = {"bert": architectures.convert_bert, "clip": architectures.convert_clip}[kind]
    converted = convert(readers.open_checkpoint(folder), read_hf_config(folder, None))
    assert converted.report.fresh == ()
    return converted.config, unflatten_dict(converted.variables, sep="/")


def random_images(size, batch=2):
    image = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    return jnp.asarray(image), torch.tensor(image).permute(0, 3, 1, 2)


def random_ids(length, vocab, end=None):
    ids = np.random.default_rng(1).integers(5, vocab - 5, (2, length))
    ids[0, length // 2 :] = 0
    if end:
        ids[0, length // 2], ids[1, -1] = end, end
    return jnp.asarray(ids, jnp.int32), torch.tensor(ids)


def assert_states(found, expected, atol=1e-4):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        difference = np.abs(np.asarray(a) - b.detach().numpy()).max()
        assert difference <= atol, f"state {i}: {difference}"


def assert_gradients(grads, model, config, kind):
    """Compares with the gradients of `model`, converted like parameters; returns their number."""
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.grad is None}
    tensors = {
        name: tensor.Tensor(tuple(t.shape), np.dtype("float32"), t.detach().numpy)
        for name, t in (named | zeros).items()
    }
    checkpoint = readers.Checkpoint(None, "torch", tensors)
    assert standard_names(checkpoint).keys() == tensors.keys()
    convert = {"bert": architectures.convert_bert, "clip": architectures.convert_clip}[kind]
    converted = convert(checkpoint, config).variables
    num_compared = 0
    for name, value in flatten_dict(grads, sep="/").items():
        expected = converted[f"params/{name}"]
        scale = np.abs(expected).max()
        if scale < 1e-7:  # zero up to rounding
            assert np.abs(value).max() < 1e-6, name
            continue
        num_compared += 1
        np.testing.assert_allclose(value / scale, expected / scale, atol=1e-3, err_msg=name)
    return num_compared


def hf_clip(patch_size):
    from transformers import CLIPConfig, CLIPModel

    vision = {"patch_size": patch_size, "hidden_size": 768, "intermediate_size": 3072}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    config = CLIPConfig(vision_config=vision, text_config=text | {"eos_token_id": END})
    torch.manual_seed(0)
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def vit_b16(tmp_path_factory):
    """Returns a model of transformers and the folder where it is saved."""
    folder = tmp_path_factory.mktemp("vit_b16")
    model = hf_clip(16)
    model.save_pretrained(folder)
    return model, folder


def test_clip_vit_b16_states_and_embeddings(vit_b16):
    model, folder = vit_b16
    config, variables = converted_from(folder, "clip")
    assert config["image"] == clip.VIT_B16 | {"activation": "quick_gelu", "epsilon": 1e-5}
    image, image_t = random_images(224)
    ids, ids_t = random_ids(77, 49408, END)
    logits, aux = jax.jit(clip.build(config).apply)(variables, image, ids)
    with torch.no_grad():
        vision_outputs = model.vision_model(image_t, output_hidden_states=True)
        text_outputs = model.text_model(ids_t, output_hidden_states=True)
        outputs = model(input_ids=ids_t, pixel_values=image_t)
    assert_states(aux["image"]["hidden_states"], vision_outputs.hidden_states)
    assert_states(aux["text"]["hidden_states"], text_outputs.hidden_states)
    assert_states([aux["image_embedding"]], [outputs.image_embeds])
    assert_states([aux["text_embedding"]], [outputs.text_embeds])
    assert_states([logits], [outputs.logits_per_image])


def test_clip_vit_b16_gradients(vit_b16):
    model, folder = vit_b16
    config, variables = converted_from(folder, "clip")
    image, image_t = random_images(224)
    ids, ids_t = random_ids(20, 49408, END)

    def scalar(params):
        _, aux = clip.build(config).apply({"params": params}, image, ids)
        tokens = aux["image"]["hidden_states"][-1]
        return (tokens * jnp.cos(tokens)).mean() + (
            aux["image_embedding"] * aux["text_embedding"]
        ).sum()

    grads = jax.jit(jax.grad(scalar))(variables["params"])
    model.zero_grad()
    vision_outputs = model.vision_model(image_t, output_hidden_states=True)
    outputs = model(input_ids=ids_t, pixel_values=image_t)
    tokens = vision_outputs.hidden_states[-1]
    similarity = (outputs.image_embeds * outputs.text_embeds).sum()
    ((tokens * tokens.cos()).mean() + similarity).backward()
    num_compared = assert_gradients(grads, model, read_hf_config(folder, None), "clip")
    assert num_compared >= 24 * 12


def test_clip_vit_b16_at_another_size(vit_b16):
    model, folder = vit_b16
    config, variables = converted_from(folder, "clip")
    image, image_t = random_images(288, batch=1)
    encoder = clip.build_image_encoder(config["image"])
    _, aux = jax.jit(encoder.apply)({"params": variables["params"]["image_encoder"]}, image)
    with torch.no_grad():
        outputs = model.vision_model(
            image_t, output_hidden_states=True, interpolate_pos_encoding=True
        )
    assert_states(aux["hidden_states"], outputs.hidden_states)


def test_clip_file_formats_give_the_same_parameters(vit_b16, tmp_path):
    model, folder = vit_b16
    _, expected = converted_from(folder, "clip")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    for source in (tmp_path / "pytorch_model.bin", tmp_path / "sharded"):
        _, found = converted_from(source, "clip")
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_clip_vit_b32_states():
    model = hf_clip(32)
    tensors = {
        name: tensor.Tensor(tuple(t.shape), np.dtype("float32"), t.numpy)
        for name, t in model.state_dict().items()
    }
    converted = architectures.convert_clip(readers.Checkpoint(None, "torch", tensors))
    image, image_t = random_images(224)
    encoder = clip.build_image_encoder(converted.config["image"])
    variables = unflatten_dict(converted.variables, sep="/")
    _, aux = jax.jit(encoder.apply)({"params": variables["params"]["image_encoder"]}, image)
    with torch.no_grad():
        outputs = model.vision_model(image_t, output_hidden_states=True)
    assert_states(aux["hidden_states"], outputs.hidden_states)


def test_clip_rn50_states_and_gradients(tmp_path):
    resnet = torch_clip.ModifiedResNet(224, 64, (3, 4, 6, 3), 32, 1024)
    model = torch_clip.OpenAIClip(resnet, 49408, 77, 512, 12, 1024)
    model = torch_clip.randomize_(model, 0)
    torch.save(model.state_dict(), tmp_path / "RN50.pt")
    config, variables = converted_from(tmp_path / "RN50.pt", "clip")
    assert config["image"] == clip.RN50 | {"stages": [3, 4, 6, 3]}
    image, image_t = random_images(224)
    ids, ids_t = random_ids(20, 49408, END)
    logits, aux = jax.jit(clip.build(config).apply)(variables, image, ids)
    with torch.no_grad():
        _, image_states = model.visual(image_t)
        _, text_states = model.encode_text(ids_t)
        expected = model(image_t, ids_t)
    assert_states(aux["image"]["hidden_states"], [x.permute(0, 2, 3, 1) for x in image_states])
    assert_states(aux["text"]["hidden_states"], text_states)
    assert_states([logits], [expected])

    encoder = clip.build_image_encoder(config["image"])
    stats = variables["batch_stats"]["image_encoder"]

    def scalar(params):
        embedding, _ = encoder.apply({"params": params, "batch_stats": stats}, image)
        return jnp.sin(embedding).sum()

    grads = jax.jit(jax.grad(scalar))(variables["params"]["image_encoder"])
    torch.sin(model.visual(image_t)[0]).sum().backward()
    torch_params = dict(model.visual.named_parameters())
    for name, torch_name in (
        ("stem/conv_0/kernel", "conv1.weight"),
        ("stage_0_0/conv_skip/kernel", "layer1.0.downsample.0.weight"),
        ("stage_1_0/conv_1/kernel", "layer2.0.conv2.weight"),
        ("stage_3_2/conv_2/kernel", "layer4.2.conv3.weight"),
    ):
        found = flatten_dict(grads, sep="/")[name].transpose(3, 2, 0, 1)
        expected = torch_params[torch_name].grad.numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-3, err_msg=name)


def test_bert_base_states_and_gradients(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    config, variables = converted_from(tmp_path, "bert")
    ids, ids_t = random_ids(32, 30522)
    encoder = bert.build(config)
    _, aux = jax.jit(encoder.apply)(variables, ids, ids > 0)
    outputs = model(ids_t, attention_mask=ids_t > 0, output_hidden_states=True)
    assert_states(aux["hidden_states"], outputs.hidden_states)

    def scalar(params):
        _, aux = encoder.apply({"params": params}, ids, ids > 0)
        return (
            jnp.sin(3 * aux["hidden_states"][-1][:, :9]).sum()
            + jnp.sin(aux["hidden_states"][1][1]).sum()
        )

    grads = jax.jit(jax.grad(scalar))(variables["params"])
    last, first = outputs.hidden_states[-1], outputs.hidden_states[1]
    ((3 * last[:, :9]).sin().sum() + first[1].sin().sum()).backward()
    assert assert_gradients(grads, model, read_hf_config(tmp_path, None), "bert") >= 12 * 12
