"""The one kind of error a person at the command line is meant to see."""


class UsageError(Exception):
    """A mistake in what the user asked for: one line naming the field, the value and what would be right.

    Command-line entry points print it without a traceback and exit with status 2.
    """
