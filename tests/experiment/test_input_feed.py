"""Batches from a split on the device: same run as with streamed batches; split too large."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from biclip_jax import train
from biclip_jax.core import config as config_lib
from biclip_jax.core import distributed
from biclip_jax.core.errors import UserError
from biclip_jax.experiment import input_feed
from biclip_jax.training import writers


def metrics_of(workdir):
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def with_sgd(config):
    """Switches to SGD: Adam would amplify rounding errors to full steps."""
    config.optim.name, config.optim.learning_rate, config.final_test = "sgd", 0.05, False
    return config


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Work directory of a run with streamed batches."""
    base = tmp_path_factory.mktemp("streamed")
    config = config_lib.load_config("default:smoke", [f"--config.data.cache_dir={base / 'cache'}"])
    train.train_and_evaluate(with_sgd(config), base / "run")
    return base / "run"


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", [1, 3])  # 3 of the 4 steps between evaluations
def test_data_on_device_gives_the_streamed_run(
    smoke_config, streamed, tmp_path, monkeypatch, capsys, steps_per_call
):
    with_sgd(smoke_config)
    smoke_config.data.on_device, smoke_config.data.steps_per_call = True, steps_per_call
    # On CPU each call takes one step; pretend to be a GPU to test several.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    assert "32 training records on the device" in capsys.readouterr().out
    rows = zip(metrics_of(tmp_path / "run"), metrics_of(streamed), strict=True)
    for row, expected_row in rows:
        assert row.keys() == expected_row.keys()
        for name in row.keys() - {"split"}:
            np.testing.assert_allclose(row[name], expected_row[name], 1e-3, 1e-3, err_msg=name)
    expected, weights = (
        load_file(w / "model/model.safetensors") for w in (streamed, tmp_path / "run")
    )
    for name, value in expected.items():
        # RMS over the tensor: single weights whose gradient is mostly noise differ more.
        rms = np.sqrt(np.mean((weights[name] - value) ** 2))
        assert rms < 1e-3, f"{name}: RMS difference {rms}"


def test_rejects_a_split_that_does_not_fit_on_the_device(monkeypatch):
    monkeypatch.setattr(distributed, "free_bytes", lambda: 1_000_000)
    data = {"image": np.zeros((3, 1000, 1000, 1), np.uint8)}
    with pytest.raises(UserError, match=r"data.on_device: .* needs 3 MB, but the device has 1 MB"):
        input_feed._on_device(None, data, None, 0)
