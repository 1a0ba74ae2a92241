"""Cache paths, atomic writes and JSON files."""

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
    """Returns biclip_jax/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biclip_jax"


def compilation_cache_dir() -> Path:
    """Returns the folder of compiled programs, one per processor type.

    Home folders are often shared between machines with different processors.
    """
    return cache_dir() / "programs" / f"{platform.machine()}-{instruction_set()}"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` on success.

    Readers see either the old file or the complete new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def instruction_set() -> str:
    """Returns a short hash of the processor's instruction set, "unknown" outside Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:10]
