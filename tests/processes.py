"""Runs the project in processes of their own, with forced host devices."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PATHS = [ROOT, ROOT / "tests", ROOT / "tests" / "models"]


def start(arguments, devices: int = 1, **environment) -> subprocess.Popen:
    """Starts `python ARGUMENTS`; both outputs come through one pipe, as text."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={devices}",
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 600) -> str:
    """Waits so long for the end, and expects its exit code; returns what was printed."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return output


def start_several(arguments, count: int, devices: int, **environment) -> list[subprocess.Popen]:
    """Starts the processes of one run on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return [
        start(arguments, devices, JAX_PROCESS_ID=str(i), **joined, **environment)
        for i in range(count)
    ]
