"""Trains SAM-Mix, or a system that it is compared with; read from top to bottom."""

import contextlib
import logging
import math

import jax
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.checkpoint import Checkpoints, abstract
from sammix_jax.config import check_workdir, claim_workdir
from sammix_jax.data.batches import Batches, prefetch
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.data.splits import Split, keep, load_or_draw
from sammix_jax.errors import UserError
from sammix_jax.inference import make_predict
from sammix_jax.monitor import Profile, Timer, memory, refuse_not_finite
from sammix_jax.optim import make_optimiser
from sammix_jax.sharding import (
    batch_layout,
    make_mesh,
    place_batch,
    state_sharding,
)
from sammix_jax.systems.named import make_system
from sammix_jax.train_log import TrainLog, read_log
from sammix_jax.train_step import jit_train_step, load_pretrained, make_init
from sammix_jax.validate import validate

_LOG = logging.getLogger(__name__)


def train(config, workdir, store: SliceStore) -> bool:
    """Trains until `config.train.steps` or `.epochs`, from the newest checkpoint if there is one.

    Args:
      config: the run's config.
      workdir: receives config.json, split.json, labels.json, checkpoints, metrics.csv and
        tensorboard.
      store: the prepared slices.

    Returns:
      Whether any step was left to take.

    Raises:
      UserError: a config or data set that cannot train; a number that is not finite.
      hosts.Terminated: SIGTERM, once the state is saved.
    """
    check_workdir(config, workdir)

    # ---- Mesh
    mesh = make_mesh(config.mesh.fsdp)
    layout = batch_layout(config.train, mesh)

    # ---- Data
    split, labelled = load_or_draw(config, store, workdir)
    if not config.evaluate.root and not split.part(config.evaluate.part):
        raise UserError(
            f"evaluate.part={config.evaluate.part}: that part of the split is empty, so the model "
            "could not be scored; choose another, as in --config.evaluate.part=train."
        )
    others = slices_without_masks(config, store, split, labelled)
    sizes = (layout.labelled, layout.unlabelled)
    batches = Batches(store, tuple(labelled), others, sizes, config.seed)
    steps = config.train.steps or math.ceil(config.train.epochs * batches.steps_per_epoch)

    # ---- System and optimiser
    system = make_system(config)
    optimiser = make_optimiser(config.train, steps)

    # ---- State: abstract first, then restored or initialised straight onto the mesh
    init = make_init(system, optimiser, config)
    shapes = jax.eval_shape(init)
    sharding = state_sharding(shapes, mesh, config.mesh.shard_frozen)
    like = abstract(shapes, sharding)
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        checkpoints.check_config(config)
        state = checkpoints.restore(like)
        if state is None:
            state = load_pretrained(jax.jit(init, out_shardings=sharding)(), config)
        # Data, model and weights are sound: from here on the workdir belongs to this run.
        claim_workdir(config, workdir)
        keep(split, labelled, store, workdir)
        checkpoints.save_config(config)
        checkpoints.save_frozen(state)
        start = int(state.step)
        _LOG.info(
            "training from step %d to %d: %d labelled slices, %d without a mask, "
            "%s trained of %s parameters, on %d %s device(s)",
            start,
            steps,
            len(labelled),
            len(others),
            f"{_count(like.trainable):,}",
            f"{_count(like.trainable) + _count(like.frozen):,}",
            mesh.size,
            mesh.devices.flat[0].platform,
        )
        if start >= steps:
            if not steps:  # the weights as they are loaded are what is to be scored
                checkpoints.save(state, 0)
                checkpoints.wait()
            return False

        # ---- Step
        train_step = jit_train_step(system, optimiser, config, layout, mesh, sharding)
        # Gated whatever is reported, so that all scores of a run compare.
        predict = make_predict(system, config, (system.headline,), gate=True)

        # ---- Loop
        save_steps = save_interval(config.checkpoint.every_steps)
        quiet = None if hosts.is_first() else True
        batch_of = lambda step: place_batch(batches, step, layout, mesh)  # noqa: E731
        before, timer, paths = None, Timer(), sorted(like.trainable)

        def validate_at(step: int, stop=lambda: False) -> None:
            with timer.part("validation"):
                variables, batch = state.variables, config.evaluate.batch
                scores = validate(
                    predict, variables, store, split.val, batch, stop, system.headline
                )
                if "dice" in scores:
                    checkpoints.save_best(state, step, scores["dice"])
            log.write(step, {f"val/{name}": value for name, value in scores.items()})
            listed = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            _LOG.info("step %d of %d: validation %s", step, steps, listed)

        # A run that was stopped at such a step saved it, and had no time to validate.
        validated = {step for step, name, _ in read_log(workdir) if name.startswith("val/")}
        owed = start and start % config.log.validate_every_steps == 0 and start not in validated
        with (
            TrainLog(workdir, start) as log,
            hosts.Termination() as termination,
            Profile(workdir, *config.log.profile) as profile,
            contextlib.closing(prefetch(batch_of, start, steps)) as ahead,
            tqdm(initial=start, total=steps, desc="train", unit="step", disable=quiet) as bar,
        ):
            if split.val and owed:
                validate_at(start)
            for done in range(start + 1, steps + 1):
                profile.at(done - 1)
                with timer.part("data"):
                    _, batch = next(ahead)
                # Only what is asked for moves between host and device.
                with timer.part("step"), jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                    # The step before has ended or is about to: looking at it delays nothing.
                    if before is not None:
                        refuse_not_finite(done - 1, before, paths)
                    before = metrics
                bar.update()
                due = _due(done, steps)
                told = due(config.log.every_steps)
                # All processes ask after each step, and stop at the same one, where there is no
                # time to validate; the last step ends the run anyway.
                stop = termination.asked(done) and done < steps
                validates = split.val and due(config.log.validate_every_steps) and not stop
                saves = stop or due(save_steps)
                if told or validates or saves:
                    with timer.part("step"):
                        refuse_not_finite(done, metrics, paths)
                timer.count(sum(sizes))
                if told:
                    values = {k: float(v) for k, v in jax.device_get(metrics).items() if not v.ndim}
                    values |= timer.report() | memory()
                    log.write(done, {f"train/{name}": value for name, value in values.items()})
                    bar.set_postfix(loss=f"{values['loss']:.3f}")
                if validates:
                    try:
                        validate_at(done, lambda: termination.asked_alone() and done < steps)  # noqa: B023
                    except hosts.Terminated:
                        stop = saves = True
                # After validation: a run that is killed in it validates again.
                if saves:
                    with timer.part("checkpoint"):
                        checkpoints.save(state, done)
                        if stop or config.checkpoint.every_steps == 1:
                            checkpoints.wait()
                if stop:
                    raise hosts.Terminated(f"stopped after step {done} of {steps}, which is saved")
    return True


def save_interval(every_steps: int) -> int:
    """Steps between checkpoints, so that a run killed at any moment loses `every_steps` at most.

    A save goes on while the next steps are taken, and dies with the process; the one before it must
    lie near enough. Saves wait for one another, so half the interval suffices.
    """
    return max(1, every_steps // 2)


def slices_without_masks(
    config, store: SliceStore, split: Split, labelled: list[SliceId]
) -> tuple[SliceId, ...]:
    """All other slices of the training patients; where there is a teacher, whose lessons need no
    label of any kind, those of unlabelled scans too."""
    scans = split.train
    if config.consistency.weight > 0:
        scans += tuple(name for name, record in store.records.items() if not record.has_label)
    taken = set(labelled)
    return tuple(s for scan in scans for s in store.slices(scan) if s not in taken)


def _due(done: int, steps: int):
    return lambda every: done % every == 0 or done == steps


def _count(parameters: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))
