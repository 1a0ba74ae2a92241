"""Shapes and dtypes of public signatures are checked while the tests run; tiny things to share."""

import fcntl
import os
import tempfile
import time

import jaxtyping

# Whole runs compile the same programs again and again: once a session, and for both workers,
# is enough. Set before jax is imported, and inherited by workers and child processes.
# Less optimised code compiles sooner (level 0 gives NaN in jaxlib 0.10.2, so 1 it is), and so do
# fusions that the older emitter writes: a test file that took 25 s takes 17.
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
    help = "seconds after whose end no further test begins: the rest is skipped, and says so"
    parser.addoption("--budget", type=float, default=float("inf"), help=help)


def pytest_sessionstart(session):
    session.config.began = time.monotonic()


def pytest_runtest_setup(item):
    if time.monotonic() - item.config.began > item.config.getoption("--budget"):
        pytest.skip("the budget of time is spent")


@pytest.fixture
def smoke_config(tmp_path):
    """The demo's smoke variant, with its prepared data under tmp_path."""
    return config_lib.load_config(
        "default:smoke", [f"--config.data.cache_dir={tmp_path / 'cache'}"]
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The work directory of one finished smoke run, shared by all workers: read only."""
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
    """(step, state, batch, key): a whole train step at tiny size, not yet compiled."""
    return tiny.train_step()
