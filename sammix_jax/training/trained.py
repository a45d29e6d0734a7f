"""A trained workdir's model."""

import logging
import math
from typing import NamedTuple

import jax

from sammix_jax.data.paths import as_path
from sammix_jax.errors import UserError
from sammix_jax.sharding import abstract_state, make_mesh
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import System
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import make_init

_LOG = logging.getLogger(__name__)


class TrainedModel(NamedTuple):
    """A system, its variables, and the step whose checkpoint they are of."""

    system: System
    variables: dict
    step: int


def load_model(config, workdir) -> TrainedModel:
    """The trained system of a workdir, the best by validation.

    Raises:
      UserError: the workdir has no checkpoint, or one whose weights were trained on other input.
    """
    folder = as_path(workdir) / "checkpoints"
    if not folder.exists():
        raise UserError(f"{folder}: no checkpoint there; train the workdir first.")
    system = make_system(config)
    # There may be fewer devices than trained it.
    mesh = make_mesh(math.gcd(config.mesh.fsdp, jax.device_count()))
    init = make_init(system, make_optimiser(config.train, steps=1), config)
    like = abstract_state(init, mesh, config.mesh.shard_frozen)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        checkpoints.check_preprocessing(config)
        state = checkpoints.restore_best(like)
    _LOG.info("%s: the model of step %d", workdir, state.step)
    return TrainedModel(system, state.variables, int(state.step))
