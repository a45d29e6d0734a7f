"""What a training run watches of itself: soundness, time, memory and traces."""

import contextlib
import logging
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# Finite before a state is kept: loss and gradients of the step, and the parameters it made.
SOUND = ("loss", "gradient_norm", "parameter_norm")
_NAMED = 5  # culprits that an error spells out

# Parts of the loop that come now and then, and are left out of the slices per second.
APART = ("compilation", "validation", "checkpoint")
TOLD_SECONDS = 30.0  # between lines of a log that nobody sees a progress bar beside


def refuse_not_finite(step: int, metrics: dict[str, jax.Array], paths: Sequence[str]) -> None:
    """Waits for a step and checks its numbers.

    Args:
      step: its number.
      metrics: of `train_step`.
      paths: of the trainable leaves, in the order of `leaf_norms`.

    Raises:
      UserError: a number that is not finite; names the losses, and the leaves of which the gradient
        or the value is not.
    """
    watched = jax.device_get({name: metrics[name] for name in SOUND})
    if all(np.isfinite(value) for value in watched.values()):
        return
    found = jax.device_get(metrics)
    gradients, values = np.isfinite(found.pop("leaf_norms"))
    culprits = [name for name, value in found.items() if not np.isfinite(value)]
    for what, sound in (("gradient of", gradients), ("value of", values)):
        bad = [f"{what} {path}" for path, ok in zip(paths, sound, strict=True) if not ok]
        more = [f"{len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
        culprits += bad[:_NAMED] + more
    raise UserError(
        f"step {step}: {', '.join(culprits)} is not finite; what was saved before is sound. Lower "
        "train.learning_rate, or set train.clip_norm, in a new workdir."
    )


class Timer:
    """Seconds spent in each part of the loop since the last report."""

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self._seconds = defaultdict(float)
        self._start, self._slices = time.monotonic(), 0

    @contextlib.contextmanager
    def part(self, name: str):
        """Counts the block's time; blocks do not nest."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - begin

    def count(self, slices: int) -> None:
        """A step with as many slices has ended."""
        self._slices += slices

    def report(self) -> dict[str, float]:
        """`slices_per_second` and `seconds/PART`; begins anew."""
        apart = sum(self._seconds[name] for name in APART)
        elapsed = time.monotonic() - self._start - apart
        found = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        found["slices_per_second"] = self._slices / elapsed
        self._begin()
        return found


class Progress:
    """Tells in the log how far a run is, where nobody sees a progress bar.

    Args:
      start, steps: of the run.
      seen: whether there is a bar.
    """

    def __init__(self, start: int, steps: int, seen: bool):
        self._steps, self._seen = steps, seen
        self.begin(start)
        self._told = self._begin

    def begin(self, done: int) -> None:
        """Reckons the time that is left from here on."""
        self._start, self._begin = done, time.monotonic()

    def tell(self, done: int, loss: float, slices_per_second: float) -> None:
        """To be called now and then; what comes sooner than `TOLD_SECONDS` is not told."""
        now = time.monotonic()
        if self._seen or now - self._told < TOLD_SECONDS or done == self._start:
            return
        self._told = now
        left = (self._steps - done) * (now - self._begin) / (done - self._start)
        _LOG.info(
            "step %d of %d: loss %.3f, %.1f slices/s, %s left",
            *(done, self._steps, loss, slices_per_second, tqdm.format_interval(left)),
        )


def memory() -> dict[str, float]:
    """Peaks in MiB: of the first device where it keeps account, and of this process."""
    unit = 1 if sys.platform == "darwin" else 2**10
    peaks = {"host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    device = jax.local_devices()[0].memory_stats()
    if device and "peak_bytes_in_use" in device:
        peaks["device_mib"] = device["peak_bytes_in_use"] / 2**20
    return peaks


class Profile:
    """Traces some steps with `jax.profiler` into WORKDIR/profile; a context manager.

    Args:
      workdir: the run's folder.
      start, stop: steps from 0, the last one left out; none where they are equal.
    """

    def __init__(self, workdir, start: int, stop: int):
        self._folder, self._start, self._stop = f"{workdir}/profile", start, stop
        self._traces = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def at(self, step: int) -> None:
        """To be called before each step."""
        if step == self._stop:
            self._end()
        elif self._start <= step < self._stop and not self._traces and hosts.is_first():
            jax.profiler.start_trace(self._folder)
            self._traces = True

    def _end(self) -> None:
        if self._traces:
            self._traces = False
            try:
                jax.profiler.stop_trace()
            except jax.errors.JaxRuntimeError as error:  # such as a store it cannot write to
                _LOG.warning("%s: the trace could not be written: %s", self._folder, error)
