"""The root of the errors that a user or operator can do something about."""


class MpuNotifyError(Exception):
    """A condition of the user's or the machine's, not a bug: its text names what was attempted, on what, what to do.

    The command line says it in one line and exits with 1.
    """
