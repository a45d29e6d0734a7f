"""Cloud jobs without a cloud: the scripts run against programs that record how they are called, and
the manifests are held against schemas."""

import copy
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import kubernetes_validate
import pytest
import yaml

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
        for name in ("gcloud", "srun", "scontrol"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        self.answer({})

    def answer(self, answers):
        (self.folder / "answers").write_text(json.dumps(answers))

    def start(self, script, *arguments, **environment):
        # Of what the scripts read nothing comes from outside, as PYTHON of `make test PYTHON=...`.
        outside = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "DRY_RUN")}
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


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_is_sound(script):
    subprocess.run([BASH, "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    found = subprocess.run(
        [shellcheck, "--enable=quote-safe-variables", script], capture_output=True
    )
    assert found.returncode == 0, found.stdout.decode()
    assert os.access(script, os.X_OK)


# --- Cloud TPU VM ---

TPU = ["--project=p", "--zone=z-a", "--name=n"]
TRAIN = "sammix_jax.main --config"  # only the command that trains holds it
CREATE, DELETE, STOP = "queued-resources create", "queued-resources delete", "pkill"
# What is said first: that nothing of this name is there yet.
ABSENT = ["ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'n' was not found", 1]
REQUEST = {"queued-resources describe": [ABSENT, ["WAITING_FOR_RESOURCES", 0], ["ACTIVE", 0]]}
SLICE = "tpu-vm describe"


def tpu_vm(fakes, answers, *options):
    fakes.answer(REQUEST | {SLICE: [ABSENT]} | answers)
    return fakes.run("tpu_vm.sh", *TPU, *options, "--", *OPTIONS, POLL_SECONDS="0")


def remote(call):
    return next(a.removeprefix("--command=") for a in call if a.startswith("--command="))


def test_a_tpu_run_is_created_installed_trained_and_deleted(fakes):
    code, _, errors = tpu_vm(fakes, {})
    assert code == 0, errors
    steps = [call for call in fakes.calls("gcloud") if "describe" not in call]
    create, copy_code, install, train, delete = steps
    assert create[1:5] == ["compute", "tpus", "queued-resources", "create"]
    assert {
        "--node-id=n",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    } <= set(create)
    for call in fakes.calls("gcloud"):
        assert {"--project=p", "--zone=z-a"} <= set(call)
    for call in (copy_code, install, train):
        assert "--worker=all" in call
    assert copy_code[1:5] == ["compute", "tpus", "tpu-vm", "scp"] and "n:sammix.tar.gz" in copy_code
    assert "requirements/tpu.txt" in remote(install)
    subprocess.run([BASH, "-n", "-c", remote(install)], check=True)
    enter, command = remote(train).split(" && ")
    assert enter == "cd sammix"
    assert shlex.split(command) == [".venv/bin/python", "-m", "sammix_jax.main", *OPTIONS]
    assert delete[3:6] == ["queued-resources", "delete", "n"]
    assert {"--force", "--quiet"} <= set(delete)
    assert len(fakes.calls("queued-resources describe")) > 3  # it waited to be served


def test_on_demand_asks_for_no_spot(fakes):
    answers = {SLICE: [ABSENT, ["READY", 0]]}
    code, _, errors = tpu_vm(fakes, answers, "--on-demand", "--accelerator=v6e-8", "--runtime=r")
    assert code == 0, errors
    (create,) = fakes.calls("tpu-vm create")
    assert {"--accelerator-type=v6e-8", "--version=r"} <= set(create) and "--spot" not in create
    assert len(fakes.calls("tpu-vm delete")) == 1 and not fakes.calls("queued-resources")


def test_a_dry_run_prints_the_commands_and_runs_none(fakes):
    code, output, _ = tpu_vm(fakes, {}, "--dry-run")
    assert code == 0 and not fakes.calls()
    shell = f'gcloud() {{ {shlex.quote(str(fakes.folder / "gcloud"))} "$@"; }}\n'
    printed = [line for line in output.splitlines() if line.startswith("gcloud")]
    subprocess.run([BASH, "-c", shell + "\n".join(printed)], check=True)
    dry = fakes.calls()
    (fakes.folder / "calls").unlink()
    tpu_vm(fakes, {})
    real = [call for call in fakes.calls() if "describe" not in call]

    def same(calls):
        return [[a for a in call if not a.endswith(".tar.gz") or ":" in a] for call in calls]

    assert same(dry) == same(real)  # but for the temporary file's name


@pytest.mark.parametrize("code", [255, 143, 1])
def test_a_preempted_slice_is_asked_for_again(fakes, code):
    answers = {TRAIN: [["", code], ["", 0]], SLICE: [ABSENT, ["PREEMPTED", 0]]}
    states = ["SUSPENDING", "SUSPENDED", "ACTIVE"]  # it is deleted only once it is SUSPENDED
    first = REQUEST["queued-resources describe"]
    answers["queued-resources describe"] = [*first, *([state, 0] for state in states)]
    assert tpu_vm(fakes, answers)[0] == 0
    assert len(fakes.calls(TRAIN)) == len(fakes.calls(CREATE)) == len(fakes.calls(DELETE)) == 2
    assert len(fakes.calls("requirements/tpu.txt")) == 2
    calls = [" ".join(call) for call in fakes.calls("queued-resources")]
    asked = calls[: next(i for i, call in enumerate(calls) if DELETE in call)]
    assert len([call for call in asked if "describe" in call]) == len(first) + 2


@pytest.mark.parametrize("code", [255, 143])
def test_a_run_that_was_stopped_goes_on_on_the_same_slice(fakes, code):
    answers = {TRAIN: [["", code], ["", 0]], SLICE: [ABSENT, ["READY", 0]]}
    assert tpu_vm(fakes, answers)[0] == 0
    assert len(fakes.calls(TRAIN)) == 2 and len(fakes.calls(STOP)) == 1
    assert len(fakes.calls(CREATE)) == len(fakes.calls("requirements/tpu.txt")) == 1


def test_a_failure_is_not_repeated_and_deletes(fakes):
    code, _, errors = tpu_vm(fakes, {TRAIN: [["", 3]], SLICE: [ABSENT, ["READY", 0]]})
    assert code == 3 and "exit code 3" in errors
    assert len(fakes.calls(TRAIN)) == len(fakes.calls(DELETE)) == 1


def test_restarts_have_an_end(fakes):
    assert tpu_vm(fakes, {TRAIN: [["", 255]]}, "--restarts=2")[0] == 255
    assert len(fakes.calls(TRAIN)) == len(fakes.calls(DELETE)) == 3


def test_a_request_that_fails_ends_the_script(fakes):
    answers = {"queued-resources describe": [ABSENT, ["FAILED", 0]]}
    assert tpu_vm(fakes, answers)[0] != 0
    assert not fakes.calls("tpu-vm ssh") and len(fakes.calls(DELETE)) == 1


@pytest.mark.parametrize(
    "kind, options", [("queued-resources", []), ("tpu-vm", []), ("tpu-vm", ["--on-demand"])]
)
def test_what_is_there_already_is_left_alone(fakes, kind, options):
    code, _, errors = tpu_vm(fakes, {f"{kind} describe": [["ACTIVE", 0]]}, *options)
    assert code == 2 and "n is there already" in errors
    assert not fakes.calls(" create ") and not fakes.calls(" delete ")


def test_nothing_is_created_or_deleted_where_nobody_can_tell_what_is_there(fakes):
    answers = {SLICE: [["ERROR: 503 the service is unavailable", 1], ["READY", 0]]}
    code, _, errors = tpu_vm(fakes, answers)
    assert code == 2 and "503" in errors and "cannot tell" in errors
    assert not fakes.calls(" create ") and not fakes.calls(" delete ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--project=p", "--", *OPTIONS],
        ["--zone=z", "--", *OPTIONS],
        [*TPU, "--", "--config=configs/lits.py", "--workdir=runs/lits"],
        [*TPU, "--workdir=gs://b/runs/lits"],
    ],
)
def test_incomplete_commands_are_refused(fakes, arguments):
    assert fakes.run("tpu_vm.sh", *arguments)[0] == 2
    assert not fakes.calls()


def test_a_stopped_script_lets_the_run_save_and_then_deletes(fakes):
    fakes.answer(REQUEST | {SLICE: [ABSENT], TRAIN: [["", 143, "saved"]]})
    process = fakes.start("tpu_vm.sh", *TPU, "--", *OPTIONS, POLL_SECONDS="0")
    deadline = time.monotonic() + 30
    while not fakes.calls(TRAIN) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    (fakes.folder / "saved").touch()  # lets the stand-in go
    stop, delete = fakes.calls()[-3], fakes.calls()[-1]  # between them, the request is looked at
    assert "--worker=all" in stop and "pkill -TERM -f '[s]ammix_jax.main'" in remote(stop)
    assert "delete" in delete


# --- Slurm ---

RUNNING = {"show job": [["JobId=42 JobName=sammix JobState=RUNNING Requeue=1", 0]]}


def slurm(fakes, code, answers=RUNNING, **environment):
    fakes.answer({"srun": [["", code]]} | answers)
    return fakes.run("slurm.sh", *OPTIONS, SLURM_JOB_ID="42", **environment)


def test_srun_runs_the_program(fakes):
    assert slurm(fakes, 0, PYTHON="/opt/python")[0] == 0
    program = ["/opt/python", "-m", "sammix_jax.main", *OPTIONS]
    assert fakes.calls() == [["srun", "--kill-on-bad-exit=0", *program]]


def test_a_job_stopped_after_a_save_is_requeued(fakes):
    assert slurm(fakes, 143)[0] == 143
    assert fakes.calls("requeue") == [["scontrol", "requeue", "42"]]


@pytest.mark.parametrize("code", [0, 1, 134, 137])
def test_other_ends_are_passed_on(fakes, code):
    assert slurm(fakes, code)[0] == code
    assert not fakes.calls("requeue")


def test_a_cancelled_job_is_not_requeued(fakes):
    cancelled = {"show job": [["JobId=42 JobState=CANCELLED Requeue=1", 0]]}
    assert slurm(fakes, 143, cancelled)[0] == 143
    assert not fakes.calls("requeue")


def test_a_dry_slurm_run_prints_srun(fakes):
    code, output, _ = slurm(fakes, 0, DRY_RUN="1")
    assert code == 0 and not fakes.calls()
    program = [".venv/bin/python", "-m", "sammix_jax.main", *OPTIONS]
    assert shlex.split(output) == ["srun", "--kill-on-bad-exit=0", *program]


def test_sbatch_options():
    lines = (SCRIPTS / "slurm.sh").read_text().split("\nset -euo")[0].splitlines()
    given = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]
    options = dict(option.partition("=")[::2] for option in given)
    assert "requeue" in options and options["signal"] == "TERM@120"
    assert options["open-mode"] == "append"  # a requeued job does not wipe its log
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"  # one task a GPU
    assert "gpus-per-task" not in options


# --- GKE ---


def manifests():
    service, job = yaml.safe_load_all((SCRIPTS / "gke_job.yaml").read_text())
    return service, job


def schema_check(manifest):
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_manifests_agree_with_kubernetes_schemas():
    for manifest in manifests():
        schema_check(manifest)


@pytest.mark.parametrize(
    ("path", "value"), [("completion", 4), ("completions", "four"), ("podFailurePolicy", {})]
)
def test_the_schema_check_can_fail(path, value):
    _, job = manifests()
    job["spec"][path] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        schema_check(job)


def test_the_job_fits_its_slice():
    _, job = manifests()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    sides = selector["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert math.prod(map(int, sides)) == chips * spec["completions"]
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_jobs_pods_find_each_other():
    service, job = manifests()
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]


def test_a_save_is_no_failure_of_the_job():
    _, job = manifests()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rules = spec["podFailurePolicy"]["rules"]
    ignored = [rule for rule in rules if rule["action"] == "Ignore"]
    (codes,) = [rule["onExitCodes"] for rule in ignored if "onExitCodes" in rule]
    assert codes == {"containerName": container["name"], "operator": "In", "values": [143]}
    (conditions,) = [rule["onPodConditions"] for rule in ignored if "onPodConditions" in rule]
    assert conditions == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert spec["backoffLimit"] >= spec["completions"]  # one host lost fails them all


def test_the_jobs_command_and_image():
    _, job = manifests()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [
        *("python", "-m", "sammix_jax.main", "--config=configs/lits.py"),
        "--config.data.root=gs://BUCKET/lits",
        "--workdir=gs://BUCKET/runs/lits",
    ]
    lines = [line.split() for line in (SCRIPTS / "Dockerfile").read_text().splitlines()]
    copied = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    assert {"sammix_jax", "configs", "weights", "requirements", "requirements.txt"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_the_manifests_own_sed_command_fills_it_in():
    text = (SCRIPTS / "gke_job.yaml").read_text()
    command = next(line for line in text.splitlines() if "sed '" in line).lstrip("# ")
    filled = subprocess.run(
        [BASH, "-c", command.split(" | ")[0]], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    _, job = yaml.safe_load_all(filled)
    body = yaml.safe_dump(job)
    assert "IMAGE" not in body and "BUCKET" not in body
    assert "image: me/sammix:1\n" in body and "gs://my-bucket/lits" in body


# --- SkyPilot ---

# What skypilot.yaml uses of sky.utils.schemas.get_task_schema() and get_resources_schema() of
# SkyPilot 0.14.1; the package itself takes 430 MB, too much for the tests.
RECOVERY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["strategy", "recover_on_exit_codes"],
    "properties": {
        "strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
        "recover_on_exit_codes": {"type": "array", "items": {"type": "integer", "maximum": 255}},
    },
}
RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["accelerators", "use_spot", "job_recovery"],
    "properties": {
        "infra": {"type": "string"},
        "accelerators": {"type": "string"},
        "accelerator_args": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"runtime_version": {"type": "string"}},
        },
        "use_spot": {"type": "boolean"},
        "job_recovery": RECOVERY,
    },
}
TASK = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "workdir", "envs", "resources", "setup", "run"],
    "properties": {
        "name": {"type": "string"},
        "workdir": {"type": "string"},
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "resources": RESOURCES,
        "setup": {"type": "string"},
        "run": {"type": "string"},
    },
}


@pytest.fixture
def task():
    return yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())


def test_the_task_agrees_with_skypilots_fields(task):
    jsonschema.validate(task, TASK)
    for key in ("use_spott", "infra_"):
        wrong = copy.deepcopy(task)
        wrong["resources"][key] = "gcp"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, TASK)


def test_the_task_is_recovered(task):
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    assert task["envs"]["DATA"] is None and task["envs"]["WORKDIR"] is None  # asked for at launch
    subprocess.run([BASH, "-n", "-c", task["setup"]], check=True)


@pytest.mark.parametrize(("gpu", "nodes"), [(True, 2), (True, 1), (False, 4)])
def test_gpu_nodes_are_told_of_each_other(task, fakes, gpu, nodes):
    python = fakes.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!{BASH}\nenv | grep ^JAX_ | sort\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    for name in ("head", "env", "grep", "sort"):
        (fakes.folder / name).symlink_to(shutil.which(name))
    if gpu:
        (fakes.folder / "nvidia-smi").symlink_to(shutil.which("true"))
    environment = {
        "PATH": str(fakes.folder),  # a real nvidia-smi must not be found
        "DATA": "gs://b/lits",
        "WORKDIR": "gs://b/runs",
        "OPTIONS": "--config.mesh.fsdp=4 --config.model.dtype=bfloat16",
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    made = {"cwd": fakes.folder, "env": environment, "capture_output": True, "text": True}
    output = subprocess.run([BASH, "-c", task["run"]], check=True, **made).stdout.splitlines()
    told = ["JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"]
    assert [line for line in output if line.startswith("JAX_")] == (
        told if gpu and nodes > 1 else []
    )
    assert output[output.index("-m") :] == [
        *("-m", "sammix_jax.main", "--config=configs/lits.py", "--config.data.root=gs://b/lits"),
        *("--workdir=gs://b/runs", "--config.mesh.fsdp=4", "--config.model.dtype=bfloat16"),
    ]


def test_tpu_hosts_can_read_buckets():
    assert "-r cloud.txt" in (ROOT / "requirements" / "tpu.txt").read_text().splitlines()
