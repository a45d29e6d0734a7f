"""One run at a time in a workdir."""

import contextlib
import fcntl

from sammix_jax import hosts
from sammix_jax.data.paths import as_path, is_remote
from sammix_jax.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def sole_writer(workdir):
    """Refuses a run while another one writes into the same workdir.

    The system lets go of the lock when the process ends, however it does. Of the processes of a run
    the first one takes it. An object store has none, and some network disks.

    Raises:
      UserError: another run holds it, or the folder cannot be written to.
    """
    folder = as_path(workdir)

    def take():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "w", encoding="utf-8")  # noqa: SIM115 — closed below
        except OSError as error:
            raise UserError(
                f"--workdir={folder}: cannot be written to ({error}); make room or give another."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f"{folder}: another process trains in this workdir; let it end, stop it, or give "
                "another --workdir."
            ) from error
        except OSError:  # a disk that knows no locks
            pass
        return file

    file = None if is_remote(folder) else hosts.on_first(take)
    try:
        yield
    finally:
        if file:
            file.close()
