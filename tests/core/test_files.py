"""Folders of the user's cache; files that come to their place whole."""

from pathlib import Path

import pytest

from biclip_jax.core import files


def test_the_cache_follows_the_user_s_setting_and_else_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "biclip_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "home/.cache/biclip_jax"


def test_programs_lie_apart_for_each_kind_of_processor(monkeypatch):
    own = files.compilation_cache_dir()
    assert own.parent == files.cache_dir() / "programs"
    assert own == files.compilation_cache_dir()
    other = "flags\t\t: fpu vme sse\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: other)
    assert files.compilation_cache_dir() != own


def test_a_system_that_tells_no_instructions_has_a_folder_too(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert files.compilation_cache_dir().name.endswith("-unknown")


def test_a_file_comes_whole_or_not_at_all(tmp_path):
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
