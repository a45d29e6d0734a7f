"""The loop of a run: steps, log, validation and checkpoints, until the last step or a signal."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable

import jax
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.data.batches import prefetch
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.log import TrainLog, read_log
from sammix_jax.training.monitor import Profile, Progress, Timer, memory, refuse_not_finite
from sammix_jax.training.step import TrainState

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Validation:
    """How a run measures itself while it trains.

    Attributes:
      measure: `(state, stop) -> scores`; raises `hosts.Terminated` where `stop()` says so.
      best: name of the score by which the best checkpoint is chosen, where it is among them.
    """

    measure: Callable[[TrainState, Callable[[], bool]], dict[str, float]]
    best: str


def run_steps(
    state: TrainState,
    train_step,
    batch_of,
    steps: int,
    *,
    config,
    workdir,
    checkpoints: Checkpoints,
    images: int,
    validation: Validation | None = None,
    owes: bool = False,
) -> TrainState:
    """Takes the steps that are left.

    Args:
      state: of the step to begin with; given up for the returned one.
      train_step: `(state, batch) -> (state, metrics)`, jitted.
      batch_of: `step -> batch`, on the devices.
      steps: at which the run ends.
      config: the run's; reads `log` and `checkpoint`.
      workdir: receives metrics.csv and tensorboard.
      checkpoints: of the workdir.
      images: in a batch, for the throughput.
      validation: at every `log.validate_every_steps`, and after the last step; None does without.
      owes: whether to begin with a validation of `state`, as `owes_validation` says.

    Raises:
      UserError: a number that is not finite.
      hosts.Terminated: SIGTERM, once the state is saved; at Ctrl-C KeyboardInterrupt.
    """
    start = int(state.step)
    save_steps = save_interval(config.checkpoint.every_steps)
    before, timer, paths = None, Timer(), sorted(state.trainable)

    def validate_at(step: int, stop=lambda: False) -> None:
        with timer.part("validation"):
            scores = validation.measure(state, stop)
            best = validation.best in scores and checkpoints.save_best(
                state, step, scores[validation.best]
            )
            if best:  # kept before the log says that this step was validated
                checkpoints.wait()
        # Where there is nothing to score, that this step was validated.
        named = scores or {"scored": 0.0}
        log.write(step, {f"val/{name}": value for name, value in named.items()})
        listed = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        kept = ", the best so far" if best else ""
        _LOG.info("step %d of %d: validation %s%s", step, steps, listed, kept)

    def save(step: int) -> None:
        with timer.part("checkpoint"):
            checkpoints.save(state, step)

    quiet = hosts.hides_progress()
    with (
        TrainLog(workdir, start) as log,
        hosts.Termination(start) as termination,
        Profile(workdir, *config.log.profile) as profile,
        contextlib.closing(prefetch(batch_of, start, steps)) as ahead,
        tqdm(initial=start, total=steps, desc="train", unit="step", disable=quiet) as bar,
    ):
        progress = Progress(start, steps, seen=not bar.disable)
        if owes:
            try:
                validate_at(start, termination.asked_alone)
            except hosts.Terminated as stopped:
                told = f"stopped in the validation of step {start}, which is saved"
                raise termination.ending(told) from stopped
        if start < steps:
            _LOG.info("compiling the step, which may take minutes")
        for done in range(start + 1, steps + 1):
            first = done == start + 1
            profile.at(done - 1)
            with timer.part("data"):
                _, batch = next(ahead)
            # Only what is asked for moves between host and device.
            with (
                timer.part("compilation" if first else "step"),
                jax.transfer_guard("disallow"),
            ):
                state, metrics = train_step(state, batch)
                # The step before has ended or is about to: looking at it delays nothing.
                if before is not None:
                    refuse_not_finite(done - 1, before, paths)
                before = metrics
            bar.update()
            if first:
                progress.begin(done)
            due = _due(done, steps)
            told = due(config.log.every_steps)
            # All processes ask after each step, and stop at the same one, where there is no
            # time to validate.
            stop = termination.asked(done)
            validates = validation and due(config.log.validate_every_steps) and not stop
            saves = stop or due(save_steps)
            if told or validates or saves:
                with timer.part("step"):
                    refuse_not_finite(done, metrics, paths)
            timer.count(images)
            if told:
                values = {k: float(v) for k, v in jax.device_get(metrics).items() if not v.ndim}
                values |= timer.report() | memory()
                log.write(done, {f"train/{name}": value for name, value in values.items()})
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                progress.tell(done, values["loss"], values["slices_per_second"])
            # Before validation, which takes long: a run that is stopped in it goes on from here,
            # and validates then.
            if saves:
                save(done)
            if validates:
                try:
                    validate_at(done, termination.asked_alone)
                except hosts.Terminated:
                    stop = True
                    save(done)
            if stop or config.checkpoint.every_steps == 1:
                with timer.part("checkpoint"):
                    checkpoints.wait()
            if stop:
                raise termination.ending(f"stopped after step {done} of {steps}, which is saved")
        # Several processes are told at the step after, of which the last one has none; and a run
        # that had none left to take may have been asked while it validated.
        if termination.asked(steps + 1):
            checkpoints.wait()
            raise termination.ending(f"stopped after step {steps} of {steps}, which is saved")
    return state


def owes_validation(config, workdir, step: int, steps: int) -> bool:
    """Whether a run that goes on from this step has still to validate it: one that was stopped
    there saved it, and had no time. All processes must ask.

    Args:
      config: the run's; reads `log.validate_every_steps`.
      workdir: whose log tells what was validated.
      step: of the state that was saved.
      steps: at which the run ends.
    """
    if not step or not _due(step, steps)(config.log.validate_every_steps):
        return False
    validated = {done for done, name, _ in read_log(workdir) if name.startswith("val/")}
    # One answer: where the log is in a bucket, some may read it before it is written there.
    return hosts.any_process(step not in validated)


def save_interval(every_steps: int) -> int:
    """Steps between checkpoints, so that a run killed at any moment loses `every_steps` at most.

    A save goes on while the next steps are taken, and dies with the process; the one before it must
    lie near enough. Saves wait for one another, so half the interval suffices.
    """
    return max(1, every_steps // 2)


def _due(done: int, steps: int):
    return lambda every: done % every == 0 or done == steps
