"""Cached text features: encoded once, stored on disk, recomputed if the file is damaged."""

import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from biclip_jax.core.errors import UserError
from biclip_jax.encoders import text_features

WEIGHTS = {"weights": "abc", "max_length": 5}


class RecordingEncoder:
    """Encodes a prompt as (length, first letter) and records the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return np.array([[len(text), ord(text[0])] for text in texts], np.float64)

    @property
    def prompts(self):
        return [text for call in self.calls for text in call]


def encode(prompts, folder=None, identity=WEIGHTS):
    """Returns (features, encoder)."""
    encoder = RecordingEncoder()
    return text_features.encode_prompts(prompts, encoder, identity=identity, folder=folder), encoder


def files(folder):
    return sorted(folder.iterdir())


@pytest.mark.parametrize("count", [1, 32, 33, 70])
def test_each_distinct_prompt_is_encoded_once_in_batches(count):
    distinct = [f"{chr(97 + i % 26)}{'x' * i}" for i in range(count)]
    features, encoder = encode(distinct[::-1] + distinct)
    assert sorted(encoder.prompts) == sorted(distinct)
    sizes = [len(call) for call in encoder.calls]
    assert sizes == [text_features.BATCH_SIZE] * (count // 32) + [count % 32] * (count % 32 > 0)
    assert features.keys() == set(distinct)
    for prompt, vector in features.items():
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, [len(prompt), ord(prompt[0])])


def test_no_prompts_give_no_features(tmp_path):
    features, encoder = encode([], tmp_path)
    assert (features, encoder.calls, files(tmp_path)) == ({}, [], [])


def test_a_second_call_reads_the_cache(tmp_path):
    first, _ = encode(["b", "ac"], tmp_path)
    second, encoder = encode(iter(["ac", "b", "ac"]), tmp_path)
    assert encoder.calls == []
    assert first.keys() == second.keys()
    for prompt in first:
        np.testing.assert_array_equal(first[prompt], second[prompt])
    (file,) = files(tmp_path)
    assert file.name.startswith("text_features-")
    assert file.suffix == ".safetensors"


def test_each_identity_and_prompt_list_has_its_own_file(tmp_path):
    variants = [
        (["a"], WEIGHTS),
        (["a", "b"], WEIGHTS),
        (["a"], WEIGHTS | {"max_length": 6}),
        (["a"], None),
    ]
    for count, (prompts, identity) in enumerate(variants, 1):
        _, encoder = encode(prompts, tmp_path, identity)
        assert len(encoder.calls) == 1
        assert len(files(tmp_path)) == count


def test_each_format_has_its_own_file(tmp_path, monkeypatch):
    encode(["a"], tmp_path)
    monkeypatch.setattr(text_features, "FORMAT", text_features.FORMAT + 1)
    encode(["a"], tmp_path)
    assert len(files(tmp_path)) == 2


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def stored(array, metadata):
    return lambda path: save_file({"features": array}, path, metadata)


TWO = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    "tamper",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no safetensors"),
        lambda path: save_file({"other": TWO}, path, {"sha256": "0"}),
        stored(TWO, None),
        stored(TWO, {"made by": "another"}),
        stored(TWO, {"sha256": "0"}),
        stored(TWO[:1], {"sha256": text_features.hashlib.sha256(TWO[:1].tobytes()).hexdigest()}),
    ],
    ids=[
        "a bit",
        "truncated",
        "empty",
        "text",
        "another name",
        "no metadata",
        "other metadata",
        "another hash",
        "too few",
    ],
)
def test_a_damaged_or_foreign_file_is_recomputed_and_replaced(tmp_path, tamper):
    encode(["b", "ac"], tmp_path)
    (path,) = files(tmp_path)
    intact = path.read_bytes()
    tamper(path)
    assert path.read_bytes() != intact
    features, encoder = encode(["b", "ac"], tmp_path)
    assert encoder.prompts == ["ac", "b"]
    np.testing.assert_array_equal(features["ac"], [2, ord("a")])
    assert files(tmp_path) == [path]
    assert path.read_bytes() == intact


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_file_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        encode(["a"], tmp_path)
    finally:
        os.umask(before)
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("error", [OSError("Read-only file system"), UserError("free disk space")])
def test_warns_if_the_features_cannot_be_cached(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(text_features.model_folder, "write_tensors", refuse)
    with pytest.warns(UserWarning, match=rf"text features are not cached \({error}\)"):
        features, encoder = encode(["b", "ac"], tmp_path)
    assert encoder.prompts == ["ac", "b"]
    np.testing.assert_array_equal(features["ac"], [2, ord("a")])
    assert files(tmp_path) == []


def test_warns_if_the_folder_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="text features are not cached"):
        features, _ = encode(["a"], tmp_path / "file/nowhere")
    assert features.keys() == {"a"}


def test_creates_a_missing_folder(tmp_path):
    encode(["a"], tmp_path / "new")
    assert len(files(tmp_path / "new")) == 1


def test_a_failing_encoder_leaves_no_file(tmp_path):
    def fails(texts):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        text_features.encode_prompts(["a"], fails, identity=WEIGHTS, folder=tmp_path)
    assert files(tmp_path) == []
