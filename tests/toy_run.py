"""The command line, with a model that is compiled in a moment: `python tests/toy_run.py FLAGS`.

A process of its own, to be killed: all but the model is what a run is.
"""

import conftest  # noqa: F401 — before JAX, which reads its settings
from absl import app
from toy import Toy

from sammix_jax import main, train

train.sam_mix = lambda config: Toy(ballast=500_000)

if __name__ == "__main__":
    app.run(main.main, flags_parser=main._parse_flags)
