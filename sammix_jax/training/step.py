"""The training state and one step of it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sammix_jax.method.consistency import follow
from sammix_jax.models.blocks import gather_outside_blocks
from sammix_jax.sharding import BatchLayout, on_mesh, replicated
from sammix_jax.systems.system import Microbatch, System
from sammix_jax.training.optim import merge_params, split_params


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes.

    Gradients and moments cover `trainable` alone. Parameter dicts are flat, path → array.
    """

    step: jax.Array  # () int32
    trainable: dict
    frozen: dict
    batch_stats: dict
    opt_state: optax.OptState
    teacher: dict  # moving average of `trainable`; empty where nobody is taught

    @property
    def variables(self) -> dict:
        """What `model.apply` takes."""
        return {
            "params": merge_params(self.trainable, self.frozen),
            "batch_stats": self.batch_stats,
        }


def make_init(system: System, optimiser: optax.GradientTransformation, config):
    """Returns `init() -> TrainState`, to be jitted or evaluated abstractly."""

    def init() -> TrainState:
        images = jnp.zeros((1, config.data.size, config.data.size))
        variables = system.init(jax.random.key(config.seed), images)
        return new_state(variables, optimiser, config)

    return init


def new_state(variables: dict, optimiser: optax.GradientTransformation, config) -> TrainState:
    """The state of step 0.

    Args:
      variables: new ones of a model: "params", and "batch_stats" where there are.
      optimiser: of the run.
      config: the run's; reads `train.trainable` and whether there is a teacher.
    """
    patterns = config.train.trainable
    # Without LoRA there is none to match.
    optional = [p for p in patterns if "lora_" in p] if config.model.lora_rank == 0 else ()
    trainable, frozen = split_params(variables["params"], patterns, optional)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimiser.init(trainable),
        # Copies: the step donates its state, and one buffer cannot be given away twice.
        teacher=jax.tree.map(jnp.copy, trainable) if config.consistency.weight > 0 else {},
    )


def make_train_step(
    system: System,
    optimiser: optax.GradientTransformation,
    config,
    layout: BatchLayout,
    unroll: bool = False,
):
    """Returns `train_step(state, batch) -> (state, metrics)`, to be jitted.

    The batch is that of `sharding.place_batch`. Metrics are float32 scalars, and `leaf_norms`
    (2, N): norms of the gradient and of the new value of each trainable leaf, by path in order.

    Randomness is a function of (seed, step), so a resumed run repeats an uninterrupted one.

    Args:
      system, optimiser, config: of the run.
      layout: of the batches.
      unroll: write microbatches out one after another. As a loop they take less memory and
        compilation, but on a CPU XLA runs convolutions in a loop ten times slower than outside.
    """
    taught = config.consistency.weight > 0

    def loss_fn(trainable, state: TrainState, batch_stats, part: Microbatch):
        """The loss of one microbatch; aux: metrics and new batch statistics."""
        student = state.replace(trainable=trainable, batch_stats=batch_stats)
        teacher = state.replace(trainable=state.teacher)
        return system.loss(
            gather_outside_blocks(student.variables),
            part,
            gather_outside_blocks(teacher.variables) if taught else None,
        )

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        # A slice's key follows from its number, wherever it lies.
        keys = jax.random.split(key, layout.size)[layout.order]
        parts = jax.tree.map(layout.split_microbatches, batch | {"key": keys})
        labels = parts["image_label"]  # (A, B / A)

        def backward(batch_stats, part: dict):
            micro = Microbatch(**part, labels=labels, step=state.step, layout=layout.microbatch)
            gradient = jax.grad(loss_fn, has_aux=True)
            grads, (metrics, batch_stats) = gradient(state.trainable, state, batch_stats, micro)
            return batch_stats, (grads, metrics)

        batch_stats, (grads, metrics) = _accumulate(backward, state.batch_stats, parts, unroll)
        after, norms = apply_gradients(state, grads, optimiser)
        teacher = state.teacher
        if taught:
            teacher = follow(teacher, after.trainable, state.step, config.consistency.ema)
        return after.replace(batch_stats=batch_stats, teacher=teacher), metrics | norms

    return train_step


def apply_gradients(
    state: TrainState, grads: dict, optimiser: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes the optimiser's step.

    Returns:
      The state with its step counted; and "leaf_norms" (2, N), the norms of the gradient and of the
      new value of each leaf, by path in order, with "gradient_norm" and "parameter_norm" of all.
    """
    updates, opt_state = optimiser.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    norms = jnp.stack([_leaf_norms(grads), _leaf_norms(trainable)])
    of_all = jnp.linalg.norm(norms, axis=1)
    found = {"leaf_norms": norms, "gradient_norm": of_all[0], "parameter_norm": of_all[1]}
    state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state)
    return state, found


def jit_train_step(system: System, optimiser, config, layout: BatchLayout, mesh: Mesh, sharding):
    """The step as a run takes it, and as `plan` compiles it.

    Args:
      system, optimiser, config, layout: as for `make_train_step`.
      mesh: of the run.
      sharding: where the state lies; it stays there, and the old one is given up for the new.
    """
    step = make_train_step(
        system,
        optimiser,
        config,
        layout,
        unroll=mesh.devices.flat[0].platform == "cpu",
    )
    placed = (sharding, replicated(mesh))
    return jax.jit(on_mesh(mesh, step), out_shardings=placed, donate_argnums=0)


def _accumulate(backward, batch_stats, parts: dict, unroll: bool):
    """Runs `backward` on each of A microbatches in turn.

    Args:
      backward: `(batch_stats, part) -> (batch_stats, found)`.
      batch_stats: before the first.
      parts: leaves (A, ...).
      unroll: as in `make_train_step`.

    Returns:
      The last batch statistics and the mean of what was found.
    """
    count = len(jax.tree.leaves(parts)[0])
    one = jax.tree.map(lambda leaf: leaf[0], parts)
    if count == 1:  # without the sum, which takes a copy of every gradient
        return backward(batch_stats, one)

    def add(carry, part):
        batch_stats, total = carry
        batch_stats, found = backward(batch_stats, part)
        return (batch_stats, jax.tree.map(jnp.add, total, found)), None

    _, found = jax.eval_shape(backward, batch_stats, one)
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
    (batch_stats, total), _ = jax.lax.scan(add, (batch_stats, total), parts, unroll=unroll)
    return batch_stats, jax.tree.map(lambda leaf: leaf / count, total)


def _leaf_norms(leaves: dict) -> jax.Array:
    # Not of flattened leaves: one that is divided along another axis would be gathered first.
    return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(leaves)]))
