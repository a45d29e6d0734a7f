"""The training state and one step of it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from sammix_jax import losses
from sammix_jax.optim import merge_params, split_params
from sammix_jax.preprocess import augment, window
from sammix_jax.sam_mix import SamMix, SamMixOutput
from sammix_jax.weights import fill, load_weights

CLASSIFICATION_LOSSES = {"cross_entropy": losses.cross_entropy, "focal": losses.focal_loss}


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes.

    Gradients and moments cover `trainable` alone. Both parameter dicts are flat, path → array.
    """

    step: jax.Array  # () int32
    trainable: dict
    frozen: dict
    batch_stats: dict
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """What `model.apply` takes."""
        return {
            "params": merge_params(self.trainable, self.frozen),
            "batch_stats": self.batch_stats,
        }


def make_init(model: SamMix, optimiser: optax.GradientTransformation, config):
    """Returns `init() -> TrainState`, to be jitted or evaluated abstractly."""

    def init() -> TrainState:
        images = jnp.zeros((1, config.data.size, config.data.size))
        variables = model.init(jax.random.key(config.seed), images, labelled=1)
        trainable, frozen = split_params(variables["params"], config.train.trainable)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            frozen=frozen,
            batch_stats=variables["batch_stats"],
            opt_state=optimiser.init(trainable),
        )

    return init


def load_pretrained(state: TrainState, config) -> TrainState:
    """Puts the values of `model.sam_weights` and `model.classifier_weights` in a new state.

    LoRA and the classifier's head keep their random start. Arrays go straight to where the state's
    lie, not through a compiled program, which would hold them as constants.

    Raises:
      UserError: a file that is missing, of another model, or does not fit leaf by leaf.
    """
    stats = traverse_util.flatten_dict(state.batch_stats, sep="/")
    values = {}
    for prefix, file, model, may_lack in (
        ("sam", config.model.sam_weights, config.model.sam, (r".*/lora_[qkv]/[ab]",)),
        ("classifier", config.model.classifier_weights, config.model.classifier, (r"head/.*",)),
    ):
        if file:
            weights = load_weights(file, prefix, model)
            leaves = state.trainable | state.frozen | stats
            values |= fill(leaves, weights, prefix, source=file, may_lack=may_lack)

    def replaced(leaves: dict) -> dict:
        return {
            path: jax.device_put(values[path], leaf.sharding) if path in values else leaf
            for path, leaf in leaves.items()
        }

    return state.replace(
        trainable=replaced(state.trainable),
        frozen=replaced(state.frozen),
        batch_stats=traverse_util.unflatten_dict(replaced(stats), sep="/"),
    )


def make_train_step(model: SamMix, optimiser: optax.GradientTransformation, config):
    """Returns `train_step(state, batch) -> (state, metrics)`; see `data.batches` for the batch.

    Randomness is a function of (seed, step), so a resumed run repeats an uninterrupted one.
    """

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        images = window(batch["hu"], config.input.window)  # (B, H, W)
        masks = batch["mask"].astype(jnp.float32)  # (L, H, W)
        if config.train.augment:
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            images, masks = augment(images, masks, key)

        def loss_fn(trainable):
            output, updates = model.apply(
                state.replace(trainable=trainable).variables,
                images,
                labelled=len(masks),
                train=True,
                mutable=["batch_stats"],
            )
            loss, metrics = sam_mix_loss(output, masks, batch["organ_present"], config.loss)
            return loss, (metrics, updates["batch_stats"])

        gradient = jax.grad(loss_fn, has_aux=True)
        grads, (metrics, batch_stats) = gradient(state.trainable)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["parameter_norm"] = optax.tree.norm(trainable)
        new_state = state.replace(
            step=state.step + 1,
            trainable=trainable,
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return new_state, metrics

    return train_step


def sam_mix_loss(
    output: SamMixOutput, masks: jax.Array, organ_present: jax.Array, weights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The multitask loss: classification of every slice, segmentation of the labelled ones.

    Args:
      output: of B slices, the first L segmented.
      masks: (L, H, W) in {0, 1}.
      organ_present: (B,) int32 in {0, 1}.
      weights: `config.loss`.

    Returns:
      The loss, and its parts by name; scalars.
    """
    classify = CLASSIFICATION_LOSSES[weights.classifier]
    classification = classify(output.class_logits, organ_present)
    dice = losses.dice_loss(output.masks.logits, masks, smooth=weights.dice_smooth)
    segmentation = dice
    if weights.bce:
        segmentation += weights.bce * losses.bce_loss(output.masks.logits, masks)
    if weights.iou:
        candidates = output.masks.candidates  # (L, M, H, W)
        truth = jnp.broadcast_to(masks[:, None], candidates.shape)
        segmentation += weights.iou * losses.iou_loss(output.masks.iou, candidates, truth)
    loss = weights.classification * classification + weights.segmentation * segmentation
    predicted = jnp.argmax(output.class_logits, axis=-1)
    return loss, {
        "loss": loss,
        "classification_loss": classification,
        "dice_loss": dice,
        "accuracy": jnp.mean((predicted == organ_present).astype(jnp.float32)),
        "empty_cams": jnp.mean(output.prompt.empty.astype(jnp.float32)),
    }
