"""The results of an evaluation: their files, their tables, and their means over seeds."""

import csv
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from flax.traverse_util import flatten_dict

from sammix_jax.checkpoint import best_step
from sammix_jax.config import FREE_FIELDS, differing_fields
from sammix_jax.data.files import read_json, whole_file, write_json
from sammix_jax.data.paths import Path, as_path, resolved
from sammix_jax.data.splits import LABELS, SPLIT
from sammix_jax.errors import UserError
from sammix_jax.scores import Case, Guidance, summarise_cases, summarise_guidance
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import scored_protocols

_LOG = logging.getLogger(__name__)

RESULTS, CASES = "results.json", "cases.csv"
# What may differ between runs whose results are averaged, beside `config.FREE_FIELDS`.
SEED_FIELDS = ("seed", "data.seed", "data.labels_seed", "data.split_file", "data.labels_file")


def results_folder(config, workdir) -> Path:
    """WORKDIR/evaluation/PART; for another folder of scans its name and a digest of its path."""
    name = config.evaluate.part
    if config.evaluate.root:
        root = resolved(as_path(config.evaluate.root))
        name = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:6]}"
    return as_path(workdir) / "evaluation" / name


def collect(
    config,
    workdir,
    cases: Sequence[Case],
    guidance: Sequence[Guidance],
    faults: Sequence[str],
    trained_on: Sequence[str],
    digests: Mapping[str, str] | None = None,
    chose: Sequence[str] = (),
) -> dict:
    """The content of results.json.

    Args:
      config, workdir: the run's.
      cases: of every scan under every protocol.
      guidance: of every scan.
      faults: what is wrong with each scan that could not be scored.
      trained_on: names of the scans that trained the model.
      digests: of each scan by name, what `over_seeds` knows it by.
      chose: names of the scans that chose the model's checkpoint.
    """
    workdir = as_path(workdir)
    protocols = scored_protocols(make_system(config), {case.protocol for case in cases})
    classifier, prompt = summarise_guidance(guidance)
    return {
        "evaluate": json.loads(config.evaluate.to_json()),
        "summary": {
            p: summarise_cases([c for c in cases if c.protocol == p], config.data.patient)
            for p in protocols
        },
        "classifier": classifier,
        "prompt": prompt,
        "scans": list(dict.fromkeys(case.scan for case in cases)),
        "digests": dict(digests or {}),
        "trained_on": list(trained_on),
        "chose": list(chose),
        "faults": list(faults),
        "config": json.loads(config.to_json()),
        "split_sha256": _sha256(workdir / SPLIT),
        "labels_sha256": _sha256(workdir / LABELS),
        "checkpoint_step": best_step(workdir),
    }


def write_results(folder, results: dict, cases: Sequence[Case]) -> None:
    """Writes results.json, and cases.csv with a row a scan and protocol."""
    folder = as_path(folder)
    with whole_file(folder / CASES) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Case))
        writer.writerows(dataclasses.astuple(case) for case in cases)
    write_json(folder / RESULTS, results)
    _LOG.info("evaluation → %s", folder)


def saved_results(config, workdir) -> dict | None:
    """The results of the workdir's checkpoint in the same settings, if there are whole ones.

    A workdir may have been copied without its checkpoints.
    """
    path = results_folder(config, workdir) / RESULTS
    if not path.exists():
        return None
    results = read_json(path)
    same_step = best_step(workdir) in (None, results["checkpoint_step"])
    sound = same_step and not results["faults"] and not _other_settings(results, config)
    return results if sound else None


def load_results(config, workdir) -> dict:
    """The results of the workdir's evaluation that the config names.

    Raises:
      UserError: there are none, or they were made with other settings or another checkpoint.
    """
    path = results_folder(config, workdir) / RESULTS
    again = f"run --mode=evaluate --workdir={workdir}"
    if not path.exists():
        raise UserError(f"{path}: no such file; {again} first.")
    results = read_json(path)
    if differing := _other_settings(results, config):
        raise UserError(
            f"{path}: made with {', '.join(differing)}; {again} with these settings, or give those "
            "it was made with."
        )
    made, step = results["checkpoint_step"], best_step(workdir)
    if step not in (None, made):
        raise UserError(f"{path}: of the checkpoint of step {made} (now {step}); {again} again.")
    return results


def over_seeds(results: Sequence[dict], names: Sequence[str] = ()) -> dict:
    """Means over runs that differ by their seeds, scored on the same scans in the same way.

    Args:
      results: the content of each run's results.json.
      names: what messages call the runs, such as their folders; by number without.

    Returns:
      What `result_table` takes: "evaluate" and "scans" of all of them, "trained_on" and "chose"
      with the scans that trained any of the models or chose its checkpoint, "runs" with each one's
      seeds, and "summary", "classifier" and "prompt" as in the results, each number replaced by
      {"mean", "std", "count"} over the runs that have one (None where none has): of each run's mean
      over scans, with the sample's standard deviation, 0 of one run. Counts that all runs agree in
      stay numbers.

    Raises:
      UserError: no results; some that lack scans, repeat another run, or differ from the first in
        more than seeds; names what differs.
    """
    if not results:
        raise UserError("no results to summarise: expected those of one run at least.")
    names = list(names) or [f"run {i}" for i in range(1, len(results) + 1)]
    for name, each in zip(names, results, strict=True):
        _refuse_incomplete(name, each)
    _refuse_repeats(names, results)
    first = _settings(results[0])
    for name, other in zip(names[1:], map(_settings, results[1:]), strict=True):
        if differing := differing_fields(first, other):
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
        **{
            seen: [
                scan
                for scan in results[0]["scans"]
                if any(scan in each.get(seen, ()) for each in results)
            ]
            for seen in ("trained_on", "chose")
        },
        "runs": runs,
        **{
            part: _over([each[part] for each in results])
            for part in ("summary", "classifier", "prompt")
        },
    }


def seen_before(results: dict) -> list[str]:
    """What to warn of: scans that trained the model, or any of several, or chose its checkpoint.

    Args:
      results: the content of results.json, or what `over_seeds` gives.
    """
    parts = (("trained_on", "trained the model"), ("chose", "chose the model's checkpoint"))
    return [
        f"{len(scans)} of these scans {did}, so the scores are no measure of new patients: "
        f"{', '.join(scans)}."
        for part, did in parts
        if (scans := results.get(part))
    ]


def write_over_seeds(folder, means: dict) -> None:
    """Writes summary.json, and summary.csv with a row a protocol and metric."""
    folder = as_path(folder)
    guidance = [("", means[part]) for part in ("classifier", "prompt") if means[part]]
    groups = [*means["summary"].items(), *guidance]
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


def _other_settings(results: dict, config) -> list[str]:
    """The fields of `config.evaluate` that the results were made with otherwise, with both values.

    How many slices go in at a time is no setting: it changes speed alone.
    """
    settings = [
        {f"evaluate.{field}": value for field, value in fields.items() if field != "batch"}
        for fields in (results["evaluate"], json.loads(config.evaluate.to_json()))
    ]
    return differing_fields(*settings)


def _refuse_incomplete(name: str, results: dict) -> None:
    if faults := results["faults"]:
        raise UserError(
            f"{name}: {len(faults)} scans could not be scored: {' '.join(faults)} Mend them and "
            "run --mode=evaluate again."
        )
    if set(results.get("digests", ())) != set(results["scans"]):
        raise UserError(
            f"{name}: its results do not tell by digests which scans were scored, as those of an "
            "earlier version; run --mode=evaluate again."
        )


def _refuse_repeats(names: Sequence[str], results: Sequence[dict]) -> None:
    """Runs of one seed on one split and one set of labelled slices are one run."""
    first = {}
    for name, each in zip(names, results, strict=True):
        seed = each["config"]["seed"]
        run = (seed, each["split_sha256"], each["labels_sha256"])
        if run in first:
            raise UserError(
                f"{name}: repeats {first[run]}, with the same seed={seed}, split and labelled "
                "slices; a repeat is no new seed: leave one out, or train with other seeds."
            )
        first[run] = name


def _settings(results: dict) -> dict:
    """What runs to be averaged must agree in."""
    free = {*FREE_FIELDS, *SEED_FIELDS, "evaluate.batch"} - {"evaluate"}
    scans = {f"digest of {name}": digest for name, digest in results["digests"].items()}
    return {"scans": results["scans"], **scans} | {
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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
