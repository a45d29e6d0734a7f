"""What a run reports while it trains: TensorBoard curves and the same numbers as CSV."""

import csv
import logging
import pathlib
import tempfile
import time

from tensorboardX import SummaryWriter

from sammix_jax import hosts
from sammix_jax.data.files import local_copy, whole_file
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
    seconds and at the end; a copy that fails is told, and the next one holds all of it. Of several
    processes the first one's are kept.

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
        with whole_file(path) as partial, open(partial, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        self._file = open(path, "a", newline="")  # noqa: SIM115 — closed in __exit__
        self._csv = csv.writer(self._file)
        # TensorBoard hides what it has from `purge_step` on, and the step that was reached stays.
        folder = str(self._folder / "tensorboard")
        self._tensorboard = SummaryWriter(folder, purge_step=start + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._tensorboard.close()
        if self._remote:
            self._upload()
        if self._temporary:
            self._temporary.cleanup()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._csv.writerow((step, name, f"{value:.6g}"))
            self._tensorboard.add_scalar(name, value, step)
        self._file.flush()
        if self._remote and time.monotonic() - self._uploaded > SECONDS_BETWEEN_UPLOADS:
            self._tensorboard.flush()
            self._upload()

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
    with local_copy(path) as local, open(local, newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append((int(row["step"]), row["metric"], float(row["value"])))
            except (TypeError, ValueError):
                # A killed process may leave its last row half-written; that step is repeated.
                continue
    return rows
