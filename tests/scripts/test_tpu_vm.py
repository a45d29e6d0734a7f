"""tpu_vm.sh against a gcloud that records how it is called."""

import shlex
import signal
import subprocess
import time

import pytest
from script_fakes import BASH, OPTIONS, Fakes


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


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


def test_what_is_not_committed_is_told_before_anything_is_paid_for(fakes):
    changed = {"git status": [[" M configs/lits.py", 0]]}
    code, _, errors = tpu_vm(fakes, changed)
    assert code == 2 and "commit it first" in errors and " M configs/lits.py" in errors
    assert not fakes.calls("gcloud")
    code, output, errors = tpu_vm(fakes, changed, "--dry-run")
    assert code == 0 and "not committed" in errors and "queued-resources create" in output


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


def test_where_compiled_programs_are_kept_is_handed_on(fakes):
    fakes.answer(REQUEST | {SLICE: [ABSENT]})
    kept = {"JAX_COMPILATION_CACHE_DIR": "gs://b/compiled programs"}
    code, _, errors = fakes.run("tpu_vm.sh", *TPU, "--", *OPTIONS, POLL_SECONDS="0", **kept)
    assert code == 0, errors
    (train,) = (remote(call) for call in fakes.calls(TRAIN))
    command = shlex.split(train.removeprefix("cd sammix && "))
    assert command[:3] == [
        "env",
        "JAX_COMPILATION_CACHE_DIR=gs://b/compiled programs",
        ".venv/bin/python",
    ]
    assert command[5:] == OPTIONS


def test_on_demand_asks_for_no_spot(fakes):
    answers = {SLICE: [ABSENT, ["READY", 0]]}
    code, _, errors = tpu_vm(fakes, answers, "--on-demand", "--accelerator=v6e-8", "--runtime=r")
    assert code == 0, errors
    (create,) = fakes.calls("tpu-vm create")
    assert {"--accelerator-type=v6e-8", "--version=r"} <= set(create) and "--spot" not in create
    assert len(fakes.calls("tpu-vm delete")) == 1 and not fakes.calls("queued-resources")


def test_a_dry_run_prints_the_commands_and_runs_none(fakes):
    code, output, _ = tpu_vm(fakes, {}, "--dry-run")
    assert code == 0 and not fakes.calls("gcloud")
    shell = f'gcloud() {{ {shlex.quote(str(fakes.folder / "gcloud"))} "$@"; }}\n'
    printed = [line for line in output.splitlines() if line.startswith("gcloud")]
    subprocess.run([BASH, "-c", shell + "\n".join(printed)], check=True)
    dry = fakes.calls("gcloud")
    (fakes.folder / "calls").unlink()
    tpu_vm(fakes, {})
    real = [call for call in fakes.calls("gcloud") if "describe" not in call]

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
