"""The systems by the names that `model.system` takes."""

from sammix_jax.systems.multimix import MultiMixSystem
from sammix_jax.systems.prompted_sam import PromptedSamSystem
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.systems.segmenter import NnUnetSystem, TransUNetSystem, UNetSystem
from sammix_jax.systems.system import System

SYSTEMS: dict[str, type[System]] = {
    "sam_mix": SamMixSystem,
    "unet": UNetSystem,
    "nnunet": NnUnetSystem,
    "multimix": MultiMixSystem,
    "transunet": TransUNetSystem,
    "prompted_sam": PromptedSamSystem,
}
HOLD_SAM = ("sam_mix", "prompted_sam")


def make_system(config) -> System:
    """The system that a config describes; `config_rules.check_config` says what it may hold."""
    return SYSTEMS[config.model.system].of(config)
