"""The error of a method that a user's settings or files do not allow."""

from __future__ import annotations


class ModelError(ValueError):
    """Something the user can mend; the message says what was given, what was expected and what to do.

    A stage ends with this sentence in place of a traceback. Any other ValueError is a fault of the code.
    """
