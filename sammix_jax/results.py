"""The results of an evaluation: their files, their tables, and their means over seeds."""

import csv
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict

from sammix_jax.config import FREE_FIELDS
from sammix_jax.data.files import read_json, whole_file, write_json
from sammix_jax.data.splits import LABELS, SPLIT
from sammix_jax.errors import UserError
from sammix_jax.sam_mix import PROTOCOLS
from sammix_jax.scores import Case, Guidance, summarise_cases, summarise_guidance

_LOG = logging.getLogger(__name__)

RESULTS, CASES = "results.json", "cases.csv"
# What may differ between runs whose results are averaged, beside `config.FREE_FIELDS`.
SEED_FIELDS = ("seed", "data.seed", "data.labels_seed", "data.split_file", "data.labels_file")


def results_folder(config, workdir) -> pathlib.Path:
    """WORKDIR/evaluation/PART; for another folder of scans its name and a digest of its path."""
    name = config.evaluate.part
    if config.evaluate.root:
        root = pathlib.Path(config.evaluate.root).resolve()
        name = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:6]}"
    return pathlib.Path(workdir) / "evaluation" / name


def collect(
    config,
    workdir,
    cases: Sequence[Case],
    guidance: Sequence[Guidance],
    faults: Sequence[str],
    trained_on: Sequence[str],
) -> dict:
    """The content of results.json.

    Args:
      config, workdir: the run's.
      cases: of every scan under every protocol.
      guidance: of every scan.
      faults: what is wrong with each scan that could not be scored.
      trained_on: names of the scans that trained the model.
    """
    workdir = pathlib.Path(workdir)
    protocols = [p for p in PROTOCOLS if any(case.protocol == p for case in cases)]
    classifier, prompt = summarise_guidance(guidance)
    return {
        "evaluate": json.loads(config.evaluate.to_json()),
        "summary": {p: summarise_cases([c for c in cases if c.protocol == p]) for p in protocols},
        "classifier": classifier,
        "prompt": prompt,
        "scans": list(dict.fromkeys(case.scan for case in cases)),
        "trained_on": list(trained_on),
        "faults": list(faults),
        "config": json.loads(config.to_json()),
        "split_sha256": _sha256(workdir / SPLIT),
        "labels_sha256": _sha256(workdir / LABELS),
        "checkpoint_step": _checkpoint_step(workdir / "checkpoints"),
    }


def write_results(folder, results: dict, cases: Sequence[Case]) -> None:
    """Writes results.json, and cases.csv with a row a scan and protocol."""
    folder = pathlib.Path(folder)
    with whole_file(folder / CASES) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Case))
        writer.writerows(dataclasses.astuple(case) for case in cases)
    write_json(folder / RESULTS, results)
    _LOG.info("evaluation → %s", folder)


def saved_results(config, workdir) -> dict | None:
    """The results of an earlier evaluation with the same settings, if there are whole ones."""
    path = results_folder(config, workdir) / RESULTS
    if not path.exists():
        return None
    results = read_json(path)
    same = results["evaluate"] == json.loads(config.evaluate.to_json())
    return results if same and not results["faults"] else None


def over_seeds(results: Sequence[dict], names: Sequence[str] = ()) -> dict:
    """Means over runs that differ by their seeds, scored on the same scans in the same way.

    Args:
      results: the content of each run's results.json.
      names: what messages call the runs, such as their folders; by number without.

    Returns:
      What `result_table` takes: "evaluate" and "scans" of all of them, "runs" with each one's
      seeds, and "summary", "classifier" and "prompt" as in the results, each number replaced by
      {"mean", "std", "count"} over the runs that have one (None where none has): of each run's mean
      over scans, with the sample's standard deviation, 0 of one run. Counts that all runs agree in
      stay numbers.

    Raises:
      UserError: no results, or some that differ in more than seeds; names what differs.
    """
    if not results:
        raise UserError("no results to summarise: expected those of one run at least.")
    names = list(names) or [f"run {i}" for i in range(1, len(results) + 1)]
    first = _settings(results[0])
    for name, other in zip(names[1:], map(_settings, results[1:]), strict=True):
        differing = [
            f"{field}={first.get(field)} (now {other.get(field)})"
            for field in sorted(first | other)
            if first.get(field) != other.get(field)
        ]
        if differing:
            listed = ", ".join(differing[:8])
            raise UserError(
                f"{name}: differs from {names[0]} by more than seeds: {listed}; summarise runs of "
                "one experiment, scored on the same scans in the same way."
            )
    runs = []
    for name, each in zip(names, results, strict=True):
        fields = flatten_dict(each["config"], sep=".")
        runs.append({"run": name, **{field: fields[field] for field in SEED_FIELDS[:3]}})
    return {
        "evaluate": results[0]["evaluate"],
        "scans": results[0]["scans"],
        "runs": runs,
        **{
            part: _over([each[part] for each in results])
            for part in ("summary", "classifier", "prompt")
        },
    }


def write_over_seeds(folder, means: dict) -> None:
    """Writes summary.json, and summary.csv with a row a protocol and metric."""
    folder = pathlib.Path(folder)
    groups = [*means["summary"].items(), ("", means["classifier"]), ("", means["prompt"])]
    runs = len(means["runs"])
    with whole_file(folder / "summary.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("protocol", "metric", "mean", "std", "runs"))
        for protocol, scores in groups:
            for metric, value in scores.items():
                if value is None:
                    row = ("", "", 0)
                elif isinstance(value, dict):
                    row = (value["mean"], value["std"], value["count"])
                else:
                    row = (value, 0, runs)
                writer.writerow((protocol, metric, *row))
    write_json(folder / "summary.json", means)


def _settings(results: dict) -> dict:
    """What runs to be averaged must agree in."""
    free = {*FREE_FIELDS, *SEED_FIELDS, "evaluate.batch"} - {"evaluate"}
    return {"scans": results["scans"]} | {
        field: value
        for field, value in flatten_dict(results["config"], sep=".").items()
        if not any(field == f or field.startswith(f"{f}.") for f in free)
    }


def _over(values: list):
    """The same tree with each number, or the mean it holds, replaced by its moments over runs."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict) and "mean" not in known[0]:
        return {key: _over([value[key] for value in known]) for key in known[0]}
    if isinstance(known[0], int) and len(set(known)) == 1:
        return known[0]
    numbers = np.array([v["mean"] if isinstance(v, dict) else v for v in known], float)
    std = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return {"mean": float(numbers.mean()), "std": std, "count": len(numbers)}


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checkpoint_step(folder: pathlib.Path) -> int | None:
    """The step that `Checkpoints.restore_best` takes: the best one, else the newest."""
    for kind in ("best", "latest"):
        steps = [int(path.name) for path in (folder / kind).glob("*") if path.name.isdigit()]
        if steps:
            return max(steps)
    return None
