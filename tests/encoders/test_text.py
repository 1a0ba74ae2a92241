"""Sentences for a run: ids, or the vectors of a frozen tower; and towers that cannot be used."""

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

TOWERS = Path(__file__).parent.parent / "fixtures/encoders"
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
            convert.main([kind, str(TOWERS / name), str(base / kind)])
        assert stopped.value.code == 0
    return {kind: base / kind for kind in SOURCES}


@pytest.fixture(scope="module")
def encoders(folders):
    return {kind: text_encoders.open_text_encoder(folder, kind) for kind, folder in folders.items()}


@pytest.fixture
def encoded(monkeypatch):
    """The sentences that any tower is given, call by call, while the test runs."""
    calls = []
    vectors = text_encoders._feature_function

    def counting(*args):
        encode = vectors(*args)

        def counted(texts):
            calls.append(list(texts))
            return encode(texts)

        return counted

    monkeypatch.setattr(text_encoders, "_feature_function", counting)
    return calls


@cache
def compiled(module, pooling):
    return jax.jit(PooledTextEncoder(module, pooling).apply)


def expected_vectors(encoder, texts, pooling="all_tokens"):
    """Eight sentences at a time, by id and mask."""
    distinct = sorted(set(texts))
    filled = distinct + distinct[:1] * (8 - len(distinct))
    ids, mask = text_lib.encode(encoder.tokenizer, filled, LENGTH)
    variables = jax.tree.map(jnp.asarray, {"params": {"pretrained": encoder.params}})
    apply = compiled(encoder.module, pooling)
    vectors = np.asarray(apply(variables, jnp.asarray(ids), jnp.asarray(mask)))
    return np.stack([vectors[distinct.index(text)] for text in texts])


def test_the_identity_changes_with_weights_and_tokenizer(folders, encoders, tmp_path):
    def biased(variables):
        return jax.tree.map(lambda x: x + np.float32(1), variables)

    path = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    _, variables = model_folder.read(path)
    found = [encoders["bert"].identity, text_encoders.open_text_encoder(path, "bert").identity]
    rewrite(path, variables=biased(variables))
    found.append(text_encoders.open_text_encoder(path, "bert").identity)
    tokenizer = json.loads((path / model_folder.TOKENIZER).read_text())
    rewrite(path, tokenizer=json.dumps(tokenizer))
    found.append(text_encoders.open_text_encoder(path, "bert").identity)
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_the_text_tower_of_a_clip_is_opened_alone(encoders, folders):
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
def test_without_a_tower_the_command_that_makes_one_is_named(path):
    with pytest.raises(UserError, match=rf"convert bert SOURCE {path or 'FOLDER'}$"):
        text_encoders.open_text_encoder(path, "bert")


@pytest.mark.parametrize(("kind", "other"), [("bert", "clip"), ("clip", "bert")])
def test_a_tower_of_another_kind_is_refused(folders, kind, other):
    with pytest.raises(UserError, match=f"holds a {kind}, model.text.encoder is '{other}'"):
        text_encoders.open_text_encoder(folders[kind], other)


def test_a_run_s_model_is_no_tower(tmp_path):
    variables = {"params": {"x": np.zeros(1)}}
    model_folder.write(tmp_path, config={"model": {}}, variables=variables, tokenizer="{}", card="")
    with pytest.raises(UserError, match=r"holds a biclip, model\.text\.encoder is 'bert'"):
        text_encoders.open_text_encoder(tmp_path, "bert")


def rewrite(path, fields=None, **changes):
    """Writes a folder anew with these fields of its model, or what `folder.write` takes."""
    found, variables = model_folder.read(path)
    config = {**found, "model": found["model"] | (fields or {})}
    tokenizer = (path / model_folder.TOKENIZER).read_text(encoding="utf-8")
    parts = {"variables": variables, "tokenizer": tokenizer, "card": "", **changes}
    model_folder.write(path, config=config, **parts)


def cut_weights(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def lose_a_parameter(path):
    _, variables = model_folder.read(path)
    del variables["params"]["blocks_1"]["norm_0"]["bias"]
    rewrite(path, variables=variables)


def load_with_a_word(path):
    tokenizer = tokenizers.load_tokenizer(path / "tokenizer")
    tokenizer.add_tokens(["zygote"])
    return tokenizer


def add_a_word(path):
    rewrite(path, tokenizer=load_with_a_word(path).to_str())


def exchange_the_tokenizer(path):
    load_with_a_word(path).save(str(path / model_folder.TOKENIZER))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_weights, "its SHA-256 is not the one in config.json"),
        (lose_a_parameter, "params/blocks_1/norm_0/bias has shape none"),
        (add_a_word, "tokenizer's largest id is 16, the weights have 16 words; give the tokenizer"),
        (exchange_the_tokenizer, r"tokenizer\.json: its SHA-256 is not the one in config\.json"),
        (lambda path: rewrite(path, {"num_heads": 5}), r"config\.json: does not describe a model"),
        (lambda path: rewrite(path, {"width": "wide"}), r"config\.json: does not describe a model"),
        (lambda path: rewrite(path, {"width": 24}), "has shape"),
        (lambda path: shutil.rmtree(path / "tokenizer"), "tokenizer.json"),
        (lambda path: (path / "config.json").write_text("{"), "no model folder"),
    ],
)
def test_a_damaged_tower_is_refused(folders, tmp_path, harm, said):
    path = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    harm(path)
    with pytest.raises(UserError, match=said):
        text_encoders.open_text_encoder(path, "bert")
    with pytest.raises(UserError, match=said):
        inference.load_model(path)


def test_a_config_without_a_model_describes_none(folders, tmp_path):
    path = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "model": None}))
    for open_it in (
        lambda: text_encoders.open_text_encoder(path, "bert"),
        lambda: inference.load_model(path),
    ):
        with pytest.raises(UserError, match=r"config\.json: does not describe a model \(Type"):
            open_it()


def test_more_words_in_the_weights_than_in_the_tokenizer_are_fine(encoders):
    tokenizer = encoders["bert"].tokenizer
    text_encoders.check_vocabulary(Path("there"), tokenizer, 16)
    text_encoders.check_vocabulary(Path("there"), tokenizer, 99)
    said = r"^there: the tokenizer's largest id is 15, the weights have 15 words"
    with pytest.raises(UserError, match=said):
        text_encoders.check_vocabulary(Path("there"), tokenizer, 15)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 14), ("clip", 10)])
def test_sentences_longer_than_the_tower_s_positions_are_refused(encoders, kind, longest):
    encoder = encoders[kind]
    text_encoders.check_text_encoder(encoder, config(max_length=longest))
    said = rf"model\.text\.max_length: {longest + 1}; .*has {longest} positions; set at most that"
    for call in (
        text_encoders.check_text_encoder,
        lambda encoder, asked: text_encoders.encode_splits(asked, TEXTS, encoder),
    ):
        with pytest.raises(UserError, match=said) as caught:
            call(encoder, config(max_length=longest + 1))
        assert str(encoder.folder) in str(caught.value)


@pytest.mark.parametrize("trainable", [False, True])
def test_pooling_over_hidden_state_2_needs_two_layers(encoders, trainable):
    encoder = encoders["bert"]
    one = encoder._replace(module=encoder.module.clone(num_layers=1))
    for pooling in set(POOLINGS) - {"embedding"}:
        asked = config(pooling=pooling, trainable=trainable)
        with pytest.raises(
            UserError, match=rf"pooling: '{pooling}' needs hidden state 2.* 1 layer"
        ):
            text_encoders.encode_splits(asked, TEXTS, one)
        text_encoders.check_text_encoder(
            encoder._replace(module=encoder.module.clone(num_layers=2)), asked
        )
    text_encoders.check_text_encoder(one, config(pooling="embedding", trainable=trainable))


@pytest.mark.parametrize("kind", ["bert", pytest.param("clip", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_frozen_tower_s_vectors_are_those_of_the_ids(encoders, kind, pooling):
    encoder, texts = encoders[kind], ["left lung.", "a", "right upper lung."]
    if kind == "clip":
        texts = ["left", "lung", "left lung"]
    features = text_encoders.frozen_text_features(encoder, config(pooling=pooling), texts)
    expected = expected_vectors(encoder, texts, pooling)
    assert features.keys() == set(texts)
    for text, vector in zip(texts, expected, strict=True):
        np.testing.assert_allclose(features[text], vector, atol=1e-5)


def test_frozen_fields_are_in_the_order_of_the_sentences(encoders, encoded):
    encoder, lines = encoders["bert"], list[str]()
    found = text_encoders.encode_splits(config(), TEXTS, encoder, log=lines.append)
    assert found.tokenizer is encoder.tokenizer
    assert found.encoder_sha256 == encoder.identity
    distinct = {text for split in TEXTS.values() for text in split}
    distinct |= {text_lib.swap_sides(text) for text in distinct}
    seen = [text for call in encoded for text in call]
    assert sorted(seen) == sorted(distinct)
    assert len(lines) == 1
    assert f"{len(distinct)} distinct sentences" in lines[0]
    for split, texts in TEXTS.items():
        fields = found.fields[split]
        names = {"text_features", "has_text"}
        assert set(fields) == names | {f"swapped_{name}" for name in names}
        assert fields["has_text"].all()
        swapped = [text_lib.swap_sides(text) for text in texts]
        rows, other = expected_vectors(encoder, texts), expected_vectors(encoder, swapped)
        np.testing.assert_allclose(fields["text_features"], rows, atol=1e-5)
        np.testing.assert_allclose(fields["swapped_text_features"], other, atol=1e-5)
    train = found.fields["train"]
    assert np.abs(train["text_features"] - train["swapped_text_features"]).max() > 1e-4


def test_vectors_are_kept_by_all_that_they_depend_on(encoders, tmp_path, monkeypatch):
    calls, encoder = [], encoders["bert"]

    def vectors(pooled, *_):
        def encode(texts):
            calls.append(pooled.pooling)
            return np.arange(2.0 * len(texts)).reshape(-1, 2)

        return encode

    monkeypatch.setattr(text_encoders, "_feature_function", vectors)
    first = text_encoders.encode_splits(config(), TEXTS, encoder, tmp_path)
    again = text_encoders.encode_splits(config(), TEXTS, encoder, tmp_path)
    assert calls == ["all_tokens"]
    jax.tree.map(np.testing.assert_array_equal, first.fields, again.fields)
    for changed, other in (
        (config(pooling="masked"), encoder),
        (config(max_length=LENGTH + 1), encoder),
        (config(), encoder._replace(module=encoder.module.clone(dtype=jnp.bfloat16))),
        (config(), encoder._replace(identity="0")),
    ):
        text_encoders.encode_splits(changed, TEXTS, other, tmp_path)
    assert len(calls) == len(list(tmp_path.iterdir())) == 5


def test_a_tower_that_is_trained_gets_ids(encoders, encoded):
    found = text_encoders.encode_splits(config(trainable=True), TEXTS, encoders["bert"])
    assert found.encoder_sha256 == encoders["bert"].identity
    assert encoded == []
    for split, texts in TEXTS.items():
        fields = found.fields[split]
        ids, mask = text_lib.encode(encoders["bert"].tokenizer, texts, LENGTH)
        np.testing.assert_array_equal(fields["text_ids"], ids)
        np.testing.assert_array_equal(fields["text_mask"], mask)
        names = {"text_ids", "text_mask", "has_text"}
        assert set(fields) == names | {f"swapped_{name}" for name in names}


def test_without_a_tower_the_words_are_those_of_the_training_sentences():
    found = text_encoders.encode_splits(config(), TEXTS, None)
    assert found.encoder_sha256 == ""
    words = {"left", "right", "lung", "upper", "infection", ",", "."}
    assert set(found.tokenizer.get_vocab()) == words | {"[PAD]", "[UNK]", "[CLS]"}
    assert found.fields["val"]["text_ids"].shape == (2, LENGTH)
    unknown = found.tokenizer.token_to_id("[UNK]")
    assert found.fields["val"]["text_ids"][0, 1] == unknown


@pytest.fixture(scope="module")
def network(encoders):
    """(model, variables, processor) with the tiny CXR-BERT inside."""
    encoder = encoders["bert"]
    fields = tiny.model_config(text={"encoder": "bert", **config()})
    model = biclip.build(fields, pretrained_text_encoder=encoder.module)
    variables = {
        "params": {"text_encoder": {"pretrained": encoder.params}, "unet": {"x": np.ones(2)}}
    }
    return model, variables, inference.Processor(encoder.tokenizer, tiny.IMAGE_SIZE, LENGTH)


def test_the_encoder_sees_each_distinct_sentence_once(network, encoders, encoded):
    encode = text_encoders.make_encode(*network)
    calls = [["a", "left lung.", "a"], ["left lung."], ["right lung.", "a"], ["a"] * 40]
    for texts in calls:
        vectors = encode(texts)["text_features"]
        np.testing.assert_allclose(vectors, expected_vectors(encoders["bert"], texts), atol=1e-5)
    assert encoded == [["a", "left lung."], ["right lung."]]
    assert set(encode(["a"])) == {"text_features", "has_text"}


def test_a_sentence_that_is_cut_is_told_of_once(network):
    encode, long = text_encoders.make_encode(*network), "left lung, " * 9
    with pytest.warns(UserWarning, match=f"longer than {LENGTH} tokens"):
        encode([long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode([long, "a"])


def test_without_the_tower_its_parameters_alone_are_gone(network):
    model, variables, _ = network
    variables = variables | {"batch_stats": {"x": np.zeros(1)}}
    kept = text_encoders.without_text_encoder(model, variables)
    assert set(kept["params"]) == {"unet"}
    assert kept["batch_stats"] is variables["batch_stats"]
    assert "text_encoder" in variables["params"]


def test_the_scratch_encoder_stays_and_gets_ids(network):
    _, variables, processor = network
    model = tiny.model()
    assert text_encoders.without_text_encoder(model, variables) == variables
    fields = text_encoders.make_encode(model, variables, processor)(["left lung.", "a"])
    assert fields["text_ids"].shape == (2, LENGTH)
    assert set(fields) == {"text_ids", "text_mask", "has_text"}


def test_weights_for_the_scratch_encoder_are_refused():
    config = {"encoder": "scratch", "weights": "weights/cxr_bert"}
    with pytest.raises(UserError, match=r"model\.text\.encoder is 'scratch'"):
        text_encoders.open_configured(config, "float32")
    assert text_encoders.open_configured({**config, "weights": ""}, "float32") is None
