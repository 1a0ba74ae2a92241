"""Errors that the user can fix; every other exception is a bug and keeps its stack trace."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence


class UserError(Exception):
    """Invalid input, configuration or environment that the user can fix.

    The message is complete: the file or field first, then what was found, what was expected and
    the fix. Commands print it on one line, without a stack trace, and exit with status 2.
    """


class BadImageError(UserError):
    """An image that cannot be read; the message begins with its path."""


def bad_image(path: str | os.PathLike[str], found: str, expected: str, fix: str) -> BadImageError:
    """Returns the error that names the file, what was found, what was expected, and the fix."""
    return BadImageError(f"{os.fspath(path)}: found {found}; expected {expected}; {fix}.")


class DataError(UserError):
    """An inconsistent dataset on disk; the message names the file."""


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Returns the suggestion for an unknown name, or "" if no known name is close."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


# Optional dependency -> the extra of setup.py that installs it.
EXTRAS = {
    "array_record": "train",
    "grain": "train",
    "importlib_resources": "train",
    "openpyxl": "train",
    "tensorflow_datasets": "train",
    "pydicom": "medical",
    "huggingface_hub": "hub",
    "transformers": "hub",
    "jinja2": "report",
}


def missing_extra(error: ModuleNotFoundError) -> str:
    """Returns the message for a missing optional dependency.

    Raises:
      ModuleNotFoundError: The module is not an optional dependency.
    """
    name = (error.name or "").split(".")[0]
    if name not in EXTRAS:
        raise error
    return f"{name} is not installed; install it with pip install 'biclip_jax[{EXTRAS[name]}]'"
