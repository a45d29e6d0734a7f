"""What a run reports while it trains: TensorBoard curves and the same numbers as CSV."""

import contextlib
import csv
import logging
import pathlib
import tempfile
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from sammix_jax import hosts
from sammix_jax.data.files import local_copy, whole_file, write_csv
from sammix_jax.data.paths import as_path, is_remote
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

METRICS = "metrics.csv"
COLUMNS = ("step", "metric", "value")
# An object store takes files whole, and each of them about once a second.
SECONDS_BETWEEN_UPLOADS = 10


class TrainLog:
    """Appends to WORKDIR/metrics.csv and WORKDIR/tensorboard; a context manager.

    For a workdir in an object store both are written on this machine, and copied there every few
    seconds and at the end. What cannot be written or copied is told, and ends no run: it goes with
    the next. Of several processes the first one's are kept.

    Args:
      workdir: the run's folder.
      start: the step the run starts from. Rows past it, from an interrupted run whose last steps
        are repeated, are dropped.
    """

    def __init__(self, workdir, start: int):
        self._workdir = as_path(workdir)
        self._remote = is_remote(self._workdir) and hosts.is_first()
        self._uploaded = time.monotonic()
        here = not is_remote(self._workdir) and hosts.is_first()
        self._temporary = None if here else tempfile.TemporaryDirectory()
        self._folder = self._workdir if here else pathlib.Path(self._temporary.name)
        rows = [row for row in read_log(workdir) if row[0] <= start]
        path = self._folder / METRICS
        write_csv(path, COLUMNS, rows)
        self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 — closed in __exit__
        self._csv = csv.writer(self._file, lineterminator="\n")
        # Not by `SummaryWriter`: its thread ends at the first write that fails, and when the queue
        # before it is full, the run would wait for ever.
        folder = self._folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # TensorBoard hides what it has from here on, and the step that was reached stays.
        log = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=start + 1, wall_time=time.time(), session_log=log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for part in (self._file, self._events):
            with self._telling():
                part.close()
        if self._remote:
            self._upload()
        if self._temporary:
            self._temporary.cleanup()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with self._telling():
            self._csv.writerows((step, name, f"{value:.6g}") for name, value in metrics.items())
            self._file.flush()
        with self._telling():
            values = [Summary.Value(tag=tag, simple_value=v) for tag, v in metrics.items()]
            summary = Summary(value=values)
            self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self._events.flush()
        if self._remote and time.monotonic() - self._uploaded > SECONDS_BETWEEN_UPLOADS:
            self._upload()

    @contextlib.contextmanager
    def _telling(self):
        try:
            yield
        except OSError as error:  # what was not written stays in the file's buffer
            _LOG.warning("%s: could not be written (%s)", self._folder, error)

    def _upload(self) -> None:
        for path in self._folder.rglob("*"):
            if path.is_file():
                target = self._workdir / path.relative_to(self._folder)
                try:
                    with whole_file(target) as partial:
                        partial.write_bytes(path.read_bytes())
                except UserError as error:  # no reason to end a run
                    _LOG.warning("%s", error)
        self._uploaded = time.monotonic()


def read_log(workdir) -> list[tuple[int, str, float]]:
    """The rows of WORKDIR/metrics.csv: step, metric, value."""
    path = as_path(workdir) / METRICS
    if not path.exists():
        return []
    rows = []
    with local_copy(path) as local, open(local, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append((int(row["step"]), row["metric"], float(row["value"])))
            except (TypeError, ValueError):
                # A killed process may leave its last row half-written; that step is repeated.
                continue
    return rows
