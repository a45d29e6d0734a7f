"""The scripts, and programs that stand in for what they call and record how."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SHELL = sorted(SCRIPTS.glob("*.sh"))
BASH = shutil.which("bash")
OPTIONS = [
    "--config=configs/lits.py",
    "--config.data.root=gs://b/lits",
    "--workdir=gs://b/runs/lits",
    "--config.evaluate.protocols=('cam',)",  # the shell's own characters must survive
]

# Writes its name and arguments down, and answers with the next [output, exit code] of the first
# phrase that they hold; the last answer of a phrase stays. A file to wait for may stand third.
FAKE = f"""#!{sys.executable}
import json, pathlib, sys, time
here = pathlib.Path(__file__).resolve().parent
call = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(here / "calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
answers = json.loads((here / "answers").read_text())
for phrase, queue in answers.items():
    if phrase in " ".join(call):
        output, code, *wait = queue.pop(0) if len(queue) > 1 else queue[0]
        (here / "answers").write_text(json.dumps(answers))
        while wait and not (here / wait[0]).exists():
            time.sleep(0.05)
        print(output, file=sys.stderr if code else sys.stdout)
        sys.exit(code)
"""


class Fakes:
    """Stand-ins on PATH for what a script calls."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("gcloud", "git", "srun", "scontrol"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        self.answer({})

    def answer(self, answers):
        (self.folder / "answers").write_text(json.dumps(answers))

    def start(self, script, *arguments, **environment):
        # Of what the scripts read nothing comes from outside, as PYTHON of `make test PYTHON=...`.
        read = ("PYTHON", "DRY_RUN", "JAX_COMPILATION_CACHE_DIR")
        outside = {name: value for name, value in os.environ.items() if name not in read}
        environment = outside | environment | {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [BASH, SCRIPTS / script, *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def run(self, script, *arguments, **environment):
        process = self.start(script, *arguments, **environment)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def calls(self, phrase=""):
        path = self.folder / "calls"
        calls = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return [call for call in calls if phrase in " ".join(call)]
