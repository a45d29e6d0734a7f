"""Means of an experiment over runs that differ by their seeds."""

from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict

from sammix_jax.config_files import FREE_FIELDS, differing_fields, is_free
from sammix_jax.data.files import write_csv, write_json
from sammix_jax.data.paths import as_path
from sammix_jax.errors import UserError

# What may differ between runs whose results are averaged, beside `config_files.FREE_FIELDS`.
SEED_FIELDS = ("seed", "data.seed", "data.labels_seed", "data.split_file", "data.labels_file")


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
      over scans, with the sample's standard deviation, 0 of one run, and "scans", of how many in
      the mean. Counts that all runs agree in stay numbers.

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
                scan for scan in results[0]["scans"] if any(scan in each[seen] for each in results)
            ]
            for seen in ("trained_on", "chose")
        },
        "runs": runs,
        **{
            part: _over([each[part] for each in results])
            for part in ("summary", "classifier", "prompt")
        },
    }


def write_over_seeds(folder, means: dict) -> None:
    """Writes summary.json, and summary.csv with a row a protocol and metric."""
    folder = as_path(folder)
    guidance = [("", means[part]) for part in ("classifier", "prompt") if means[part]]
    groups = [*means["summary"].items(), *guidance]
    runs = len(means["runs"])
    rows = []
    for protocol, scores in groups:
        for metric, value in scores.items():
            if value is None:
                row = (None, None, 0)
            elif isinstance(value, dict):
                row = (value["mean"], value["std"], value["count"])
            else:
                row = (value, 0, runs)
            rows.append((protocol, metric, *row))
    write_csv(folder / "summary.csv", ("protocol", "metric", "mean", "std", "runs"), rows)
    write_json(folder / "summary.json", means)


def _refuse_incomplete(name: str, results: dict) -> None:
    if faults := results["faults"]:
        raise UserError(
            f"{name}: {len(faults)} scans could not be scored: {' '.join(faults)} Mend them and "
            "run --mode=evaluate again."
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
        if not is_free(field, free)
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
    found = {"mean": float(numbers.mean()), "std": std, "count": len(numbers)}
    if isinstance(known[0], dict):
        found["scans"] = float(np.mean([value["count"] for value in known]))
    return found
