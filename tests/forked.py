"""`python -m sammix_jax.main` in processes forked from one that has imported all that it needs.

Importing takes most of a short command's time. The command itself is imported by each process.
"""

import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import tempfile
import types

import conftest  # noqa: F401 — before JAX, which reads its settings
import pytest
from processes import PATHS, ROOT
from toy import Toy

from sammix_jax import evaluate, plan, predict, prepare, sweep, train  # noqa: F401
from sammix_jax.evaluation import report, seeds  # noqa: F401
from sammix_jax.pretrain import run as pretrain  # noqa: F401
from sammix_jax.systems.sam_mix import SamMixSystem

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["forked"])


def _command(arguments, outputs, toy: bool) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    if toy:
        train.make_system = lambda config: SamMixSystem(Toy(ballast=500_000), config)
    sys.argv[1:] = arguments
    try:
        runpy.run_module("sammix_jax.main", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # as Python ends a program; multiprocessing would print it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def start(arguments, stdout, stderr, toy: bool = False):
    """Starts the command; what it prints is added to two files, which may be one.

    Args:
      toy: takes a model that is compiled in a moment.
    """
    outputs = stdout, stderr
    process = _SERVER.Process(target=_command, args=(arguments, outputs, toy))
    with pytest.MonkeyPatch.context() as patch:
        # The server begins with the first one, and does not always hear of this one's sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, PATHS)))
        process.start()
    return process


def run(*arguments):
    """What the command returned and printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
        process = start(arguments, *files)
        process.join(600)
        process.kill()  # one that hangs
        process.join()
        return types.SimpleNamespace(
            returncode=process.exitcode, stdout=files[0].read_text(), stderr=files[1].read_text()
        )
