"""A run that is stopped at any moment, by any signal, goes on where it was."""

import os
import pathlib
import random
import re
import signal
import time

import pytest
from forked import start

from sammix_jax.hosts import TERMINATED
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.log import read_log

INTERVAL = 6
KILLS = 20


@pytest.fixture
def run(phantoms, tmp_path):
    """Starts a run that would last for hours, on a store that is prepared."""
    scans, store = phantoms
    fields = {
        "data.root": scans,
        "data.store": store,
        "data.size": 64,
        "data.split": "(3, 0, 1)",
        "data.labelled_slices": 12,
        "train.batch_labelled": 4,
        "train.batch_unlabelled": 2,
        "train.steps": 1_000_000,
        "log.every_steps": 1,
        "checkpoint.every_steps": INTERVAL,
    }
    flags = [
        "--config=configs/quickstart.py:random",
        f"--workdir={tmp_path}",
        *(f"--config.{field}={value}" for field, value in fields.items()),
    ]
    output, processes = tmp_path / "output.txt", []

    def start_anew():
        output.unlink(missing_ok=True)
        processes.append(start(flags, output, output, toy=True))
        return processes[-1]

    yield start_anew
    for process in processes:
        process.kill()  # of a test that failed


def last_logged(workdir) -> int:
    return max((step for step, _, _ in read_log(workdir)), default=0)


def printed(workdir) -> str:
    return pathlib.Path(workdir, "output.txt").read_text(encoding="utf-8")


def first_step(output: str) -> int:
    return int(re.search(r"training from step (\d+)", output)[1])


def wait_for_steps(process, workdir, after: int) -> None:
    deadline = time.monotonic() + 120
    while last_logged(workdir) <= after:
        assert process.is_alive(), printed(workdir)
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.05)


def test_killed_at_any_moment_it_loses_one_interval_at_most(run, tmp_path):
    """SIGKILL, at random moments after the first new step; most of them within a save."""
    latest = pathlib.Path(tmp_path, "checkpoints", "latest")
    moments = random.Random(0)
    reached, within_a_save = 0, 0
    for kill in range(KILLS):
        process = run()
        wait_for_steps(process, tmp_path, after=reached if kill else 0)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.join()
        output = printed(tmp_path)
        within_a_save += any("tmp" in path.name for path in latest.iterdir())
        if kill:  # this process resumed what the one before had reached
            assert reached - INTERVAL <= first_step(output) <= reached, output
            assert "damaged" not in output
        reached = last_logged(tmp_path)
    assert within_a_save >= 1
    assert reached > KILLS


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, -signal.SIGINT)]
)
def test_asked_to_stop_it_saves_the_very_step(run, tmp_path, number, code):
    """By a scheduler, or by Ctrl-C, of which a shell hears too."""
    process = run()
    wait_for_steps(process, tmp_path, after=2 * INTERVAL)
    os.kill(process.pid, number)
    process.join(600)
    output = printed(tmp_path)
    assert process.exitcode == code, output
    assert "Traceback" not in output
    stopped = int(re.search(r"stopped after step (\d+) of 1000000, which is saved", output)[1])
    assert "run the same command to go on" in output
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == stopped >= last_logged(tmp_path) > 2 * INTERVAL

    process = run()
    wait_for_steps(process, tmp_path, after=stopped)
    process.kill()
    process.join()
    assert first_step(printed(tmp_path)) == stopped
