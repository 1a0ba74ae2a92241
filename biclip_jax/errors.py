"""The errors a user can mend; everything else is a bug and keeps its trace."""


class UserError(Exception):
    """Input, configuration or environment that the user can mend.

    The message is the whole answer: the file or field first, then what was
    found, what was expected, and the mend. Command lines print it without a
    trace and exit with status 2.
    """


class BadImageError(UserError):
    """A picture that cannot be read; the message begins with its path."""


class DataError(UserError):
    """A data set on disk that does not hold together; the message names the file."""
