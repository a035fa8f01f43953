"""What ends a command, each with its own exit status and one line (`common.runtime.command.run_command`)."""


class UsageError(Exception):
    """A mistake in what the user asked for: one line naming the field, the value and what would be right.

    Command-line entry points print it without a traceback and exit with status 2.
    """


class RankError(UsageError):
    """What one of several processes of a run may meet alone: whichever meets it prints it, not rank 0 for all."""


class NonFiniteError(Exception):
    """A loss or gradient was NaN or infinite: the message names the step and the term. Exit status 3."""


class Stopped(Exception):
    """The run was asked to stop by a signal, has saved itself and can be resumed. Exit status 128 + signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Interrupted(Exception):
    """``should_stop`` said yes in the middle of a measurement; nothing was measured."""
