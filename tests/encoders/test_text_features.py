"""Vectors of distinct sentences: encoded once, kept on disk, and never believed when damaged."""

import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from biclip_jax.core.errors import UserError
from biclip_jax.encoders import text_features

WEIGHTS = {"weights": "abc", "max_length": 5}


class Counting:
    """A tower that gives (length, first letter) and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return np.array([[len(text), ord(text[0])] for text in texts], np.float64)

    @property
    def seen(self):
        return [text for call in self.calls for text in call]


def of(prompts, folder=None, identity=WEIGHTS):
    """(features, tower)"""
    encoder = Counting()
    return text_features.encode_prompts(prompts, encoder, identity=identity, folder=folder), encoder


def files(folder):
    return sorted(folder.iterdir())


@pytest.mark.parametrize("count", [1, 32, 33, 70])
def test_each_distinct_sentence_is_encoded_once_in_batches(count):
    distinct = [f"{chr(97 + i % 26)}{'x' * i}" for i in range(count)]
    features, encoder = of(distinct[::-1] + distinct)
    assert sorted(encoder.seen) == sorted(distinct)
    sizes = [len(call) for call in encoder.calls]
    assert sizes == [text_features.BATCH_SIZE] * (count // 32) + [count % 32] * (count % 32 > 0)
    assert features.keys() == set(distinct)
    for prompt, vector in features.items():
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, [len(prompt), ord(prompt[0])])


def test_no_sentences_are_no_features(tmp_path):
    features, encoder = of([], tmp_path)
    assert (features, encoder.calls, files(tmp_path)) == ({}, [], [])


def test_a_second_call_reads_and_encodes_nothing(tmp_path):
    first, _ = of(["b", "ac"], tmp_path)
    second, encoder = of(iter(["ac", "b", "ac"]), tmp_path)
    assert encoder.calls == []
    assert first.keys() == second.keys()
    for prompt in first:
        np.testing.assert_array_equal(first[prompt], second[prompt])
    (file,) = files(tmp_path)
    assert file.name.startswith("text_features-")
    assert file.suffix == ".safetensors"


def test_another_tower_or_other_sentences_are_another_file(tmp_path):
    variants = [
        (["a"], WEIGHTS),
        (["a", "b"], WEIGHTS),
        (["a"], WEIGHTS | {"max_length": 6}),
        (["a"], None),
    ]
    for count, (prompts, identity) in enumerate(variants, 1):
        _, encoder = of(prompts, tmp_path, identity)
        assert len(encoder.calls) == 1
        assert len(files(tmp_path)) == count


def test_another_format_is_another_file(tmp_path, monkeypatch):
    of(["a"], tmp_path)
    monkeypatch.setattr(text_features, "FORMAT", text_features.FORMAT + 1)
    of(["a"], tmp_path)
    assert len(files(tmp_path)) == 2


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def stored(array, metadata):
    return lambda path: save_file({"features": array}, path, metadata)


TWO = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    "harm",
    [
        flipped,
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
def test_a_damaged_or_foreign_file_is_computed_anew_and_replaced(tmp_path, harm):
    of(["b", "ac"], tmp_path)
    (path,) = files(tmp_path)
    intact = path.read_bytes()
    harm(path)
    assert path.read_bytes() != intact
    features, encoder = of(["b", "ac"], tmp_path)
    assert encoder.seen == ["ac", "b"]
    np.testing.assert_array_equal(features["ac"], [2, ord("a")])
    assert files(tmp_path) == [path]
    assert path.read_bytes() == intact


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_file_is_as_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        of(["a"], tmp_path)
    finally:
        os.umask(before)
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("error", [OSError("Read-only file system"), UserError("make room")])
def test_a_folder_that_takes_nothing_is_told_of_and_the_vectors_are_there(
    tmp_path, monkeypatch, error
):
    def refuse(*_):
        raise error

    monkeypatch.setattr(text_features.model_folder, "write_tensors", refuse)
    with pytest.warns(UserWarning, match=rf"vectors are not kept \({error}\)"):
        features, encoder = of(["b", "ac"], tmp_path)
    assert encoder.seen == ["ac", "b"]
    np.testing.assert_array_equal(features["ac"], [2, ord("a")])
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="vectors are not kept"):
        features, _ = of(["a"], tmp_path / "file/nowhere")
    assert features.keys() == {"a"}


def test_a_folder_that_is_not_there_is_made(tmp_path):
    of(["a"], tmp_path / "new")
    assert len(files(tmp_path / "new")) == 1


def test_a_tower_that_fails_leaves_nothing(tmp_path):
    def fails(texts):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        text_features.encode_prompts(["a"], fails, identity=WEIGHTS, folder=tmp_path)
    assert files(tmp_path) == []
