"""Which parameters are trained, and how."""

import re
from collections.abc import Container

import optax
from flax import traverse_util

from sammix_jax.errors import UserError
from sammix_jax.models.sam.sam import CONSTANTS

SCHEDULES = ("constant", "cosine", "poly")
OPTIMISERS = ("adam", "sgd")
# nnU-Net's (Isensee et al. 2021, Nature Methods 18).
MOMENTUM, POWER = 0.99, 0.9


def split_params(
    params: dict, patterns: tuple[str, ...], optional: Container[str] = ()
) -> tuple[dict, dict]:
    """Splits a parameter tree into what is trained and what is frozen, as SAM's `CONSTANTS` are.

    Args:
      params: nested dict of arrays, or of their shapes.
      patterns: regular expressions; a path such as `sam/mask_decoder/iou_token` that one matches
        whole is trained.
      optional: those of the patterns that may match nothing.

    Returns:
      Two flat dicts, path → array: trainable and frozen.

    Raises:
      UserError: a pattern that matches nothing, most likely a misspelt one.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in patterns:
        if pattern not in optional and not any(re.fullmatch(pattern, path) for path in flat):
            top = sorted({"/".join(path.split("/")[:2]) for path in flat})
            raise UserError(
                f"train.trainable: the pattern {pattern!r} matches no parameter; paths begin with "
                f"{', '.join(top)}."
            )
    trained = {
        path
        for path in flat
        if any(re.fullmatch(pattern, path) for pattern in patterns) and not path.endswith(CONSTANTS)
    }
    return (
        {path: array for path, array in flat.items() if path in trained},
        {path: array for path, array in flat.items() if path not in trained},
    )


def merge_params(trainable: dict, frozen: dict) -> dict:
    """The nested tree that `split_params` took apart."""
    return traverse_util.unflatten_dict(trainable | frozen, sep="/")


def make_optimiser(config, steps: int) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, or SGD with Nesterov momentum, whose decay is a part of the
    gradient; on kernels, where asked for.

    While the classifier warms up, the others' optimiser waits too: Adam would take steps without a
    gradient for a small one, and overshoot by several times the rate at the first that has one.

    Args:
      config: the `train` section.
      steps: length of the run, over which a schedule decays.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    wait = config.classifier_warmup_steps
    if not wait:
        return optax.chain(clip, _descent(config, steps))
    later = _descent(config, max(steps - wait, 1))
    parts = {
        True: _descent(config, steps),
        False: optax.transforms.conditionally_mask(later, lambda step: step >= wait),
    }
    return optax.chain(clip, optax.partition(parts, _is_classifiers))


def _descent(config, steps: int) -> optax.GradientTransformation:
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, max(steps, config.warmup_steps + 1)
        )
    else:
        after = optax.constant_schedule(config.learning_rate)
        if config.schedule == "poly":
            left = max(steps - config.warmup_steps, 1)
            after = optax.polynomial_schedule(config.learning_rate, 0.0, POWER, left)
        rise = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
        rate = optax.join_schedules([rise, after], [config.warmup_steps])
    if config.optimiser == "sgd":
        decay = optax.add_decayed_weights(config.weight_decay, mask=_is_decayed)
        return optax.chain(decay, optax.sgd(rate, momentum=MOMENTUM, nesterov=True))
    return optax.adamw(rate, b2=config.adam_b2, weight_decay=config.weight_decay, mask=_is_decayed)


def _is_classifiers(params: dict) -> dict:
    return {path: path.startswith("classifier/") for path in params}


def _is_decayed(params: dict) -> dict:
    """Kernels and LoRA's factors; no biases, norms, tokens or position tables."""
    return {path: path.rsplit("/", 1)[-1] in ("kernel", "a", "b") for path in params}
