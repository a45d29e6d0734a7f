"""What the tests of training share."""

import pytest
from toy import Toy

from sammix_jax import train as train_module
from sammix_jax.systems.sam_mix import SamMixSystem


@pytest.fixture
def toy_config(config, monkeypatch):
    """A config whose model is compiled in a moment."""
    monkeypatch.setattr(train_module, "make_system", lambda c: SamMixSystem(Toy(), c))
    config.data.split = (3, 0, 1)
    config.train.steps, config.train.augment = 12, False
    config.checkpoint.every_steps = 4
    config.log.every_steps = 100
    return config
