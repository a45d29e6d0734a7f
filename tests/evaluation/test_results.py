"""Files of results, and their means over seeds."""

import copy
import csv
import functools
import hashlib
import json
import shutil

import numpy as np
import pytest
from forked import run as run_command

from sammix_jax.config import default_config
from sammix_jax.config_files import claim_workdir
from sammix_jax.data.files import read_json, write_json
from sammix_jax.errors import UserError
from sammix_jax.evaluation.results import (
    collect,
    load_results,
    results_folder,
    saved_results,
    seen_before,
    write_results,
)
from sammix_jax.evaluation.scores import Case, Guidance
from sammix_jax.evaluation.seeds import over_seeds, write_over_seeds


def case(scan, protocol, dice, hd95=5.0, status="scored"):
    return Case(scan, protocol, status, dice, 0.9, hd95, 1.0, -0.1, dice, 7.0, 0.5, 1500.0, 1400.0)


def guidance():
    present, probability = np.array([True, True, False]), np.array([0.9, 0.2, 0.1])
    return Guidance(present, probability, np.array([0.5, 0.7]), np.array([False, True]))


@pytest.fixture
def run(tmp_path):
    """A workdir as far as results look at it."""
    write_json(tmp_path / "run" / "split.json", {"train": ["a"], "val": [], "test": ["b", "c"]})
    write_json(tmp_path / "run" / "labels.json", [{"scan": "a", "slice": 3}])
    (tmp_path / "run" / "checkpoints" / "best" / "40").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest" / "60").mkdir(parents=True)
    return tmp_path / "run"


DIGESTS = {"b": "12ab-34cd", "c": "56ef-78ab"}


def found(run, config=None, dices=(0.8, 0.9), faults=()):
    cases = [case(n, p, d) for n, d in zip("bc", dices, strict=True) for p in ("none", "cam")]
    config = config or default_config()
    return collect(config, run, cases, [guidance()] * 2, faults, ["b"], DIGESTS, [], 40), cases


def test_results_tell_where_they_come_from(run):
    results, cases = found(run)
    write_results(run / "out", results, cases)
    kept = read_json(run / "out" / "results.json")
    assert kept == results
    assert list(kept["summary"]) == ["cam", "none"]  # the headline first
    assert kept["summary"]["cam"]["dice"]["mean"] == pytest.approx(0.85)
    assert kept["scans"] == ["b", "c"] and kept["trained_on"] == ["b"]
    assert kept["config"] == json.loads(default_config().to_json())
    assert kept["checkpoint_step"] == 40
    labels = (run / "labels.json").read_bytes()
    assert kept["labels_sha256"] == hashlib.sha256(labels).hexdigest() != kept["split_sha256"]
    assert kept["classifier"]["accuracy"] == pytest.approx(2 / 3)
    assert kept["prompt"] == {"box_iou": pytest.approx(0.6), "empty_cams": 0.5, "slices": 4}

    with open(run / "out" / "cases.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["scan"], row["protocol"]) for row in rows] == [
        ("b", "none"), ("b", "cam"), ("c", "none"), ("c", "cam")]  # fmt: skip
    assert float(rows[0]["dice"]) == 0.8 and float(rows[0]["volume_error"]) == -0.1


def test_no_number_is_an_empty_cell(run):
    write_results(run / "out", {}, [case("b", "cam", None, None, "both_empty")])
    with open(run / "out" / "cases.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["dice"] == row["hd95_mm"] == "" and row["status"] == "both_empty"


def test_saved_results_are_those_of_the_same_settings_and_whole(run):
    config = default_config()
    assert saved_results(config, run) is None
    folder = results_folder(config, run)
    assert folder == run / "evaluation" / "test"
    write_results(folder, *found(run))
    assert saved_results(config, run) == found(run)[0]
    config.evaluate.gate = not config.evaluate.gate
    assert saved_results(config, run) is None
    with pytest.raises(UserError, match=r"made with evaluate\.gate=True \(now False\); run --mode"):
        load_results(config, run)
    config.evaluate.gate = not config.evaluate.gate
    write_results(folder, *found(run, faults=["x.nii: truncated"]))
    assert saved_results(config, run) is None


def test_other_settings_have_a_folder_of_their_own(run):
    config = default_config()
    config.evaluate.component = "largest"
    claim_workdir(config, run)
    own = results_folder(config, run)
    assert own == run / "evaluation" / "test"
    config.evaluate.batch += 1  # changes no score
    config.data.root = "elsewhere"
    assert results_folder(config, run) == own
    config.evaluate.component, config.evaluate.protocols = "all", ("cam", "none")
    other = results_folder(config, run)
    assert other.name == "test-component=all-protocols=cam+none" and other.parent == own.parent
    config.evaluate.root = str(run)
    assert results_folder(config, run).name.endswith("-component=all-protocols=cam+none")


def test_saved_results_are_those_of_the_present_checkpoint(run):
    config = default_config()
    write_results(results_folder(config, run), *found(run))
    assert saved_results(config, run) == load_results(config, run) == found(run)[0]
    config.evaluate.batch += 1  # changes no score
    config.evaluate.save_masks = True  # nor does this
    assert saved_results(config, run) is not None
    (run / "checkpoints" / "best" / "40").rename(run / "checkpoints" / "best" / "60")
    assert saved_results(config, run) is None
    with pytest.raises(UserError, match=r"checkpoint of step 40 \(now 60\); run --mode=evaluate"):
        load_results(config, run)
    shutil.rmtree(run / "checkpoints")  # copied without them: its results are what there is
    assert saved_results(config, run) == load_results(config, run)
    assert saved_results(config, run)["checkpoint_step"] == 40


def seeds(run):
    results = []
    for seed, dices in enumerate([(0.8, 0.9), (0.7, 0.8), (0.9, 1.0)]):
        config = default_config()
        config.seed = config.data.labels_seed = seed
        results.append(found(run, config, dices)[0])
    return results


def test_means_over_seeds(run, tmp_path):
    results = seeds(run)
    results[1]["summary"]["cam"]["hd95_mm"] = None
    results[2]["summary"]["cam"]["failures"] = 3
    means = over_seeds(results)
    cam = means["summary"]["cam"]
    by_run = [0.85, 0.75, 0.95]
    assert cam["dice"]["mean"] == pytest.approx(np.mean(by_run))
    assert cam["dice"]["std"] == pytest.approx(np.std(by_run, ddof=1))
    assert cam["dice"]["count"] == 3 and cam["dice"]["scans"] == 2
    assert cam["hd95_mm"] == {"mean": 5.0, "std": 0.0, "count": 2, "scans": 2}
    assert cam["scored"] == 2 and cam["failures"]["mean"] == 1
    assert means["classifier"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert [run["data.labels_seed"] for run in means["runs"]] == [0, 1, 2]
    assert means["trained_on"] == ["b"]
    assert over_seeds(results[:1])["summary"]["cam"]["dice"]["std"] == 0

    write_over_seeds(tmp_path / "means", means)
    assert read_json(tmp_path / "means" / "summary.json") == means
    with open(tmp_path / "means" / "summary.csv", encoding="utf-8", newline="") as file:
        rows = {(row["protocol"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(rows["cam", "dice"]["std"]) == cam["dice"]["std"]
    assert rows["cam", "scored"] == {
        "protocol": "cam", "metric": "scored", "mean": "2", "std": "0", "runs": "3"}  # fmt: skip
    assert float(rows["", "accuracy"]["mean"]) == means["classifier"]["accuracy"]["mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: (r["scans"].append("d"), r["digests"].update(d="0-0")),
            r"scans=\['b', 'c'\] \(now \['b', 'c', 'd'\]\)",
        ),
        (
            lambda r: r["config"]["evaluate"].update(nsd_tolerance=1.0),
            r"evaluate.nsd_tolerance=2.0 \(now 1.0\)",
        ),
        (lambda r: r["config"]["evaluate"].update(gate=False), r"gate=True \(now False\)"),
        (
            lambda r: r.update(digests={**r["digests"], "c": "0-0"}),
            r"digest of c=56ef-78ab \(now 0-0\)",
        ),
        (lambda r: r["config"]["data"].update(labelled_slices=5), r"labelled_slices=50 \(now 5\)"),
    ],
)
def test_what_is_not_alike_is_not_averaged(run, change, message):
    results = copy.deepcopy(seeds(run))
    change(results[2])
    with pytest.raises(UserError, match=f"runs/2: differs from runs/0.*{message}"):
        over_seeds(results, ["runs/0", "runs/1", "runs/2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["config"].update(seed=0), "runs/2: repeats runs/0, with the same seed=0"),
        (lambda r: r["faults"].append("x.nii: cut short."), "runs/2: 1 scans .*x.nii: cut short"),
    ],
)
def test_a_run_that_is_no_sample_is_refused(run, change, message):
    results = copy.deepcopy(seeds(run))
    change(results[2])
    with pytest.raises(UserError, match=message):
        over_seeds(results, ["runs/0", "runs/1", "runs/2"])


def test_one_seed_on_other_labelled_slices_is_another_run(run):
    results = copy.deepcopy(seeds(run))
    results[2]["config"]["seed"] = 0
    results[2]["labels_sha256"] = "of other slices"
    assert len(over_seeds(results)["runs"]) == 3


def test_scans_that_trained_any_of_the_models_are_told(run):
    results = copy.deepcopy(seeds(run))
    results[0]["trained_on"], results[1]["trained_on"] = [], ["c"]
    assert over_seeds(results)["trained_on"] == ["b", "c"]
    results[1]["chose"] = ["b"]
    warnings = seen_before(over_seeds(results))
    assert "2 of these scans trained the model, so" in warnings[0]
    assert "1 of these scans chose the model's checkpoint, so" in warnings[1]


def test_places_and_speed_may_differ(run):
    results = copy.deepcopy(seeds(run))
    results[1]["config"]["data"] |= {"store": "/elsewhere", "workers": 3}
    results[1]["config"]["evaluate"]["batch"] = 1
    assert over_seeds(results)["summary"]["cam"]["dice"]["count"] == 3
    with pytest.raises(UserError, match="no results"):
        over_seeds([])


def test_the_command_that_summarises(run, tmp_path):
    summarise = functools.partial(run_command, "--mode=summarise")
    for results in seeds(run):
        workdir = tmp_path / "runs" / f"seed-{results['config']['seed']}"
        write_json(workdir / "config.json", results["config"])
        write_json(workdir / "evaluation" / "test" / "results.json", results)
    done = summarise(f"--workdir={tmp_path}/runs/seed-*", f"--output={tmp_path / 'means'}")
    assert done.returncode == 0, done.stderr
    assert "over 3 runs, each its mean over 2 scans" in done.stdout
    assert "cam       0.850 ± 0.100 " in done.stdout
    assert "warning: 1 of these scans trained the model" in done.stdout
    means = read_json(tmp_path / "means" / "summary.json")
    assert means == over_seeds(seeds(run), [r["run"] for r in means["runs"]])
    two = summarise(f"--workdir={tmp_path}/runs/seed-0,{tmp_path}/runs/seed-2")
    assert "over 2 runs" in two.stdout and two.returncode == 0, two.stderr

    lacking = summarise(f"--workdir={tmp_path}/runs/seed-*", "--config.evaluate.part=val")
    assert lacking.returncode == 1
    assert "evaluation/val/results.json: no such file; run --mode=evaluate" in lacking.stderr
    gated = summarise(f"--workdir={tmp_path}/runs/seed-*", "--config.evaluate.gate=False")
    assert gated.returncode == 1
    assert "evaluation/test-gate=False/results.json: no such file; run --mode=ev" in gated.stderr
    nowhere = summarise(f"--workdir={tmp_path}/nowhere-*")
    assert nowhere.returncode == 1 and "nowhere-*: no such folder" in nowhere.stderr
    assert "Traceback" not in lacking.stderr + gated.stderr + nowhere.stderr
