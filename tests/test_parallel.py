"""Devices: 1, 2 and 4 of them give the same run; batches are cut, padded and put together."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from biclip_jax import parallel
from tests import tiny

STEPS = 5
RUN = """
import sys
import jax, numpy as np
from flax.traverse_util import flatten_dict
from biclip_jax import parallel
from tests import tiny

assert jax.local_device_count() == int(sys.argv[1])
method, size = sys.argv[4], int(sys.argv[5])
step, state, batch, key = tiny.train_step(
    parallel.AXIS, optimizer="sgd", learning_rate=0.03, method=method, size=size
)
train = parallel.pmap_train_step(step)
state, key = parallel.replicate(state), parallel.replicate(key)
losses = []
for seed in range(int(sys.argv[3])):
    labelled = size // 2 if method == "semi" else None
    batch = parallel.shard(tiny.batch(size=size, seed=seed, labelled=labelled))
    state, metrics = jax.block_until_ready(train(state, batch, key))
    losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
host = parallel.to_host(state)
assert int(host.skipped) == 0
tree = {"params": host.params, "batch_stats": host.batch_stats}
tree |= {"ema": host.ema} if host.ema else {}
np.savez(sys.argv[2], losses=losses, **flatten_dict(tree, sep="/"))
"""


def run_on(devices, path, method="published", size=4):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    arguments = [sys.executable, "-c", RUN, str(devices), str(path), str(STEPS)]
    arguments += [method, str(size)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(path))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run_on(1, tmp_path_factory.mktemp("one") / "state.npz")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_more_devices_give_the_same_run(one_device, devices, tmp_path):
    """With SGD: AdamW would hide a wrong scale of the gradient."""
    check_same(one_device, run_on(devices, tmp_path / "state.npz"))


@pytest.mark.slow
def test_four_devices_give_the_same_semi_supervised_run(tmp_path):
    """Pairs of rows, labelled and unlabelled ones, averages: half the devices have no mask."""
    one, four = (run_on(n, tmp_path / f"{n}.npz", "semi", size=8) for n in (1, 4))
    assert any(name.startswith("ema/params/unet/fusion_") for name in one)
    check_same(one, four)


def check_same(one, many):
    assert one.keys() == many.keys()
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-4)
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, atol=1e-4, rtol=1e-4, err_msg=name)


def test_predictions_are_padded_to_the_devices_and_cut_again():
    predict = parallel.pmap_predict_step(lambda scale, batch: batch["x"] * scale)
    for size in (1, 3, 5):
        x = np.arange(size * 2, dtype=np.float32).reshape(size, 2)
        np.testing.assert_array_equal(predict(2.0, {"x": x}), 2 * x)


def test_shard_refuses_what_does_not_divide(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    assert parallel.shard(tiny.batch(6))["image"].shape[:2] == (3, 2)
    assert parallel.round_up(16) == 18
    with pytest.raises(ValueError, match=r"4 rows .* 3 devices"):
        parallel.shard(tiny.batch(4))


def test_batch_size_must_suit_devices_and_accumulation(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    parallel.check_batch_size(16, 2)
    with pytest.raises(ValueError, match="multiple of 12"):
        parallel.check_batch_size(16, 3)
