"""The process around a command: exit status, flags, memory, compilation cache."""

import os
import platform
import subprocess
import sys

import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.core import files, runtime
from biclip_jax.core.errors import UserError


def test_a_user_s_error_is_one_line_and_status_2(capsys):
    def main(argv):
        raise UserError("here.png: found this; expected that; do so")

    with pytest.raises(SystemExit) as stopped:
        runtime.run_command(main, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: here.png: found this; expected that; do so\n"


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        runtime.run_command(main, [])
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted;") and said.count("\n") == 1


def test_a_file_that_cannot_be_used_is_one_line_too(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        runtime.run_command(lambda _: (tmp_path / "gone").read_text() and None, [])
    assert stopped.value.code == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err


def test_the_convolution_flag_is_set_once_and_only_where_it_is_known(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setattr(runtime.metadata, "version", lambda _: "0.10.2")
    for _ in range(2):
        runtime.set_xla_flags()
        assert os.environ["XLA_FLAGS"] == f"--xla_a=1 {runtime.CPU_CONVOLUTION_FLAG}"
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(runtime.metadata, "version", lambda _: "0.12.0")
    runtime.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize("given", [True, False])
def test_compiled_programs_are_kept_unless_a_folder_is_named(monkeypatch, tmp_path, given):
    import jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    }
    if given:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    else:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        runtime.enable_compilation_cache()
        expected = (
            before["jax_compilation_cache_dir"] if given else str(files.compilation_cache_dir())
        )
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_memory_is_kept_on_hosts_without_an_accelerator_alone(monkeypatch):
    asked = []

    class Library:
        mallopt = staticmethod(lambda option, value: asked.append((option, value)))
        malloc_trim = staticmethod(lambda pad: asked.append(("trim", pad)))

    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: Library)
    found = [True]
    monkeypatch.setattr(config_lib.Path, "glob", lambda *_: found)
    runtime.keep_freed_memory()
    runtime.trim_memory()
    assert asked == []
    monkeypatch.setattr(config_lib.Path, "glob", lambda *_: [])
    runtime.keep_freed_memory()
    assert dict(asked) == runtime.MALLOC_OPTIONS
    runtime.trim_memory()
    assert asked[-1] == ("trim", 0)


KEEPS = """
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_memory_of_more_than_two_gibibytes_is_kept_too():
    said = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, check=True)
    first, kept, given_back = map(int, said.stdout.split())
    assert kept < first / 100
    assert given_back > first / 2


def test_another_c_library_is_left_alone(monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise OSError(name)

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    monkeypatch.setattr(config_lib.Path, "glob", lambda *_: [])
    runtime.keep_freed_memory()
    assert asked == ["libc.so.6"]
