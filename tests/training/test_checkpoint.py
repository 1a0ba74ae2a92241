"""Checkpoints: bit-exact restoring, damaged and incomplete steps, signals and locks."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.training import checkpoint
from biclip_jax.training import state as train_state


def make_state(step, size=5):
    rng = np.random.default_rng(step)
    variables = {
        "params": {"w": jnp.asarray(rng.standard_normal((size, 3)), jnp.float32)},
        "batch_stats": {"m": jnp.asarray(rng.standard_normal(3), jnp.float32)},
    }
    state = train_state.create(variables, optax.adam(1e-3))
    return jax.tree.map(np.asarray, state.replace(step=jnp.int32(step)))


def assert_trees_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder after three saves, which keeps the newest two steps."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "last", make_state(step), {"note": step})
    return tmp_path / "last"


def restore(folder, messages=None):
    messages = [] if messages is None else messages
    return checkpoint.restore_latest(folder, make_state(0), messages.append)


def test_restores_the_newest_step_bit_for_bit_and_keeps_two(folder):
    state, meta = restore(folder)
    assert_trees_equal(state, make_state(3))
    assert meta == {"note": 3}
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["2", "3"]


def test_restore_of_an_empty_folder_is_none(tmp_path):
    assert restore(tmp_path / "empty") is None


def largest_file(step):
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("fault", ["flip", "zero", "truncate", "delete", "swap", "manifest"])
def test_damaged_step_is_skipped_for_the_older_one(folder, fault):
    path = largest_file(folder / "3")
    data = bytearray(path.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif fault == "zero":
        path.write_bytes(bytes(len(data)))
    elif fault == "truncate":
        path.write_bytes(data[:-1])
    elif fault == "delete":
        path.unlink()
    elif fault == "swap":
        path.write_bytes(largest_file(folder / "2").read_bytes() + b"x")
    else:
        (folder / "3.sha256.json").write_text("{")
    messages = []
    state, meta = restore(folder, messages)
    assert_trees_equal(state, make_state(2))
    assert meta == {"note": 2}
    assert len(messages) == 1
    assert str(folder / "3") in messages[0]
    # The damaged step does not count towards the steps to keep.
    checkpoint.save(folder, make_state(4), {"note": 4})
    assert [step.name for step in checkpoint.complete_steps(folder)] == ["2", "4"]


def test_no_intact_step_raises_with_the_folder(folder):
    for step in ("2", "3"):
        largest_file(folder / step).unlink()
    with pytest.raises(UserError, match=str(folder)):
        restore(folder)

    # The steps stay complete, so that a second start does not begin a new run over them.
    assert [step.name for step in checkpoint.complete_steps(folder)] == ["2", "3"]
    with pytest.raises(UserError, match="no intact checkpoint"):
        restore(folder)


def test_step_without_manifest_is_ignored_and_removed(folder):
    (folder / "3.sha256.json").unlink()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    assert restore(folder)[1] == {"note": 2}
    checkpoint.remove_incomplete(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "2.sha256.json"]


def test_rejects_a_checkpoint_of_another_model(folder):
    with pytest.raises(UserError, match="does not match the model of the config"):
        checkpoint.restore_latest(folder, make_state(0, size=7), print)


def test_unwritable_folder_raises_user_error(tmp_path):
    (tmp_path / "last").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "last", make_state(1), {})


def test_stop_signal_records_and_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_lock_rejects_a_second_job_and_is_released_with_its_process(tmp_path):
    code = (
        "import sys, pathlib\nfrom biclip_jax.training import checkpoint\n"
        "with checkpoint.lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        raises = pytest.raises(UserError, match=f"process {holder.pid}")
        with raises, checkpoint.lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with checkpoint.lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
