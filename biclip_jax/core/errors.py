"""The errors a user can mend; everything else is a bug and keeps its trace."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence


class UserError(Exception):
    """Input, configuration or environment that the user can mend.

    The message is the whole answer: the file or field first, then what was
    found, what was expected, and the mend. Command lines print it without a
    trace and exit with status 2.
    """


class BadImageError(UserError):
    """A picture that cannot be read; the message begins with its path."""


def bad_image(path: str | os.PathLike[str], found: str, expected: str, fix: str) -> BadImageError:
    """The error that names the file, what was found, what was expected, and the mend."""
    return BadImageError(f"{os.fspath(path)}: found {found}; expected {expected}; {fix}.")


class DataError(UserError):
    """A data set on disk that does not hold together; the message names the file."""


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """What to add to a message about an unknown name; empty where no known one is near."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
