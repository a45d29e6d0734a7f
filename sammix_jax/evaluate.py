"""Scores a trained model on whole scans, on their own grids, under each prompt protocol."""

import functools
import logging

import numpy as np
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.data import hdf5
from sammix_jax.data.split_files import (
    kept_digests,
    training_scans,
)
from sammix_jax.errors import UserError, listed
from sammix_jax.evaluation.results import (
    CASES_SO_FAR,
    Evaluation,
    Example,
    collect,
    results_folder,
    seen_before,
    write_cases,
    write_results,
)
from sammix_jax.evaluation.scans import read_labelled, scan_digests, scans_to_score
from sammix_jax.evaluation.scores import Case, score_guidance, score_scan
from sammix_jax.inference import VolumePrediction, make_predict, mesh_of, predict_volume
from sammix_jax.method.cam import mask_to_box
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import scored_protocols
from sammix_jax.training.trained import load_model

_LOG = logging.getLogger(__name__)


class IncompleteEvaluation(UserError):
    """Some scans could not be scored; `evaluation` holds the others."""

    def __init__(self, message: str, evaluation: Evaluation):
        super().__init__(message)
        self.evaluation = evaluation


def evaluate(config, workdir) -> Evaluation:
    """Evaluates the best checkpoint; writes cases.csv and results.json into `results_folder`, and
    until all scans are scored those that are into cases_so_far.csv.

    Args:
      config: the run's config; `config.evaluate` says which scans and protocols.
      workdir: a trained workdir.

    Returns:
      What was found; nothing on other processes than the first, which alone scores.

    Raises:
      UserError: no labelled scans, none that can be read, or no checkpoint.
      IncompleteEvaluation: some bad scans, once all others are scored and written.
    """
    protocols = scored_protocols(make_system(config), config.evaluate.protocols)
    scans, faults = scans_to_score(config, workdir)
    system, variables, step = load_model(config, workdir)
    predict = make_predict(system, config, protocols, mesh_of(variables))
    trained = training_scans(config, workdir)
    if trained.hdf5 != hdf5.is_hdf5(scans[0].image):  # a folder holds scans of one kind
        kinds = ("HDF5", "NIfTI") if trained.hdf5 else ("NIfTI", "HDF5")
        _LOG.warning(
            "the model was trained on %s files and these are %s: nobody can tell whether any of "
            "them trained it. HDF5 slices are taken as they lie, for they keep no orientation.",
            *kinds,
        )
    kept = {} if config.evaluate.root else kept_digests(workdir)
    folder = results_folder(config, workdir)
    cases, guidance, examples, seen, chose, digests = [], [], [], [], [], {}
    for scan in tqdm(scans, desc="evaluate", unit="scan", disable=hosts.hides_progress()):
        # All processes predict a scan, or none.
        known, fault = hosts.for_all(functools.partial(read_labelled, scan, config), scan.image)
        if not fault:
            found = scan_digests(known)
            if kept.get(scan.name, found) != found:
                fault = (
                    f"{scan.image}: other voxels, or another mask, than when {workdir} was "
                    "trained; bring them back as they were, or name them as other scans with "
                    "--config.evaluate.root=DIR."
                )
        if fault:
            _LOG.error("%s", fault)
            faults.append(fault)
            continue
        prediction = predict_volume(predict, variables, known.volume, known.truth, config)
        digests[scan.name] = "-".join(found)
        # Masks without the organ are all alike.
        telling = found if known.organ_pixels.any() else found[1:]
        if trained.digests.intersection(telling):
            seen.append(scan.name)
        if trained.chose.intersection(telling):
            chose.append(scan.name)
        # Surfaces take gigabytes: once a machine, not once a process.
        score = functools.partial(score_scan, known, prediction, protocols, config)
        scored = hosts.on_first(score)
        if scored:
            cases += scored
            write_cases(folder / CASES_SO_FAR, cases)
            guidance.append(score_guidance(known, prediction))
            examples.append(_example(scored[0], prediction))
    if not digests:
        raise UserError("no scan could be scored:" + listed(faults))
    evaluation = Evaluation([], {}, [])
    if hosts.is_first():
        results = collect(config, workdir, cases, guidance, faults, seen, digests, chose, step)
        for warning in seen_before(results):
            _LOG.warning(warning)
        evaluation = Evaluation(cases, results, examples)
        write_results(folder, results, cases)
    if faults:
        told = f"{len(faults)} of {len(faults) + len(digests)} scans could not be scored"
        rest = f"the results of the others are in {folder}"
        raise IncompleteEvaluation(f"{told}; {rest}:{listed(faults)}", evaluation)
    return evaluation


def _example(case: Case, prediction: VolumePrediction) -> Example:
    slices, squares = prediction.slices, prediction.truth
    z = int(squares.sum(axis=(1, 2)).argmax())
    (true_box,), (absent,) = (np.asarray(found) for found in mask_to_box(squares[z : z + 1]))
    # Copies: a view of one slice would keep the whole scan in memory until the report is written.
    return Example(
        case=case,
        slice=z,
        hu=prediction.hu[z].copy(),
        truth=squares[z].copy(),
        predicted=slices.logits[case.protocol][z] > 0,
        cam=None if slices.cam is None else slices.cam[z].copy(),
        box=None if slices.box is None else slices.box[z].copy(),
        true_box=None if absent else true_box,
    )
