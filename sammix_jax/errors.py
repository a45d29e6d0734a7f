"""The one exception that a user, not a programmer, can mend."""


class UserError(Exception):
    """Bad input: the message names the file or field, what was found and expected, and the fix.

    `sammix_jax.main` prints it without a traceback and exits with status 1.
    """
