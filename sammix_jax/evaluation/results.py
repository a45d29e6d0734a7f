"""The results of an evaluation, and their files."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from sammix_jax.config_files import differing_fields, load_config
from sammix_jax.data.files import read_json, sha256, write_csv, write_json
from sammix_jax.data.paths import Path, as_path, resolved
from sammix_jax.data.split_files import LABELS, SPLIT
from sammix_jax.errors import UserError
from sammix_jax.evaluation.scores import Case, Guidance, summarise_cases, summarise_guidance
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import scored_protocols
from sammix_jax.training.checkpoint import best_step

_LOG = logging.getLogger(__name__)

RESULTS, CASES = "results.json", "cases.csv"
# Of an evaluation that goes on, or was cut off.
CASES_SO_FAR = "cases_so_far.csv"
# Of `config.evaluate`, what changes no score.
UNSCORED = ("batch", "save_masks")


@dataclasses.dataclass(frozen=True)
class Example:
    """A slice for the report: the one that shows most of the organ, on the store's grid (H, W).

    Attributes:
      case: the scan's scores under the first protocol.
      slice: which of the scan's slices this is.
      hu, truth, predicted, cam: (H, W) int16, bool, bool, and float in [0, 1]; no CAM where the
        system has none.
      box, true_box: (4,) XYXY in pixels; no box without a CAM, no true box where no slice shows the
        organ.
    """

    case: Case
    slice: int
    hu: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    cam: np.ndarray | None
    box: np.ndarray | None
    true_box: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
      cases: of every scan under every protocol, the headline first.
      results: the content of results.json.
      examples: one a scan.
    """

    cases: list[Case]
    results: dict
    examples: list[Example]

    @property
    def summary(self) -> dict[str, dict]:
        """By protocol, as `scores.summarise_cases` has it."""
        return self.results["summary"]


def results_folder(config, workdir) -> Path:
    """WORKDIR/evaluation/PART; for another folder of scans its name and a digest of its path.

    Settings other than the workdir's own follow, as in `test-component=largest`: its results stay.
    """
    name, workdir = config.evaluate.part, as_path(workdir)
    if config.evaluate.root:
        root = resolved(as_path(config.evaluate.root))
        name = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:6]}"
    if (workdir / "config.json").exists():
        own = load_config(workdir).evaluate
        for field, value in sorted(config.evaluate.items()):
            if field not in ("part", "root", *UNSCORED) and value != own[field]:
                said = "+".join(map(str, value)) if isinstance(value, tuple) else value
                name += f"-{field}={said}"
    return workdir / "evaluation" / name


def collect(
    config,
    workdir,
    cases: Sequence[Case],
    guidance: Sequence[Guidance],
    faults: Sequence[str],
    trained_on: Sequence[str],
    digests: Mapping[str, str],
    chose: Sequence[str],
    step: int | None,
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
      step: of that checkpoint; None of a model that has none here.
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
        "digests": dict(digests),
        "trained_on": list(trained_on),
        "chose": list(chose),
        "faults": list(faults),
        "config": json.loads(config.to_json()),
        "split_sha256": sha256(workdir / SPLIT),
        "labels_sha256": sha256(workdir / LABELS),
        "checkpoint_step": step,
    }


def write_results(folder, results: dict, cases: Sequence[Case]) -> None:
    """Writes results.json, and cases.csv with a row a scan and protocol."""
    folder = as_path(folder)
    write_cases(folder / CASES, cases)
    write_json(folder / RESULTS, results)
    (folder / CASES_SO_FAR).unlink(missing_ok=True)
    _LOG.info("evaluation → %s", folder)


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """Writes a table with a row a scan and protocol."""
    columns = [field.name for field in dataclasses.fields(Case)]
    write_csv(path, columns, map(dataclasses.astuple, cases))


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
        raise UserError(f"{path}: no such file; {again}, with these settings, first.")
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


def _other_settings(results: dict, config) -> list[str]:
    """The fields of `config.evaluate` that the results were made with otherwise, with both values.

    How many slices go in at a time is no setting: it changes speed alone.
    """
    settings = [
        {f"evaluate.{field}": value for field, value in fields.items() if field not in UNSCORED}
        for fields in (results["evaluate"], json.loads(config.evaluate.to_json()))
    ]
    return differing_fields(*settings)
