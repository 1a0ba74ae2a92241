"""1, 2 and 4 devices give the same run, by pmap or on a mesh, with and without sharding."""

import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from biclip_jax.core import distributed
from tests import tiny, toy

STEPS = 5
LEARNING_RATE = 0.01
# float64: a ReLU, a maximum or a teacher's p >= 0.5 would amplify a rounding error of float32.
RUN = """
import sys
import jax, numpy as np
from flax.traverse_util import flatten_dict
from biclip_jax.core import distributed
from biclip_jax.experiment import program
from tests import tiny

jax.config.update("jax_enable_x64", True)
devices, path, num_steps, rate, method, size, mode, shard_state = sys.argv[1:]
assert jax.local_device_count() == int(devices)
size = int(size)
fields = {"optimizer": "sgd", "learning_rate": float(rate), "method": method, "size": size}
step, state, batch, key = tiny.train_step(distributed.axis_name_of(mode), **fields, dtype="float64")
train, shard = distributed.pmap_train_step(step), distributed.shard_batch
layout = distributed.replicated(state)
if mode == "mesh":
    shard, layout = distributed.global_batch, program.state_shardings(state, shard_state)
    train = distributed.mesh_train_step(step, layout)
    is_sharded = [not sharding.is_fully_replicated for sharding in jax.tree.leaves(layout)]
    assert any(is_sharded) == (shard_state == "all")
state, key = distributed.put(state, layout), distributed.replicate(key)
losses = []
for seed in range(int(num_steps)):
    labelled = size // 2 if method == "semi" else None
    batch = shard(tiny.batch(size=size, seed=seed, labelled=labelled))
    state, metrics = jax.block_until_ready(train(state, batch, key))
    losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
host = distributed.to_host(state)
assert int(host.skipped) == 0
tree = {"params": host.params, "batch_stats": host.batch_stats}
tree |= {"ema": host.ema} if host.ema else {}
np.savez(path, losses=losses, **flatten_dict(tree, sep="/"))
"""


def run_on(devices, path, method="published", size=4, mode="pmap", shard=""):
    run_script(RUN, devices, [devices, path, STEPS, LEARNING_RATE, method, size, mode, shard])
    return dict(np.load(path))


def run_script(script, devices, arguments):
    """Runs a Python script in a separate process with this number of virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run_on(1, tmp_path_factory.mktemp("one") / "state.npz")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_more_devices_give_the_same_run(one_device, devices, tmp_path):
    """Uses SGD: AdamW would hide a wrong scale of the gradient."""
    check_same(one_device, run_on(devices, tmp_path / "state.npz"))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "shard"), [(2, ""), (4, "all")])
def test_a_mesh_gives_the_same_run(one_device, devices, shard, tmp_path):
    check_same(one_device, run_on(devices, tmp_path / "state.npz", mode="mesh", shard=shard))


@pytest.fixture(scope="module")
def one_device_semi(tmp_path_factory):
    return run_on(1, tmp_path_factory.mktemp("semi") / "state.npz", "semi", size=8)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "shard"), [("pmap", ""), ("mesh", "all")])
def test_four_devices_give_the_same_semi_supervised_run(one_device_semi, mode, shard, tmp_path):
    """Half the devices have only unlabelled rows; covers paired rows and averaged parameters."""
    assert any(name.startswith("ema/params/unet/fusion_") for name in one_device_semi)
    four = run_on(4, tmp_path / "state.npz", "semi", size=8, mode=mode, shard=shard)
    check_same(one_device_semi, four)


def check_same(expected, result):
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(result[name], value, atol=1e-10, rtol=1e-10, err_msg=name)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """{run: result} of all `toy.RUNS`, on four devices."""
    path = tmp_path_factory.mktemp("toys") / "runs.pickle"
    run_script("import sys; from tests import toy; toy.main(sys.argv[1])", 4, [path])
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("run", toy.RUNS, ids=toy.name_of)
def test_pmap_mesh_and_a_sharded_state_take_the_same_steps(toys, run):
    """Noise, statistics, accumulated parts and ensemble members see the same rows in all modes."""
    plain = run._replace(mode="pmap", shard="", num_at_once=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5),
        toys[run].arrays,
        toys[plain].arrays,
    )


def test_the_toy_is_sensitive_to_the_accumulated_parts(toys):
    full, accumulated = (toys[toy.Run(accumulate=n)].arrays["state"].params["w"] for n in (1, 2))
    assert np.abs(full - accumulated).max() > 1e-3


@pytest.mark.parametrize("run", toy.RUNS, ids=toy.name_of)
def test_a_step_is_traced_once_donates_the_state_and_keeps_its_sharding(toys, run):
    result = toys[run]
    assert result.traces == 1
    assert result.deleted
    assert result.before == result.after


def test_sharded_arrays_are_split_into_quarters(toys):
    replicated = {"w": (6, 1024), "u": (1024, 8), "b": (8,), "odd": (129, 33)}
    quarters = replicated | {"w": (6, 256), "u": (256, 8)}
    for shard, params, opt_state in (
        ("", replicated, replicated),
        ("optimizer", replicated, quarters),
        ("all", quarters, quarters),
    ):
        shapes = toys[toy.Run("mesh", shard)].after
        assert (shapes.params, shapes.opt_state[0].trace) == (params, opt_state)


def test_rows_of_a_global_batch_are_in_the_order_of_the_devices(toys):
    expected = np.arange(toy.BATCH).reshape(4, -1).tolist()
    assert toys[toy.Run("mesh")].rows == toys[toy.Run("pmap")].rows == expected


@pytest.mark.parametrize(
    ("shape", "devices", "spec"),
    [
        ((1024, 8), 4, PartitionSpec("batch")),
        ((3, 3, 64, 128), 4, PartitionSpec(None, None, "batch")),
        ((3, 3, 64, 128), 3, PartitionSpec("batch")),
        ((129, 33), 4, PartitionSpec()),
        ((1023, 4), 4, PartitionSpec()),
        ((1024, 4), 4, PartitionSpec("batch")),
        ((), 2, PartitionSpec()),
    ],
)
def test_arrays_are_sharded_along_the_first_divisible_axis(shape, devices, spec):
    assert distributed.partition_spec(shape, devices) == spec


def test_predictions_pad_the_batch_to_the_devices_and_drop_the_padding():
    predict = distributed.pmap_predict_step(lambda scale, batch: batch["x"] * scale)
    for size in (1, 3, 5):
        x = np.arange(size * 2, dtype=np.float32).reshape(size, 2)
        np.testing.assert_array_equal(predict(2.0, {"x": x}), 2 * x)


@pytest.mark.parametrize("shard", [distributed.shard_batch, distributed.global_batch])
def test_rejects_a_batch_that_is_not_divisible_by_the_devices(monkeypatch, shard):
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    assert distributed.shard_batch(tiny.batch(6))["image"].shape[:2] == (3, 2)
    assert distributed.round_up_to_devices(16) == 18
    with pytest.raises(ValueError, match=r"4 rows .* 3 devices"):
        shard(tiny.batch(4))


def test_rejects_a_batch_size_that_does_not_fit_devices_and_accumulation(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    distributed.check_batch_size(16, 2)
    with pytest.raises(ValueError, match="multiple of 12"):
        distributed.check_batch_size(16, 3)
