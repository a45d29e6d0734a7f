"""A process finds the others of its run, and hears a signal."""

import os
import signal

import pytest

from sammix_jax import hosts
from sammix_jax.errors import UserError

VARIABLES = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    *("MEGASCALE_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"),
    "TPU_WORKER_HOSTNAMES",
)


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` is called with, one entry a call."""
    calls = []
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: calls.append(given))
    return calls


def test_a_process_alone_joins_nobody(joined):
    hosts.join()
    assert not joined


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("TPU_WORKER_HOSTNAMES", "t1k-w0,t1k-w1"),
        ("MEGASCALE_COORDINATOR_ADDRESS", "10.0.0.1"),
    ],
)
def test_the_environment_tells_of_others(joined, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    hosts.join()
    assert joined == [{}]
    hosts.join(multihost=False)
    assert joined == [{}]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SLURM_STEP_NUM_TASKS", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")],
)
def test_a_run_of_one_under_a_scheduler_joins_nobody(joined, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    hosts.join()
    assert not joined


@pytest.mark.parametrize(
    ("device", "library", "platforms", "joins"),
    [
        ("/dev/accel0", True, None, True),
        ("/dev/vfio/0", True, "tpu,cpu", True),
        ("/dev/vfio/0", False, None, False),  # another card that is handed through
        ("/dev/accel0", True, "cpu", False),
        ("/dev/nvidia0", True, None, False),
    ],
)
def test_a_tpu_vm_is_known_by_its_chips(joined, monkeypatch, device, library, platforms, joins):
    """Nothing else tells of its hosts: JAX asks the machine's metadata for them."""
    monkeypatch.setattr(hosts.pathlib.Path, "exists", lambda path: str(path) == device)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: library or None)
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    hosts.join()
    assert joined == [{}] * joins


def test_numbers_are_taken_from_the_environment(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    hosts.join()
    assert joined == [{"num_processes": 3, "process_id": 2}]
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='two': expected a number"):
        hosts.join()


def test_what_is_missing_is_told(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sammix_jax.hosts.jax.distributed.initialize", _fails)
    with pytest.raises(UserError, match=r"could not be joined \(coordinator_address .* set JAX_"):
        hosts.join(multihost=True)


def _fails(**_):
    raise ValueError("coordinator_address should be defined.")


@pytest.mark.parametrize("pid", [1, 7])
def test_sigterm_ends_the_first_process_of_a_container_too(monkeypatch, pid):
    """Which the system spares what it has no handler for."""
    before, left = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(os, "getpid", lambda: pid)
    monkeypatch.setattr(os, "_exit", left.append)
    try:
        hosts.let_sigterm_end()
        handler = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    if pid == 1:
        handler(signal.SIGTERM, None)
        assert left == [hosts.TERMINATED]
    else:
        assert handler is signal.SIG_DFL
