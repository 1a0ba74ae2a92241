"""Batches out of a split on the device: the run of the streamed ones, and what does not fit."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from biclip_jax import feeding, parallel, train
from biclip_jax.errors import UserError
from biclip_jax.training import writers


def metrics_of(workdir):
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 3])  # 3 of the 4 between evaluations
def test_a_resident_run_is_the_streamed_one(
    smoke_config, trained, tmp_path, monkeypatch, capsys, at_once
):
    smoke_config.final_test = False
    smoke_config.data.resident, smoke_config.data.resident_steps = True, at_once
    # A CPU takes one step at once; the program of several is the same elsewhere.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    assert "32 training records stay on the device" in capsys.readouterr().out
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(trained), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"split"}:
            # Adam takes the sign of a rounding error as it takes a gradient's.
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-2, err_msg=name)
    expected, found = (
        load_file(w / "model/model.safetensors") for w in (trained, tmp_path / "run")
    )
    for name, value in expected.items():
        # Of the whole tensor: single weights whose gradient is noise move by it.
        apart = np.sqrt(np.mean((found[name] - value) ** 2))
        assert apart < 1e-3, f"{name}: {apart} apart"


def test_a_split_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "free_bytes", lambda: 1_000_000)
    data = {"image": np.zeros((3, 1000, 1000, 1), np.uint8)}
    with pytest.raises(UserError, match=r"data.resident: .* takes 3 MB, and the device has 1 MB"):
        feeding._resident(None, data, None, 0)
