"""The one exception that a user, not a programmer, can mend, and its wording."""

from collections.abc import Collection, Iterable


class UserError(Exception):
    """Bad input: the message names the file or field, what was found and expected, and the fix.

    `sammix_jax.main` prints it without a traceback and exits with status 1.
    """


def listed(faults: Iterable[str]) -> str:
    """Faults for the end of a message, each on a line of its own."""
    return "".join(f"\n  {fault}" for fault in faults)


def check_name(kind: str, name: str, names: Collection[str]) -> None:
    """Refuses a name that a config file does not know.

    Args:
      kind: of what is named, for the message.
      name: what was asked for.
      names: those that there are.

    Raises:
      UserError: `name` is not among them.
    """
    if name not in names:
        raise UserError(f"config: no {kind} {name!r}: expected one of {', '.join(names)}.")
