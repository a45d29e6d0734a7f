"""skypilot.yaml against fields that were read in SkyPilot; what its shell tells the program."""

import copy
import shutil
import subprocess

import jsonschema
import pytest
import yaml
from script_fakes import BASH, ROOT, SCRIPTS, Fakes


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


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
    asked_for_at_launch = [name for name, value in task["envs"].items() if value is None]
    assert asked_for_at_launch == ["DATA", "STORE", "WORKDIR", "SAM_WEIGHTS"]
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
        "STORE": "gs://b/store",
        "WORKDIR": "gs://b/runs",
        "SAM_WEIGHTS": "gs://b/sam.safetensors",
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
        *("--config.data.store=gs://b/store", "--workdir=gs://b/runs"),
        "--config.model.sam_weights=gs://b/sam.safetensors",
        *("--config.mesh.fsdp=4", "--config.model.dtype=bfloat16"),
    ]


def test_tpu_hosts_can_read_buckets():
    assert "-r cloud.txt" in (ROOT / "requirements" / "tpu.txt").read_text().splitlines()
