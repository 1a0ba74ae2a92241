"""Cache folders of the user and atomic writes."""

from pathlib import Path

import pytest

from biclip_jax.core import files


def test_cache_dir_is_xdg_cache_home_or_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "biclip_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "home/.cache/biclip_jax"


def test_compilation_cache_depends_on_the_processor(monkeypatch):
    folder = files.compilation_cache_dir()
    assert folder.parent == files.cache_dir() / "programs"
    assert folder == files.compilation_cache_dir()
    other = "flags\t\t: fpu vme sse\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: other)
    assert files.compilation_cache_dir() != folder


def test_compilation_cache_dir_without_cpuinfo(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert files.compilation_cache_dir().name.endswith("-unknown")


def test_atomic_write_replaces_the_file_only_on_success(tmp_path):
    path = tmp_path / "new/file.txt"
    with files.atomic_write(path) as part:
        part.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(OSError, match="full"), files.atomic_write(path) as part:
        part.write_text("half")
        raise OSError("full")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
