"""The one error that ends a command with a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can mend; the message says what was given, what was expected and what to do."""
