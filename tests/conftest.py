"""Checks shapes and dtypes of public signatures while the tests run; shared fixtures."""

import fcntl
import os
import tempfile
import time

import jaxtyping

# Full runs compile the same programs many times. The cache compiles them once per session, for
# both workers. Set before jax is imported; workers and child processes inherit it.
# Less optimized code compiles faster (level 0 gives NaN in jaxlib 0.10.2, hence 1), and so does
# code from the older fusion emitter: a test file that took 25 s takes 17 s.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="biclip-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

SHAPED = ["models", "training.losses", "training.views", "training.steps", "evaluation.steps"]
jaxtyping.install_import_hook([f"biclip_jax.{name}" for name in SHAPED], "beartype.beartype")

import pytest

from biclip_jax.core import config as config_lib
from tests import tiny


def pytest_addoption(parser):
    help = "skip all tests that would start after this many seconds"
    parser.addoption("--budget", type=float, default=float("inf"), help=help)


def pytest_sessionstart(session):
    session.config.start_time = time.monotonic()


def pytest_runtest_setup(item):
    if time.monotonic() - item.config.start_time > item.config.getoption("--budget"):
        pytest.skip("the time budget is used up")


@pytest.fixture
def smoke_config(tmp_path):
    """Smoke variant of the demo config, with its prepared data under tmp_path."""
    return config_lib.load_config(
        "default:smoke", [f"--config.data.cache_dir={tmp_path / 'cache'}"]
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Work directory of one finished smoke run, shared by all workers; read-only."""
    from biclip_jax import train

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    workdir = base / "trained"
    config = config_lib.load_config("default:smoke", [f"--config.data.cache_dir={base / 'cache'}"])
    with open(base / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "test/results.json").exists():
            train.train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture(scope="session")
def tiny_step():
    """(step, state, batch, key): a full train step at tiny size, not yet compiled."""
    return tiny.train_step()
