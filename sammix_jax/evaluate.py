"""Scores a trained model on whole scans, on their own grids, under each prompt protocol."""

import functools
import logging

import numpy as np
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.data import datasets, hdf5, volumes
from sammix_jax.data.masks import count_organ_pixels, read_annotation
from sammix_jax.data.paths import as_path
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.split_files import (
    changed_scans,
    digest,
    image_digest,
    kept_digests,
    kept_split,
    training_scans,
)
from sammix_jax.data.splits import partly_annotated, scored_scans
from sammix_jax.errors import UserError
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
from sammix_jax.evaluation.scores import Case, LabelledScan, score_guidance, score_scan
from sammix_jax.inference import VolumePrediction, load_model, make_predict, mesh_of, predict_volume
from sammix_jax.method.cam import mask_to_box
from sammix_jax.prepare import kept_slices, store_folder
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import scored_protocols

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
            prediction = predict_volume(predict, variables, known.volume, known.truth, config)
            found = scan_digests(known, prediction)
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
        raise UserError("no scan could be scored:" + _listed(faults))
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
        raise IncompleteEvaluation(f"{told}; {rest}:{_listed(faults)}", evaluation)
    return evaluation


def scans_to_score(config, workdir) -> tuple[list[datasets.Scan], list[str]]:
    """The labelled scans to score, and what is wrong with those that were drawn and cannot be read.

    Args:
      config: the run's; `evaluate` names a part of the split or another folder.
      workdir: a workdir that keeps its split.

    Raises:
      UserError: no such scans.
    """
    if config.evaluate.root:
        return _other_scans(config)
    names = scored_scans(config.evaluate, kept_split(workdir))
    store = SliceStore.open(store_folder(config, workdir))
    records = store.records
    missing = sorted(set(names) - set(records))
    if missing:
        raise UserError(
            f"{store.root}: lacks the scans {missing[:5]} of the workdir's split; prepare the "
            "workdir's data again with --mode=prepare."
        )
    if changed := changed_scans(store, workdir, names):
        raise UserError(
            f"{store.root}: the scans {changed[:5]} of the workdir's split have other voxels or "
            f"masks there than when {workdir} was trained; bring them back as they were, or name "
            "them as other scans with --config.evaluate.root=DIR."
        )
    moved = [records[name].image for name in names if not as_path(records[name].image).exists()]
    if len(moved) == len(names):
        raise UserError(
            f"{moved[0]}: no such file, as of all scans of evaluate.part={config.evaluate.part}. "
            "Where the data was moved, tell the store: --mode=prepare --config=… "
            f"--config.data.root=DIR --workdir={workdir}, with the config of the run."
        )
    partly = partly_annotated(config.evaluate, names, records)
    faults = [
        f"{records[name].label}: annotated in part, so it cannot be scored; annotate it throughout."
        for name in partly
    ]
    scans = [
        datasets.Scan(
            name,
            as_path(records[name].image),
            as_path(records[name].label),
            records[name].label_values,
            ignore_value=records[name].ignore_value,
        )
        for name in names
        if name not in partly
    ]
    return scans, faults


def _other_scans(config) -> tuple[list[datasets.Scan], list[str]]:
    settings = config.evaluate
    found = datasets.find_scans(
        settings.root, config.data.organ, tuple(settings.label_values), field="evaluate.root"
    )
    scans = [scan for scan in found if scan.label]
    if not scans:
        raise UserError(f"evaluate.root={settings.root}: no scan there has a mask.")
    if without := [scan.name for scan in found if not scan.label]:
        _LOG.warning(
            "evaluate.root=%s: %d of %d scans have no mask and are not scored, such as %s.",
            settings.root,
            len(without),
            len(found),
            ", ".join(without[:5]),
        )
    return _draw(scans, config) if settings.scans else (scans, [])


def _draw(scans: list[datasets.Scan], config) -> tuple[list[datasets.Scan], list[str]]:
    """`evaluate.scans` of the scans that show the organ, by `evaluate.seed`, in natural order.

    The draw depends on the scans' names and masks alone. A scan that cannot be read is not drawn,
    and told.
    """
    wanted = config.evaluate.scans
    ordered = sorted(scans, key=lambda scan: (datasets.natural(scan.name), scan.name))
    drawn, faults = [], []
    for i in np.random.default_rng(config.evaluate.seed).permutation(len(ordered)):
        if len(drawn) == wanted:
            break
        try:
            shows = read_labelled(ordered[i], config).organ_pixels.any()
        except UserError as error:
            faults.append(str(error))
            continue
        if shows:
            drawn.append(ordered[i])
    if len(drawn) < wanted:
        unread = f" {len(faults)} cannot be read:{_listed(faults)}" if faults else ""
        raise UserError(
            f"evaluate.scans={wanted}: only {len(drawn)} of the {len(scans)} labelled scans below "
            f"{config.evaluate.root} show data.organ={config.data.organ}; ask for fewer, or 0 for "
            f"all.{unread}"
        )
    return sorted(drawn, key=ordered.index), faults


def _listed(faults: list[str]) -> str:
    return "".join(f"\n  {fault}" for fault in faults)


def read_labelled(scan: datasets.Scan, config) -> LabelledScan:
    """Reads a scan and its mask, in canonical orientation.

    Raises:
      UserError: as `volumes.read_volume` and `masks.read_annotation`; a mask that leaves voxels
        open.
    """
    volume = volumes.read_volume(scan.image, config.data.default_orientation)
    truth, annotated = read_annotation(
        scan.label, volume, scan.label_values, scan.known_values, scan.ignore_value
    )
    if not annotated.all():
        raise UserError(
            f"{scan.label}: annotated in part ({np.count_nonzero(annotated)} of {len(annotated)} "
            "slices throughout), so it cannot be scored; annotate it throughout."
        )
    depth, data = len(truth), config.data
    whole = range(depth)
    kept = kept_slices(depth, data.central_fraction, tuple(data.slice_range))
    slices = whole if volume.already_cut else kept
    return LabelledScan(scan.name, volume, truth, count_organ_pixels(scan.label, truth), slices)


def scan_digests(scan: LabelledScan, prediction: VolumePrediction) -> tuple[str, str]:
    """With the mask, and of the image alone; as preparing and training know the scan.

    Of the prediction `hu` alone is read.
    """
    shape, kept = scan.truth.shape, scan.kept or range(len(scan.truth))
    organ_pixels = scan.organ_pixels[scan.kept.start : scan.kept.stop]
    return (
        digest(shape, scan.volume.affine.tolist(), organ_pixels),
        image_digest(shape, prediction.hu[kept[len(kept) // 2]]),
    )


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
