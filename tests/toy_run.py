"""The command line, with a model that is compiled in a moment: `python tests/toy_run.py FLAGS`.

A process of its own, to be killed: all but the model is what a run is.
"""

import conftest  # noqa: F401 — before JAX, which reads its settings
from absl import app
from toy import Toy

from sammix_jax import main, train
from sammix_jax.systems.sam_mix import SamMixSystem

train.make_system = lambda config: SamMixSystem(Toy(ballast=500_000), config)

if __name__ == "__main__":
    app.run(main.main, flags_parser=main._parse_flags)
