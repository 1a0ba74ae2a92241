"""Where on this machine things are kept from run to run."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def cache_dir() -> Path:
    """biclip_jax/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biclip_jax"


def programs_dir() -> Path:
    """Compiled programs, a folder for each kind of processor: home folders travel."""
    return cache_dir() / "programs" / f"{platform.machine()}-{_instructions()}"


def _instructions() -> str:
    """A name for the processor's instruction set, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:10]
