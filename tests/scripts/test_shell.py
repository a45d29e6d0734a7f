"""Every shell script is sound."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from script_fakes import BASH, SHELL


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_is_sound(script):
    subprocess.run([BASH, "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    found = subprocess.run(
        [shellcheck, "--enable=quote-safe-variables", script], capture_output=True
    )
    assert found.returncode == 0, found.stdout.decode()
    assert os.access(script, os.X_OK)
