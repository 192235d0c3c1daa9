"""What goes wrong outside the program: shown as one line, without a traceback."""


class UserError(Exception):
    """A file, folder, option or device that is not as it must be; the message says which and what was expected."""
