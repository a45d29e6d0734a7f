"""gke_job.yaml against the schemas of Kubernetes and its own sense; the image."""

import math
import subprocess

import kubernetes_validate
import pytest
import yaml
from script_fakes import BASH, ROOT, SCRIPTS


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
    devices = math.prod(map(int, sides))
    assert devices == chips * spec["completions"]
    batches = [option for option in container["command"] if "--config.train.batch_" in option]
    assert len(batches) == 2
    assert all(int(option.split("=")[1]) % devices == 0 for option in batches)
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
        "--config.data.store=gs://BUCKET/store",
        "--workdir=gs://BUCKET/runs/lits",
        "--config.model.sam_weights=gs://BUCKET/sam_vit_b.safetensors",
        "--config.train.batch_labelled=16",
        "--config.train.batch_unlabelled=16",
        "--config.log.validate_every_steps=375",
        "--config.checkpoint.every_steps=125",
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
