"""Batches out of a split on the device: the run of the streamed ones, and what does not fit."""

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


def by_sgd(config):
    """Adam would take the sign of a rounding error as it takes a gradient's."""
    config.optim.name, config.optim.learning_rate, config.final_test = "sgd", 0.05, False
    return config


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """The work directory of a run that is sent its batches."""
    base = tmp_path_factory.mktemp("streamed")
    config = config_lib.load_config("default:smoke", [f"--config.data.cache_dir={base / 'cache'}"])
    train.train_and_evaluate(by_sgd(config), base / "run")
    return base / "run"


@pytest.mark.slow
@pytest.mark.parametrize("num_at_once", [1, 3])  # 3 of the 4 between evaluations
def test_a_resident_run_is_the_streamed_one(
    smoke_config, streamed, tmp_path, monkeypatch, capsys, num_at_once
):
    by_sgd(smoke_config)
    smoke_config.data.on_device, smoke_config.data.steps_per_call = True, num_at_once
    # A CPU takes one step at once; the program of several is the same elsewhere.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    assert "32 training records stay on the device" in capsys.readouterr().out
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(streamed), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"split"}:
            np.testing.assert_allclose(ours[name], theirs[name], 1e-3, 1e-3, err_msg=name)
    expected, found = (
        load_file(w / "model/model.safetensors") for w in (streamed, tmp_path / "run")
    )
    for name, value in expected.items():
        # Of the whole tensor: single weights whose gradient is noise move by it.
        apart = np.sqrt(np.mean((found[name] - value) ** 2))
        assert apart < 1e-3, f"{name}: {apart} apart"


def test_a_split_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "free_bytes", lambda: 1_000_000)
    data = {"image": np.zeros((3, 1000, 1000, 1), np.uint8)}
    with pytest.raises(UserError, match=r"data.on_device: .* takes 3 MB, and the device has 1 MB"):
        input_feed._on_device(None, data, None, 0)
