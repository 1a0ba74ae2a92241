"""Process setup of a command: exit status, XLA flags, memory, compilation cache."""

import os
import platform
import subprocess
import sys

import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.core import files, runtime
from biclip_jax.core.errors import UserError


def test_user_error_prints_one_line_and_exits_with_2(capsys):
    def main(argv):
        raise UserError("here.png: found this; expected that; do so")

    with pytest.raises(SystemExit) as stopped:
        runtime.run_command(main, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: here.png: found this; expected that; do so\n"


def test_ctrl_c_prints_one_line_and_exits_with_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        runtime.run_command(main, [])
    assert stopped.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted;") and error.count("\n") == 1


def test_os_error_prints_one_line_with_the_path(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        runtime.run_command(lambda _: (tmp_path / "missing").read_text() and None, [])
    assert stopped.value.code == 2
    assert str(tmp_path / "missing") in capsys.readouterr().err


def test_the_convolution_flag_is_set_once_for_known_jaxlib_releases(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setattr(runtime.metadata, "version", lambda _: "0.10.2")
    for _ in range(2):
        runtime.set_xla_flags()
        assert os.environ["XLA_FLAGS"] == f"--xla_a=1 {runtime.CPU_CONVOLUTION_FLAG}"
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(runtime.metadata, "version", lambda _: "0.12.0")
    runtime.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize("has_variable", [True, False])
def test_compilation_cache_is_enabled_unless_the_variable_is_set(
    monkeypatch, tmp_path, has_variable
):
    import jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    }
    if has_variable:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    else:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        runtime.enable_compilation_cache()
        expected = (
            before["jax_compilation_cache_dir"]
            if has_variable
            else str(files.compilation_cache_dir())
        )
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_freed_memory_is_kept_only_on_hosts_without_an_accelerator(monkeypatch):
    calls = []

    class Library:
        mallopt = staticmethod(lambda option, value: calls.append((option, value)))
        malloc_trim = staticmethod(lambda pad: calls.append(("trim", pad)))

    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: Library)
    devices = [True]
    monkeypatch.setattr(config_lib.Path, "glob", lambda *_: devices)
    runtime.keep_freed_memory()
    runtime.trim_memory()
    assert calls == []
    monkeypatch.setattr(config_lib.Path, "glob", lambda *_: [])
    runtime.keep_freed_memory()
    assert dict(calls) == runtime.MALLOC_OPTIONS
    runtime.trim_memory()
    assert calls[-1] == ("trim", 0)


MALLOC_SCRIPT = """
import ctypes, resource
from biclip_jax.core import runtime
runtime.ACCELERATORS = ()
runtime.keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 5 * 2**29  # above 2 GiB
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    libc.memset(block, 1, size // 16)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = touch(), touch()
runtime.trim_memory()
print(first, second, touch())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="requires glibc")
def test_freed_memory_above_two_gibibytes_is_kept():
    command = [sys.executable, "-c", MALLOC_SCRIPT]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, after_trim = map(int, completed.stdout.split())
    assert second < first / 100
    assert after_trim > first / 2


def test_other_c_libraries_are_left_unchanged(monkeypatch):
    names = []

    def missing(name):
        names.append(name)
        raise OSError(name)

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    monkeypatch.setattr(config_lib.Path, "glob", lambda *_: [])
    runtime.keep_freed_memory()
    assert names == ["libc.so.6"]
