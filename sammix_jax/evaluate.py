"""Scores a trained model on whole scans, on their own grids, under each prompt protocol."""

import functools
import logging
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.data import hdf5
from sammix_jax.data.datasets import Scan
from sammix_jax.data.masks import write_mask
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
from sammix_jax.evaluation.scans import (
    LabelledScan,
    read_labelled,
    scan_digests,
    scans_to_score,
)
from sammix_jax.evaluation.scores import Case, score_guidance, score_scan
from sammix_jax.evaluation.so_far import ScoredScan, ScoredSoFar, model_digest
from sammix_jax.inference import VolumePrediction, make_predict, mesh_of, predict_volume
from sammix_jax.method.cam import mask_to_box
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import scored_protocols
from sammix_jax.training.trained import load_model

_LOG = logging.getLogger(__name__)

MASKS = "masks"


class IncompleteEvaluation(UserError):
    """Some scans could not be scored; `evaluation` holds the others."""

    def __init__(self, message: str, evaluation: Evaluation):
        super().__init__(message)
        self.evaluation = evaluation


def evaluate(
    config, workdir, report: Callable[[Evaluation], None] = lambda evaluation: None
) -> Evaluation:
    """Evaluates the best checkpoint; writes cases.csv and results.json into `results_folder`, and
    where `evaluate.save_masks` asks for them the masks of the first protocol that is scored.

    Until all scans are scored those that are lie in cases_so_far.csv, and in so_far/ all that an
    evaluation of the same model takes over of them when it goes on with the others.

    Args:
      config: the run's config; `config.evaluate` says which scans and protocols.
      workdir: a trained workdir.
      report: is given what was found, on every process, before the parts of it in so_far/ are let
        go: an evaluation that was cut off in it has nothing to score again.

    Returns:
      What was found; nothing on other processes than the first, which alone scores.

    Raises:
      UserError: no labelled scans, none that can be read, or no checkpoint; several processes find
        different scans.
      IncompleteEvaluation: some bad scans, once all others are scored, written and reported.
    """
    protocols = scored_protocols(make_system(config), config.evaluate.protocols)
    scans, faults = scans_to_score(config, workdir)
    if not hosts.all_alike([scan.name for scan in scans]):
        raise UserError(
            "the processes of this run find different scans to score; let all machines see the "
            "same folders."
        )
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
    so_far = ScoredSoFar(folder, config, model_digest(variables))
    scored, new, seen, chose, digests, shown = [], 0, [], [], {}, False
    for scan in tqdm(scans, desc="evaluate", unit="scan", disable=hosts.hides_progress()):
        # All processes predict a scan, or none.
        read = functools.partial(_read, scan, config, workdir, kept.get(scan.name))
        found, fault = hosts.for_all(read, scan.image)
        if not fault and not hosts.all_alike(found[1]):
            fault = f"{scan.image}: holds other voxels, or its mask does, on another machine."
        if fault:
            _LOG.error("%s", fault)
            faults.append(fault)
            continue
        known, of_scan = found
        digests[scan.name] = "-".join(of_scan)
        # Masks without the organ are all alike.
        shown |= (shows := bool(known.organ_pixels.any()))
        telling = of_scan if shows else of_scan[1:]
        if trained.digests.intersection(telling):
            seen.append(scan.name)
        if trained.chose.intersection(telling):
            chose.append(scan.name)
        taken = hosts.on_first(functools.partial(so_far.load, scan.name, of_scan))
        is_new = not hosts.any_process(taken is not None)
        if is_new:
            prediction = predict_volume(predict, variables, known.volume, known.truth, config)
            if config.evaluate.save_masks:
                path = folder / MASKS / f"{scan.name}.nii.gz"
                mask = prediction.masks[protocols[0]]
                hosts.on_first(functools.partial(write_mask, path, mask, known.volume))
            score = functools.partial(_score, known, prediction, protocols, config)
            # Surfaces take gigabytes: once a machine, not once a process.
            taken = hosts.on_first(score)
        if taken:
            scored.append(taken)
        if taken and is_new:
            new += 1
            so_far.save(taken, of_scan)
            write_cases(folder / CASES_SO_FAR, [case for scan in scored for case in scan.cases])
    if not digests:
        raise UserError("no scan could be scored:" + listed(faults))
    if not shown:
        _LOG.warning(
            "no mask of these %d scans shows %s: is it the organ that was annotated there, and "
            "does %s.label_values say what counts?",
            len(digests),
            config.data.organ,
            "evaluate" if config.evaluate.root else "data",
        )
    if before := len(scored) - new:
        _LOG.info("%d of %d scans were scored before, and are taken over", before, len(digests))
    evaluation = Evaluation([], {}, [])
    if hosts.is_first():
        cases = [case for scan in scored for case in scan.cases]
        guidance = [scan.guidance for scan in scored]
        results = collect(config, workdir, cases, guidance, faults, seen, digests, chose, step)
        for warning in seen_before(results):
            _LOG.warning(warning)
        evaluation = Evaluation(cases, results, [scan.example for scan in scored])
        write_results(folder, results, cases)
    report(evaluation)
    if hosts.is_first() and not faults:  # with some the command comes again, once they are mended
        so_far.clear()
    if faults:
        told = f"{len(faults)} of {len(faults) + len(digests)} scans could not be scored"
        rest = f"the results of the others are in {folder}"
        raise IncompleteEvaluation(f"{told}; {rest}:{listed(faults)}", evaluation)
    return evaluation


def _read(
    scan: Scan, config, workdir, digests: tuple[str, str] | None
) -> tuple[LabelledScan, tuple[str, str]]:
    """A scan and its digests, which must be those of the workdir's training where it has any."""
    known = read_labelled(scan, config)
    found = scan_digests(known)
    if digests not in (None, found):
        raise UserError(
            f"{scan.image}: other voxels, or another mask, than when {workdir} was trained; bring "
            "them back as they were, or name them as other scans with --config.evaluate.root=DIR."
        )
    return known, found


def _score(
    known: LabelledScan, prediction: VolumePrediction, protocols: tuple[str, ...], config
) -> ScoredScan:
    cases = score_scan(known, prediction, protocols, config)
    return ScoredScan(cases, score_guidance(known, prediction), _example(cases[0], prediction))


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
