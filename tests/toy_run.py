"""The command line, with a model that is compiled in a moment, in processes to be killed.

All but the model is what a run is, and the imports, which take as long as all the rest: a server has
done them for every process that it forks.
"""

import multiprocessing
import os
import sys

import conftest  # noqa: F401 — before JAX, which reads its settings
import pytest
from absl import app
from processes import PATHS
from toy import Toy

from sammix_jax import main, train
from sammix_jax.systems.sam_mix import SamMixSystem

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["toy_run"])


def _run(arguments, output) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.make_system = lambda config: SamMixSystem(Toy(ballast=500_000), config)
    sys.argv = [__file__, *arguments]
    app.run(main.main, flags_parser=main._parse_flags)


def start(arguments, output):
    """Starts the command with these flags; what it prints goes into the file `output`."""
    process = _SERVER.Process(target=_run, args=(arguments, output))
    with pytest.MonkeyPatch.context() as patch:
        # The server begins with the first one, and does not always hear of this one's sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, PATHS)))
        process.start()
    return process
