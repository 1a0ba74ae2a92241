"""Model folders: round trip, damaged and invalid files, hard links."""

import errno
import hashlib
import json
import os
import stat

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from biclip_jax.core.errors import UserError
from biclip_jax.weights import model_folder

VARIABLES = {
    "params": {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.float32(2)},
    "batch_stats": {"a": {"mean": np.zeros(3, np.float32)}},
}
TOKENIZER = '{"words": ["left", "lüng"]}'
SCORES = {"validation": {"dice_global": 0.875, "num_images": 4}}
CONFIG = {"model": {"image_size": 56}, "vocab_size": 5, "name": "demo", "data": "synthetic"}


@pytest.fixture
def written(tmp_path):
    model_folder.write(
        tmp_path / "model",
        config={**CONFIG, "step": 3},
        variables=VARIABLES,
        tokenizer=TOKENIZER,
        card=model_folder.model_card({**CONFIG, "step": 3}, SCORES),
        scores=SCORES,
    )
    return tmp_path / "model"


def test_round_trip(written):
    config, variables = model_folder.read(written)
    assert config.items() >= CONFIG.items()
    assert variables["params"]["a"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(variables["params"]["a"]["kernel"], [[0, 1, 2], [3, 4, 5]])
    assert variables["params"]["b"].shape == ()
    np.testing.assert_array_equal(variables["batch_stats"]["a"]["mean"], np.zeros(3))


def test_model_card_has_scores_and_intended_use(written):
    card = (written / "README.md").read_text()
    assert "validation dice_global: 0.8750" in card
    assert "Not a medical device" in card
    assert json.loads((written / "metrics.json").read_text())["validation"]["num_images"] == 4
    assert not list(written.rglob("*.part"))


def test_config_has_both_hashes_and_the_identity_covers_both(written):
    config = model_folder.read_config(written)
    assert config["format"] == model_folder.FORMAT == "biclip_jax.model/3"
    assert (written / model_folder.TOKENIZER).read_text(encoding="utf-8") == TOKENIZER
    for name, field in (
        (model_folder.WEIGHTS, "sha256"),
        (model_folder.TOKENIZER, "tokenizer_sha256"),
    ):
        assert config[field] == hashlib.sha256((written / name).read_bytes()).hexdigest()
    others = [config | {"sha256": "0"}, config | {"tokenizer_sha256": "0"}]
    assert len({model_folder.identity(candidate) for candidate in (config, *others)}) == 3
    assert model_folder.identity(config | {"name": "another"}) == model_folder.identity(config)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewrite(path, **changes):
    """Changes fields of config.json; None removes a field."""
    config = json.loads((path / "config.json").read_text()) | changes
    remaining = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(remaining))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda p: flip_a_byte(p / "model.safetensors"), "SHA-256"),
        (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors: cannot be read"),
        (lambda p: flip_a_byte(p / "tokenizer/tokenizer.json"), r"tokenizer\.json: its SHA-256"),
        (lambda p: (p / "tokenizer/tokenizer.json").unlink(), r"tokenizer\.json: cannot be read"),
        (lambda p: rewrite(p, format="biclip_jax.model/1"), "not of the format"),
        (lambda p: rewrite(p, tokenizer_sha256=None), "not of the format"),
        (lambda p: rewrite(p, sha256=None), "not of the format"),
        (lambda p: (p / "config.json").unlink(), "not a model folder"),
        (lambda p: (p / "config.json").write_text("{"), "not a model folder"),
        (lambda p: (p / "config.json").write_text("[]"), "not of the format"),
        (
            lambda p: (p / "config.json").write_text('{"num_steps": 9}'),
            "a run without a saved model",
        ),
        (lambda p: (p / "config.json").write_text('{"format": "other"}'), "not of the format"),
    ],
)
def test_error_names_the_damaged_file(written, corrupt, message):
    corrupt(written)
    with pytest.raises(UserError, match=message):
        model_folder.read(written)


def test_rejects_weights_that_are_not_safetensors(written):
    junk = b"\xff" * 64
    (written / "model.safetensors").write_bytes(junk)
    rewrite(written, sha256=hashlib.sha256(junk).hexdigest())
    with pytest.raises(UserError, match="expected a safetensors file"):
        model_folder.read(written)


@pytest.fixture
def other(tmp_path):
    """A model folder with different weights and another card."""
    variables = {"params": {"b": np.float32(3)}}
    model_folder.write(
        tmp_path / "other", config=CONFIG, variables=variables, tokenizer="{}", card="other"
    )
    return tmp_path / "other"


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_linked_folder_shares_its_files(written, tmp_path):
    inside = tmp_path / "run/text_encoder"
    model_folder.link_folder(written, inside)
    assert contents(inside) == contents(written)
    for name in contents(written):
        assert os.path.samefile(written / name, inside / name)
    assert [p.name for p in inside.parent.iterdir()] == ["text_encoder"]


def test_linking_replaces_other_weights_and_keeps_the_same(written, other, tmp_path):
    inside = tmp_path / "inside"
    model_folder.link_folder(other, inside)
    (inside / "stale.txt").write_text("of the other")
    model_folder.link_folder(written, inside)
    assert contents(inside) == contents(written)
    (inside / "README.md").unlink()
    (inside / "notes.txt").write_text("mine")
    model_folder.link_folder(written, inside)
    assert (inside / "notes.txt").read_text() == "mine"
    assert not (inside / "README.md").exists()
    assert contents(other)[model_folder.Path("README.md")] == b"other"


def test_linking_replaces_the_same_weights_with_another_tokenizer(written, tmp_path):
    inside = tmp_path / "inside"
    model_folder.link_folder(written, inside)
    model_folder.write(written, config=CONFIG, variables=VARIABLES, tokenizer="{}", card="")
    assert (inside / model_folder.TOKENIZER).read_text(encoding="utf-8") == TOKENIZER
    model_folder.link_folder(written, inside)
    assert (inside / model_folder.TOKENIZER).read_text() == "{}"


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda p: (p / "config.json").unlink(),
        lambda p: (p / "config.json").write_text("{"),
        lambda p: rewrite(p, sha256=None),
        lambda p: rewrite(p, format="biclip_jax.model/1"),
    ],
)
def test_linking_replaces_a_damaged_folder(written, other, tmp_path, corrupt):
    model_folder.write(
        tmp_path / "inside", config=CONFIG, variables=VARIABLES, tokenizer=TOKENIZER, card=""
    )
    corrupt(tmp_path / "inside")
    model_folder.link_folder(written, tmp_path / "inside")
    assert contents(tmp_path / "inside") == contents(written)
    assert not list(tmp_path.glob("*.tmp"))


def test_files_are_copied_if_hard_links_fail(written, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(model_folder.os, "link", refuse)
    model_folder.link_folder(written, tmp_path / "inside")
    assert contents(tmp_path / "inside") == contents(written)
    name = model_folder.WEIGHTS
    assert not os.path.samefile(written / name, tmp_path / "inside" / name)
    assert not list(tmp_path.glob("*.tmp"))


def test_raises_if_neither_links_nor_copies_are_possible(written, other, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(other)
    monkeypatch.setattr(model_folder.os, "link", refuse)
    monkeypatch.setattr(model_folder.shutil, "copy2", refuse)
    with pytest.raises(OSError, match="No space left"):
        model_folder.link_folder(written, other)
    assert contents(other) == before


def test_removes_the_remains_of_an_interrupted_link(written, tmp_path):
    (tmp_path / "inside.tmp").mkdir()
    (tmp_path / "inside.tmp/half").write_text("half")
    model_folder.link_folder(written, tmp_path / "inside")
    assert contents(tmp_path / "inside") == contents(written)
    assert not (tmp_path / "inside.tmp").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_of_weights_follow_the_umask(tmp_path, umask, mode):
    path, tensors = tmp_path / "t.safetensors", {"a": np.arange(3.0)}
    before = os.umask(umask)
    try:
        digest = model_folder.write_tensors(path, tensors, {"note": "x"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(load_file(path)["a"], [0, 1, 2])
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    model_folder.write_tensors(path, {"a": np.zeros(3, np.float32)})
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_folder.os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        model_folder.write_tensors(path, {"a": np.ones(9, np.float32)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_user_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    model_folder.write_tensors(path, {"a": np.zeros(3, np.float32)})
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match=r"t\.safetensors: .*No space left.*free disk space"):
        model_folder.write_tensors(path, {"a": np.ones(9, np.float32)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [AttributeError("x"), KeyError("width"), TypeError(), ValueError("a\nb"), ZeroDivisionError()],
)
def test_an_invalid_model_config_is_a_one_line_error(tmp_path, error):
    with pytest.raises(UserError) as caught, model_folder.config_errors(tmp_path):
        raise error
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: does not describe a model (")
    assert type(error).__name__ in message
    assert "\n" not in message


def test_config_errors_keeps_user_errors(tmp_path):
    with (
        pytest.raises(UserError, match=r"^original message$"),
        model_folder.config_errors(tmp_path),
    ):
        raise UserError("original message")


def test_variables_may_be_flat(written, tmp_path):
    flat = model_folder.flatten_dict(VARIABLES, sep="/")
    model_folder.write(
        tmp_path / "flat", config=CONFIG, variables=flat, tokenizer=TOKENIZER, card=""
    )
    assert (
        contents(tmp_path / "flat")[model_folder.Path(model_folder.WEIGHTS)]
        == (contents(written)[model_folder.Path(model_folder.WEIGHTS)])
    )


SHAPES = {"params/a/kernel": (2, 3), "params/b": (), "batch_stats/a/mean": (3,)}


def test_check_shapes_accepts_variables_of_the_model(written):
    model_folder.check_shapes(written, VARIABLES, SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params/a/kernel": (3, 2)}, r"a/kernel has shape \(2, 3\), the model .* \(3, 2\)"),
        ({"params/c": (4,)}, r"params/c has shape none, the model .* expects \(4,\)"),
        ({"params/b": None}, r"params/b has shape \(\), the model .* expects none"),
        ({"params/b": (1,)}, r"params/b has shape \(\), the model .* expects \(1,\)"),
    ],
)
def test_check_shapes_names_variables_of_another_model(written, change, message):
    expected = {k: v for k, v in (SHAPES | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        model_folder.check_shapes(written, VARIABLES, expected)
