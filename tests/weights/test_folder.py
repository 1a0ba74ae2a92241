"""Model folders: round trip, damage, wrong files."""

import json

import numpy as np
import pytest

from biclip_jax.errors import UserError
from biclip_jax.weights import folder

VARIABLES = {
    "params": {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.float32(2)},
    "batch_stats": {"a": {"mean": np.zeros(3, np.float32)}},
}
SCORES = {"validation": {"dice_global": 0.875, "num_images": 4}}
CONFIG = {"model": {"image_size": 56}, "vocab_size": 5, "name": "demo", "data": "synthetic"}


@pytest.fixture
def written(tmp_path):
    folder.write(
        tmp_path / "model",
        config={**CONFIG, "step": 3},
        variables=VARIABLES,
        card=folder.model_card({**CONFIG, "step": 3}, SCORES),
        scores=SCORES,
    )
    return tmp_path / "model"


def test_what_is_written_comes_back(written):
    config, variables = folder.read(written)
    assert config.items() >= CONFIG.items()
    assert variables["params"]["a"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(variables["params"]["a"]["kernel"], [[0, 1, 2], [3, 4, 5]])
    assert variables["params"]["b"].shape == ()
    np.testing.assert_array_equal(variables["batch_stats"]["a"]["mean"], np.zeros(3))


def test_the_card_names_scores_and_limits(written):
    card = (written / "README.md").read_text()
    assert "validation dice_global: 0.8750" in card
    assert "Not a medical device" in card
    assert json.loads((written / "metrics.json").read_text())["validation"]["num_images"] == 4
    assert not list(written.glob("*.tmp"))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: flip_a_byte(p / "model.safetensors"), "SHA-256"),
        (lambda p: (p / "model.safetensors").unlink(), "cannot be read"),
        (lambda p: (p / "config.json").unlink(), "no model folder"),
        (lambda p: (p / "config.json").write_text("{"), "no model folder"),
        (lambda p: (p / "config.json").write_text("[]"), "not of the format"),
        (lambda p: (p / "config.json").write_text('{"format": "other"}'), "not of the format"),
    ],
)
def test_harm_is_named(written, harm, said):
    harm(written)
    with pytest.raises(UserError, match=said):
        folder.read(written)


def test_a_file_that_is_no_safetensors_is_named(written):
    junk = b"\xff" * 64
    (written / "model.safetensors").write_bytes(junk)
    config = json.loads((written / "config.json").read_text())
    config["sha256"] = folder.hashlib.sha256(junk).hexdigest()
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected a safetensors file"):
        folder.read(written)
