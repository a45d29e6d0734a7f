"""One run on several processes: joining them, telling who writes, and stopping together."""

import hashlib
import importlib.util
import os
import pathlib
import signal
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from sammix_jax.errors import UserError

TERMINATED = 128 + signal.SIGTERM  # exit code of a run that SIGTERM stopped
_ASKING = (signal.SIGTERM, signal.SIGINT)


def join(multihost: bool | None = None) -> None:
    """Joins the other processes of the run, if there are any. Must precede any other use of JAX.

    `jax.distributed.initialize()` finds them on Cloud TPU, under Slurm and under Open MPI up to 4;
    elsewhere JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID tell of
    them.

    Args:
      multihost: whether there are others; None finds out from the environment.

    Raises:
      UserError: variables that do not go together, or processes that do not answer.
    """
    if multihost is False or (multihost is None and not _several()):
        return
    given = {}
    for name in ("num_processes", "process_id"):
        variable = f"JAX_{name.upper()}"
        if variable in os.environ:
            if not os.environ[variable].isdigit():
                raise UserError(f"{variable}={os.environ[variable]!r}: expected a number.")
            given[name] = int(os.environ[variable])
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run could not be joined ({error}); outside of Cloud TPU, Slurm "
            "and Open MPI up to 4 set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID for each, or say --nomultihost for a run of one process."
        ) from error


def _several() -> bool:
    named = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "MEGASCALE_COORDINATOR_ADDRESS")
    if any(name in os.environ for name in named):
        return True
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, 1)) > 1 for name in counts):
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    # A Compute Engine TPU VM tells of its hosts by its metadata server, which JAX asks.
    has_tpu = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    return has_tpu and importlib.util.find_spec("libtpu") is not None and _platform_is_tpu()


def _platform_is_tpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] in ("tpu", "")


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    # Asked this way it starts no backend, which would take a GPU's memory.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def hides_progress() -> bool | None:
    """`disable` of a progress bar: the first process asks its terminal, the others have none."""
    return None if is_first() else True


def usable_cores() -> int:
    """Of this machine those that a job may use, where the system tells."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count()


def wait_for_all(name: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_then_others(first, others):
    """`first()` on the first process, then `others()` on the others, which find what it wrote.

    Raises:
      Exception: what `first` raised; on the others a UserError, that it failed.
    """
    any_process(False)  # opens the channel, for which the others would not wait long enough
    result, error = None, None
    if is_first():
        try:
            result = first()
        except Exception as found:  # the others wait, whatever it is
            error = found
    if any_process(error is not None):
        raise error or UserError("the first process failed, and says why.")
    return result if is_first() else others()


def on_first(make):
    """`make()` on the first process, None on the others, which wait.

    Raises:
      Exception: as `first_then_others`.
    """
    return first_then_others(make, lambda: None)


def for_all(read, what: str) -> tuple[object, str]:
    """(`read()`, ""), or (None, what is wrong) where it failed on any process; all must ask.

    Args:
      read: may raise a UserError.
      what: it is about, for the message.
    """
    found, fault, bug = None, "", None
    try:
        found = read()
    except UserError as error:
        fault = str(error)
    except Exception as error:  # the others wait, whatever it is
        bug = error
    failed = any_process(bool(fault) or bug is not None)
    if bug is not None:
        raise bug
    if failed:
        return None, fault or f"{what}: failed in another process, which says why."
    return found, ""


def all_alike(value) -> bool:
    """Whether `repr(value)` is the same on every process; all must ask."""
    if jax.process_count() == 1:
        return True
    digest = hashlib.sha256(repr(value).encode()).digest()
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))  # (processes, 8)
    return bool((found == found[0]).all())


def any_process(here: bool) -> bool:
    """Whether it is so on any process; all must ask."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def to_host(tree):
    """Arrays of all devices → whole NumPy arrays, on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


class Termination:
    """Notices SIGTERM, which schedulers send before they take a machine away, and of a run of one
    process Ctrl-C, which a second one makes end at once; a context manager.

    Args:
      start: the step that the run begins or goes on from.
    """

    def __init__(self, start: int):
        self._start = start

    def __enter__(self):
        self._asked, self._ends = False, Terminated
        # Of several processes JAX's own handler tells every one, so that all stop at one step.
        self._alone = jax.process_count() == 1
        # Python lets the main thread alone handle signals.
        self._handles = self._alone and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = {number: signal.signal(number, self._ask) for number in _ASKING}
        if not self._alone and self._start > 0:
            # JAX has all stop at the step after the highest that any has told it of. Of a signal
            # that came before, while the state was read, that is 1: a step of long ago. Asked
            # twice, for it may come to another process between.
            for step in (1, 2):
                here = multihost_utils.reached_preemption_sync_point(step)
                self._asked = any_process(here) or self._asked
            multihost_utils.reached_preemption_sync_point(self._start)
        return self

    def __exit__(self, *_):
        if self._handles:
            for number, before in self._before.items():
                signal.signal(number, before)

    def _ask(self, number, *_):
        if number == signal.SIGINT:
            if self._asked:  # for the second time
                raise KeyboardInterrupt
            self._ends = KeyboardInterrupt
            print("\nstops once the state is saved; Ctrl-C again: at once", file=sys.stderr)
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; all processes must ask, once a step, and get one answer."""
        if self._alone or self._asked:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)

    def ending(self, told: str) -> BaseException:
        """What ends a run that has saved its state, as it was asked to: Terminated, or where that
        was from the keyboard KeyboardInterrupt."""
        return self._ends(told)

    def asked_alone(self) -> bool:
        """Whether a run of one process was asked; of several, no process may stop on its own."""
        return self._alone and self._asked


def let_sigterm_end() -> None:
    """Lets SIGTERM end the process at once, where there is no state to save.

    Of several processes JAX's handler would go on for ever; and the first process of a container
    is spared by the system what it has no handler for.
    """
    if threading.current_thread() is threading.main_thread():
        first = os.getpid() == 1
        ends = (lambda *_: os._exit(TERMINATED)) if first else signal.SIG_DFL
        signal.signal(signal.SIGTERM, ends)


def leave(code: int) -> int:
    """Ends a process that failed, where there are others: at once, so that they are told. Alone it
    gets its exit code back.

    JAX would wait five minutes for them to come to their end too, and they for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class Terminated(Exception):
    """The run was asked to stop and has saved its state."""
