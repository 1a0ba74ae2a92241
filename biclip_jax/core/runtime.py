"""The process around a command: exit status, XLA flags, memory, compilation cache."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from biclip_jax.core import files
from biclip_jax.core.errors import UserError

ACCELERATORS = ("nvidia[0-9]*", "accel*", "kfd", "vfio/[0-9]*")  # under /dev: GPUs, TPUs


# mallopt's M_ARENA_MAX: one arena; M_MMAP_MAX: no block of its own; M_TRIM_THRESHOLD: -1, give
# nothing back (the largest integer would be a threshold of 2 GiB); M_TOP_PAD: bytes more than are
# asked for.
MALLOC_OPTIONS = {-8: 1, -4: 0, -1: -1, -2: 2**26}


CACHE_BYTES = 2**30  # of compiled programs; those unused for longest go first


CPU_CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs a command line; exit status 2: a `UserError` or an unusable file; 130: Ctrl-C."""
    set_xla_flags()
    keep_freed_memory()
    enable_compilation_cache()
    try:
        status = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        fix = "check that it exists, is yours to use, and that the disk has room"
        print(f"error: {error.filename}: {error.strerror}; {fix}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; the same command begins again, or goes on", file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.exit(status or 0)


def set_xla_flags() -> None:
    """Sends convolutions on a CPU to the faster library; about a fifth of a train step.

    Only for releases known to have the flag: an unknown one ends the process.
    """
    known = metadata.version("jaxlib").startswith("0.10.")
    flags = os.environ.get("XLA_FLAGS", "")
    if known and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {CPU_CONVOLUTION_FLAG}".strip()


def keep_freed_memory() -> None:
    """Has the C library keep freed memory on hosts without an accelerator: a third of a train step.

    XLA asks for the memory of a step anew at every step: given back to the system in between, all
    its pages come as faults. glibc alone; elsewhere nothing happens.
    """
    library = _glibc()
    if library is not None:
        for option, value in MALLOC_OPTIONS.items():
            library.mallopt(option, value)


def trim_memory() -> None:
    """Gives back what `keep_freed_memory` keeps, once; the next step takes its memory anew.

    Between two steps something small may take a place in the memory that was the last one's; the
    next does not fit there any more, and what is left of it would be kept in vain.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any | None:
    """The C library, where it is glibc and the host has no accelerator."""
    if any(any(Path("/dev").glob(name)) for name in ACCELERATORS):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    except (OSError, AttributeError):
        return None


def enable_compilation_cache() -> None:
    """Compiled programs stay in the user's cache folder: the next start takes them from there.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(files.compilation_cache_dir()))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
