"""Encoded prompts of a run: ids or features of a frozen encoder; invalid encoders."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax import convert, inference
from biclip_jax.core.errors import UserError
from biclip_jax.data import text as text_lib
from biclip_jax.data import tokenizers
from biclip_jax.encoders import text as text_encoders
from biclip_jax.models import biclip
from biclip_jax.models.text import POOLINGS, PooledTextEncoder
from biclip_jax.weights import model_folder
from tests import tiny

ENCODERS = Path(__file__).parent.parent / "fixtures/encoders"
SOURCES = {"bert": "cxr_bert", "clip": "hf_clip"}
LENGTH = 10
TRAIN = ["left lung, infection.", "right lung.", "left lung, infection.", "upper left lung."]
TEXTS = {"train": TRAIN, "val": ["lower right lung.", "left lung, infection."], "test": ["a"]}


def config(**changes):
    fields = {"trainable": False, "pooling": "all_tokens", "max_length": LENGTH}
    return fields | changes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: converted folder}"""
    base = tmp_path_factory.mktemp("encoders")
    for kind, name in SOURCES.items():
        with pytest.raises(SystemExit) as stopped:
            convert.main([kind, str(ENCODERS / name), str(base / kind)])
        assert stopped.value.code == 0
    return {kind: base / kind for kind in SOURCES}


@pytest.fixture(scope="module")
def encoders(folders):
    return {kind: text_encoders.open_text_encoder(folder, kind) for kind, folder in folders.items()}


@pytest.fixture
def encoded(monkeypatch):
    """Prompts passed to any encoder during the test, one list per call."""
    calls = []
    feature_function = text_encoders._feature_function

    def recording_function(*args):
        encode = feature_function(*args)

        def recording_encode(texts):
            calls.append(list(texts))
            return encode(texts)

        return recording_encode

    monkeypatch.setattr(text_encoders, "_feature_function", recording_function)
    return calls


@cache
def compiled(module, pooling):
    return jax.jit(PooledTextEncoder(module, pooling).apply)


def expected_features(encoder, texts, pooling="all_tokens"):
    """Features of batches padded to eight prompts, computed from ids and mask."""
    distinct = sorted(set(texts))
    padded = distinct + distinct[:1] * (8 - len(distinct))
    ids, mask = text_lib.encode(encoder.tokenizer, padded, LENGTH)
    variables = jax.tree.map(jnp.asarray, {"params": {"pretrained": encoder.params}})
    apply = compiled(encoder.module, pooling)
    features = np.asarray(apply(variables, jnp.asarray(ids), jnp.asarray(mask)))
    return np.stack([features[distinct.index(text)] for text in texts])


def test_the_identity_changes_with_weights_and_tokenizer(folders, encoders, tmp_path):
    def biased(variables):
        return jax.tree.map(lambda x: x + np.float32(1), variables)

    path = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    _, variables = model_folder.read(path)
    identities = [encoders["bert"].identity, text_encoders.open_text_encoder(path, "bert").identity]
    rewrite(path, variables=biased(variables))
    identities.append(text_encoders.open_text_encoder(path, "bert").identity)
    tokenizer = json.loads((path / model_folder.TOKENIZER).read_text())
    rewrite(path, tokenizer=json.dumps(tokenizer))
    identities.append(text_encoders.open_text_encoder(path, "bert").identity)
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def test_opens_only_the_text_encoder_of_a_clip(encoders, folders):
    encoder = encoders["clip"]
    _, variables = model_folder.read(folders["clip"])
    assert set(variables["params"]) == {"image_encoder", "text_encoder", "logit_scale"}
    assert set(encoder.params) == set(variables["params"]["text_encoder"])
    assert (encoder.module.width, encoder.module.activation) == (12, "gelu")
    assert encoder.identity == model_folder.identity(model_folder.read_config(folders["clip"]))
    assert (
        text_encoders.open_text_encoder(folders["clip"], "clip", "bfloat16").module.dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize("path", ["", "nowhere", "tests"])
def test_a_missing_encoder_error_names_the_convert_command(path):
    with pytest.raises(UserError, match=rf"convert bert SOURCE {path or 'FOLDER'}$"):
        text_encoders.open_text_encoder(path, "bert")


@pytest.mark.parametrize(("kind", "other"), [("bert", "clip"), ("clip", "bert")])
def test_rejects_an_encoder_of_another_kind(folders, kind, other):
    with pytest.raises(
        UserError, match=f"found a {kind}; expected a {other}, as in model.text.encoder"
    ):
        text_encoders.open_text_encoder(folders[kind], other)


def test_rejects_the_model_of_a_run(tmp_path):
    variables = {"params": {"x": np.zeros(1)}}
    model_folder.write(tmp_path, config={"model": {}}, variables=variables, tokenizer="{}", card="")
    with pytest.raises(
        UserError, match=r"found a biclip; expected a bert, as in model\.text\.encoder"
    ):
        text_encoders.open_text_encoder(tmp_path, "bert")


def rewrite(path, fields=None, **changes):
    """Rewrites a folder with other model fields or other arguments of `model_folder.write`."""
    model_config, variables = model_folder.read(path)
    config = {**model_config, "model": model_config["model"] | (fields or {})}
    tokenizer = (path / model_folder.TOKENIZER).read_text(encoding="utf-8")
    parts = {"variables": variables, "tokenizer": tokenizer, "card": "", **changes}
    model_folder.write(path, config=config, **parts)


def truncate_weights(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def remove_a_parameter(path):
    _, variables = model_folder.read(path)
    del variables["params"]["blocks_1"]["norm_0"]["bias"]
    rewrite(path, variables=variables)


def tokenizer_with_new_word(path):
    tokenizer = tokenizers.load_tokenizer(path / "tokenizer")
    tokenizer.add_tokens(["zygote"])
    return tokenizer


def add_a_word(path):
    rewrite(path, tokenizer=tokenizer_with_new_word(path).to_str())


def replace_the_tokenizer(path):
    tokenizer_with_new_word(path).save(str(path / model_folder.TOKENIZER))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (truncate_weights, "its SHA-256 is not the one in config.json"),
        (remove_a_parameter, "params/blocks_1/norm_0/bias has shape none"),
        (add_a_word, "largest id is 16, but the weights have 16 words; give the tokenizer"),
        (replace_the_tokenizer, r"tokenizer\.json: its SHA-256 is not the one in config\.json"),
        (lambda path: rewrite(path, {"num_heads": 5}), r"config\.json: does not describe a model"),
        (lambda path: rewrite(path, {"width": "wide"}), r"config\.json: does not describe a model"),
        (lambda path: rewrite(path, {"width": 24}), "has shape"),
        (lambda path: shutil.rmtree(path / "tokenizer"), "tokenizer.json"),
        (lambda path: (path / "config.json").write_text("{"), "not a model folder"),
    ],
)
def test_rejects_a_damaged_encoder(folders, tmp_path, tamper, message):
    path = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    tamper(path)
    with pytest.raises(UserError, match=message):
        text_encoders.open_text_encoder(path, "bert")
    with pytest.raises(UserError, match=message):
        inference.load_model(path)


def test_rejects_a_config_without_a_model(folders, tmp_path):
    path = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "model": None}))
    for open_folder in (
        lambda: text_encoders.open_text_encoder(path, "bert"),
        lambda: inference.load_model(path),
    ):
        with pytest.raises(UserError, match=r"config\.json: does not describe a model \(Type"):
            open_folder()


def test_the_embedding_table_may_be_larger_than_the_tokenizer(encoders):
    tokenizer = encoders["bert"].tokenizer
    text_encoders.check_vocabulary(Path("folder"), tokenizer, 16)
    text_encoders.check_vocabulary(Path("folder"), tokenizer, 99)
    message = r"^folder: the tokenizer's largest id is 15, but the weights have 15 words"
    with pytest.raises(UserError, match=message):
        text_encoders.check_vocabulary(Path("folder"), tokenizer, 15)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 14), ("clip", 10)])
def test_rejects_a_max_length_above_the_positions_of_the_encoder(encoders, kind, longest):
    encoder = encoders[kind]
    text_encoders.check_text_encoder(encoder, config(max_length=longest))
    message = (
        rf"model\.text\.max_length: {longest + 1}; .*has {longest} positions; expected at most"
    )
    for call in (
        text_encoders.check_text_encoder,
        lambda encoder, fields: text_encoders.encode_splits(fields, TEXTS, encoder),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call(encoder, config(max_length=longest + 1))
        assert str(encoder.folder) in str(caught.value)


@pytest.mark.parametrize("trainable", [False, True])
def test_pooling_over_hidden_state_2_needs_two_layers(encoders, trainable):
    encoder = encoders["bert"]
    one_layer = encoder._replace(module=encoder.module.clone(num_layers=1))
    for pooling in set(POOLINGS) - {"embedding"}:
        fields = config(pooling=pooling, trainable=trainable)
        with pytest.raises(
            UserError, match=rf"pooling: '{pooling}' needs hidden state 2.* 1 layer"
        ):
            text_encoders.encode_splits(fields, TEXTS, one_layer)
        text_encoders.check_text_encoder(
            encoder._replace(module=encoder.module.clone(num_layers=2)), fields
        )
    text_encoders.check_text_encoder(one_layer, config(pooling="embedding", trainable=trainable))


@pytest.mark.parametrize("kind", ["bert", pytest.param("clip", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_frozen_features_equal_those_computed_from_ids(encoders, kind, pooling):
    encoder, texts = encoders[kind], ["left lung.", "a", "right upper lung."]
    if kind == "clip":
        texts = ["left", "lung", "left lung"]
    features = text_encoders.frozen_text_features(encoder, config(pooling=pooling), texts)
    expected = expected_features(encoder, texts, pooling)
    assert features.keys() == set(texts)
    for text, row in zip(texts, expected, strict=True):
        np.testing.assert_allclose(features[text], row, atol=1e-5)


def test_frozen_fields_are_in_the_order_of_the_prompts(encoders, encoded):
    encoder, lines = encoders["bert"], list[str]()
    result = text_encoders.encode_splits(config(), TEXTS, encoder, log=lines.append)
    assert result.tokenizer is encoder.tokenizer
    assert result.encoder_sha256 == encoder.identity
    distinct = {text for split in TEXTS.values() for text in split}
    distinct |= {text_lib.swap_sides(text) for text in distinct}
    prompts = [text for call in encoded for text in call]
    assert sorted(prompts) == sorted(distinct)
    assert len(lines) == 1
    assert f"{len(distinct)} distinct prompts" in lines[0]
    for split, texts in TEXTS.items():
        fields = result.fields[split]
        names = {"text_features", "has_text"}
        assert set(fields) == names | {f"swapped_{name}" for name in names}
        assert fields["has_text"].all()
        swapped = [text_lib.swap_sides(text) for text in texts]
        expected, expected_swapped = (expected_features(encoder, t) for t in (texts, swapped))
        np.testing.assert_allclose(fields["text_features"], expected, atol=1e-5)
        np.testing.assert_allclose(fields["swapped_text_features"], expected_swapped, atol=1e-5)
    train = result.fields["train"]
    assert np.abs(train["text_features"] - train["swapped_text_features"]).max() > 1e-4


def test_the_feature_cache_key_covers_all_inputs(encoders, tmp_path, monkeypatch):
    calls, encoder = [], encoders["bert"]

    def feature_function(pooled, *_):
        def encode(texts):
            calls.append(pooled.pooling)
            return np.arange(2.0 * len(texts)).reshape(-1, 2)

        return encode

    monkeypatch.setattr(text_encoders, "_feature_function", feature_function)
    first = text_encoders.encode_splits(config(), TEXTS, encoder, tmp_path)
    second = text_encoders.encode_splits(config(), TEXTS, encoder, tmp_path)
    assert calls == ["all_tokens"]
    jax.tree.map(np.testing.assert_array_equal, first.fields, second.fields)
    for changed, other in (
        (config(pooling="masked"), encoder),
        (config(max_length=LENGTH + 1), encoder),
        (config(), encoder._replace(module=encoder.module.clone(dtype=jnp.bfloat16))),
        (config(), encoder._replace(identity="0")),
    ):
        text_encoders.encode_splits(changed, TEXTS, other, tmp_path)
    assert len(calls) == len(list(tmp_path.iterdir())) == 5


def test_a_trainable_encoder_gets_ids(encoders, encoded):
    result = text_encoders.encode_splits(config(trainable=True), TEXTS, encoders["bert"])
    assert result.encoder_sha256 == encoders["bert"].identity
    assert encoded == []
    for split, texts in TEXTS.items():
        fields = result.fields[split]
        ids, mask = text_lib.encode(encoders["bert"].tokenizer, texts, LENGTH)
        np.testing.assert_array_equal(fields["text_ids"], ids)
        np.testing.assert_array_equal(fields["text_mask"], mask)
        names = {"text_ids", "text_mask", "has_text"}
        assert set(fields) == names | {f"swapped_{name}" for name in names}


def test_the_scratch_vocabulary_is_that_of_the_training_prompts():
    result = text_encoders.encode_splits(config(), TEXTS, None)
    assert result.encoder_sha256 == ""
    words = {"left", "right", "lung", "upper", "infection", ",", "."}
    assert set(result.tokenizer.get_vocab()) == words | {"[PAD]", "[UNK]", "[CLS]"}
    assert result.fields["val"]["text_ids"].shape == (2, LENGTH)
    unknown = result.tokenizer.token_to_id("[UNK]")
    assert result.fields["val"]["text_ids"][0, 1] == unknown


@pytest.fixture(scope="module")
def loaded_model(encoders):
    """(model, variables, processor) with the tiny CXR-BERT as text encoder."""
    encoder = encoders["bert"]
    fields = tiny.model_config(text={"encoder": "bert", **config()})
    model = biclip.build(fields, pretrained_text_encoder=encoder.module)
    variables = {
        "params": {"text_encoder": {"pretrained": encoder.params}, "unet": {"x": np.ones(2)}}
    }
    return model, variables, inference.Processor(encoder.tokenizer, tiny.IMAGE_SIZE, LENGTH)


def test_each_distinct_prompt_is_encoded_once(loaded_model, encoders, encoded):
    encode = text_encoders.make_encode(*loaded_model)
    calls = [["a", "left lung.", "a"], ["left lung."], ["right lung.", "a"], ["a"] * 40]
    for texts in calls:
        features = encode(texts)["text_features"]
        np.testing.assert_allclose(features, expected_features(encoders["bert"], texts), atol=1e-5)
    assert encoded == [["a", "left lung."], ["right lung."]]
    assert set(encode(["a"])) == {"text_features", "has_text"}


def test_warns_once_about_a_truncated_prompt(loaded_model):
    encode, long = text_encoders.make_encode(*loaded_model), "left lung, " * 9
    with pytest.warns(UserWarning, match=f"longer than {LENGTH} tokens"):
        encode([long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode([long, "a"])


def test_without_text_encoder_removes_only_its_parameters(loaded_model):
    model, variables, _ = loaded_model
    variables = variables | {"batch_stats": {"x": np.zeros(1)}}
    result = text_encoders.without_text_encoder(model, variables)
    assert set(result["params"]) == {"unet"}
    assert result["batch_stats"] is variables["batch_stats"]
    assert "text_encoder" in variables["params"]


def test_the_scratch_encoder_is_kept_and_gets_ids(loaded_model):
    _, variables, processor = loaded_model
    model = tiny.model()
    assert text_encoders.without_text_encoder(model, variables) == variables
    fields = text_encoders.make_encode(model, variables, processor)(["left lung.", "a"])
    assert fields["text_ids"].shape == (2, LENGTH)
    assert set(fields) == {"text_ids", "text_mask", "has_text"}


def test_rejects_weights_for_the_scratch_encoder():
    config = {"encoder": "scratch", "weights": "weights/cxr_bert"}
    with pytest.raises(UserError, match=r"model\.text\.encoder is 'scratch'"):
        text_encoders.open_configured(config, "float32")
    assert text_encoders.open_configured({**config, "weights": ""}, "float32") is None
