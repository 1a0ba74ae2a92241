"""Checkpoints: bit-equal, damage found, interruption harmless, signals and locks."""

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


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def folder(tmp_path):
    """Three saves, of which the newest two stay."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "last", make_state(step), {"note": step})
    return tmp_path / "last"


def restore(folder, said=None):
    said = [] if said is None else said
    return checkpoint.restore_latest(folder, make_state(0), said.append)


def test_the_newest_comes_back_bit_for_bit_and_two_stay(folder):
    state, meta = restore(folder)
    assert_same(state, make_state(3))
    assert meta == {"note": 3}
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["2", "3"]


def test_nothing_there_is_none(tmp_path):
    assert restore(tmp_path / "empty") is None


def largest_file(step):
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("fault", ["flip", "zero", "truncate", "delete", "swap", "manifest"])
def test_damage_is_found_and_the_older_step_taken(folder, fault):
    victim = largest_file(folder / "3")
    data = bytearray(victim.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif fault == "zero":
        victim.write_bytes(bytes(len(data)))
    elif fault == "truncate":
        victim.write_bytes(data[:-1])
    elif fault == "delete":
        victim.unlink()
    elif fault == "swap":
        victim.write_bytes(largest_file(folder / "2").read_bytes() + b"x")
    else:
        (folder / "3.sha256.json").write_text("{")
    said = []
    state, meta = restore(folder, said)
    assert_same(state, make_state(2))
    assert meta == {"note": 2}
    assert len(said) == 1
    assert str(folder / "3") in said[0]
    # The damaged step takes no place among those that are kept.
    checkpoint.save(folder, make_state(4), {"note": 4})
    assert [step.name for step in checkpoint.complete_steps(folder)] == ["2", "4"]


def test_no_intact_step_is_an_error_that_names_the_folder(folder):
    for step in ("2", "3"):
        largest_file(folder / step).unlink()
    with pytest.raises(UserError, match=str(folder)):
        restore(folder)


def test_a_step_without_manifest_does_not_count_and_is_cleaned(folder):
    (folder / "3.sha256.json").unlink()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    assert restore(folder)[1] == {"note": 2}
    checkpoint.remove_incomplete(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "2.sha256.json"]


def test_another_model_s_checkpoint_is_refused_by_name(folder):
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore_latest(folder, make_state(0, size=7), print)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "last").write_text("a file, not a folder")
    with pytest.raises(UserError, match="could not be written"):
        checkpoint.save(tmp_path / "last", make_state(1), {})


def test_stop_signal_remembers_and_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_job_is_refused_and_a_dead_owner_s_lock_is_free(tmp_path):
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
        refused = pytest.raises(UserError, match=f"process {holder.pid}")
        with refused, checkpoint.lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with checkpoint.lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
