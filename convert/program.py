"""How a converter runs as a program."""

import sys
from collections.abc import Callable, Iterable

import absl.logging
import jax
from absl import app, flags

from sammix_jax.errors import UserError


def run(work: Callable[[flags.FlagValues], Iterable[str]]) -> None:
    """Prints the lines that `work(flags)` returns; ends with 1 and an error's text on stderr where
    it raises a UserError, or may not look into a folder. A program defines its flags before, and
    not as its module is imported: flags are global, and several programs may be imported at once.
    """

    def main(argv) -> int:
        jax.config.update("jax_platforms", "cpu")  # a machine's accelerator may be at work
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax tells of every file it opens
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected arguments {argv[1:]}; every option begins with --")
            lines = work(flags.FLAGS)
        except (UserError, PermissionError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(*lines, sep="\n")
        return 0

    app.run(main)
