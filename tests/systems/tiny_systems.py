"""Every system in a size that compiles in seconds, and a batch for it."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import small_config

from sammix_jax.config_rules import check_config
from sammix_jax.models.baselines.transunet import VARIANTS
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import PROTOCOLS, Microbatch

SIDE = 32
SETTINGS = {
    "unet": {"model.widths": (4, 6, 8)},
    "nnunet": {"model.widths": (4, 4, 6, 8), "train.optimiser": "sgd"},
    "multimix": {"model.widths": (4, 6, 8), "multimix.kl_form": "bernoulli"},
    "transunet": {"model.transunet": "mini"},
    "prompted_sam": {"model.mask_choice": "single"},
    "prompted_sam_points": {
        "model.prompt": "points",
        "model.mask_choice": "single",
        "loss.negatives": False,
    },
}


def tiny_config(name: str, **settings):
    config = small_config()
    config.data.size = config.model.image_size = SIDE
    config.model.system = name.removesuffix("_points")
    config.train.trainable = (".*",)
    config.train.batch_labelled = config.train.batch_unlabelled = 2
    config.train.augment = False
    config.train.schedule, config.train.warmup_steps = "constant", 0
    config.loss.negatives, config.loss.bce, config.loss.segmentation = True, 1.0, 1.0
    config.evaluate.protocols = PROTOCOLS
    config.update_from_flattened_dict(SETTINGS[name] | settings)
    check_config(config)
    return config


def tiny_system(config):
    system = make_system(config)
    if config.model.system != "transunet":
        return system
    variant = VARIANTS["mini"]._replace(width=16, layers=1)
    return type(system)(system.model.clone(variant=variant), config)


def batch_of(labelled: int = 2, others: int = 2) -> dict[str, np.ndarray]:
    """Bright squares on noise; the first of the others is empty, the second's label unknown."""
    rng = np.random.default_rng(0)
    masks = np.zeros((labelled, SIDE, SIDE), np.uint8)
    masks[:, 8:20, 10:26] = 1
    hu = rng.normal(0, 40, (labelled + others, SIDE, SIDE))
    hu[:labelled] += 100 * masks
    label = np.array([1] * labelled + [0, -1] * (others // 2), np.int32)
    return {"hu": hu.astype(np.int16), "mask": masks, "image_label": label}


def microbatch(layout: BatchLayout, batch: dict, labels=None) -> Microbatch:
    keys = jax.random.split(jax.random.key(1), layout.size)
    labels = batch["image_label"][None] if labels is None else labels
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    return Microbatch(
        **arrays, key=keys, labels=jnp.asarray(labels), step=jnp.array(0), layout=layout
    )
