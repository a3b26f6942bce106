"""The one exception that means "the user can fix this": printed as one line, exit code 2."""


class UserError(ValueError):
    """A mistake in the input: the message says what is wrong, where, and what would be right."""
