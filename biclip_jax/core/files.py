"""Where on this machine things are kept from run to run, and how files come there whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """biclip_jax/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biclip_jax"


def compilation_cache_dir() -> Path:
    """Compiled programs, a folder for each kind of processor: home folders travel."""
    return cache_dir() / "programs" / f"{platform.machine()}-{instruction_set()}"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a place beside `path` to write to, and moves it there where that succeeds.

    Readers see the old file or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic within one file system only.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def instruction_set() -> str:
    """A name for the processor's instruction set, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:10]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
