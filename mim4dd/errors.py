"""Errors that are the user's to mend; the command lines print them in one line and exit with 2."""


class InputError(ValueError):
    """Something given to mim4dd is wrong: the text names the value, what was expected and what to do."""
