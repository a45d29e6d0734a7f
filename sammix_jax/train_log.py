"""What a run reports while it trains: TensorBoard curves and the same numbers as CSV."""

import csv
import pathlib

from tensorboardX import SummaryWriter

from sammix_jax.data.files import whole_file

COLUMNS = ("step", "metric", "value")


class TrainLog:
    """Appends to WORKDIR/metrics.csv and WORKDIR/tensorboard; a context manager.

    Args:
      workdir: the run's folder.
      start: the step the run starts from. Rows past it, from an interrupted run whose last steps
        are repeated, are dropped.
    """

    def __init__(self, workdir, start: int):
        path = pathlib.Path(workdir) / "metrics.csv"
        rows = [row for row in read_log(workdir) if row[0] <= start]
        with whole_file(path) as partial, open(partial, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        self._file = open(path, "a", newline="")  # noqa: SIM115 — closed in __exit__
        self._csv = csv.writer(self._file)
        folder = pathlib.Path(workdir) / "tensorboard"
        self._tensorboard = SummaryWriter(str(folder), purge_step=start)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._tensorboard.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._csv.writerow((step, name, f"{value:.6g}"))
            self._tensorboard.add_scalar(name, value, step)
        self._file.flush()


def read_log(workdir) -> list[tuple[int, str, float]]:
    """The rows of WORKDIR/metrics.csv: step, metric, value."""
    path = pathlib.Path(workdir) / "metrics.csv"
    if not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append((int(row["step"]), row["metric"], float(row["value"])))
            except (TypeError, ValueError):
                # A killed process may leave its last row half-written; that step is repeated.
                continue
    return rows
