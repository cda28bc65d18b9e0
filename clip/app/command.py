"""What all commands share."""


class CommandError(Exception):
    """Something that the user can mend; its text is all that is shown."""
