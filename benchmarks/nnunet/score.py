"""nnU-Net's masks, scored as this project scores its own."""

from __future__ import annotations

import pathlib

import nibabel as nib
import numpy as np
from tqdm import tqdm

from benchmarks.nnunet.layout import CASES, ENDING, Layout, canonical_affine, read_cases
from sammix_jax.config_files import load_config
from sammix_jax.data import datasets, volumes
from sammix_jax.data.masks import read_mask
from sammix_jax.data.nifti import CANONICAL
from sammix_jax.data.paths import as_path
from sammix_jax.data.split_files import training_scans
from sammix_jax.errors import UserError
from sammix_jax.evaluation.results import Evaluation, collect, results_folder, write_results
from sammix_jax.evaluation.scans import read_labelled, scan_digests
from sammix_jax.evaluation.scores import PAPER_SIDE, Guidance, score_scan
from sammix_jax.inference import SlicePredictions, VolumePrediction
from sammix_jax.method.postprocess import keep_component

# No prompt goes into nnU-Net, neither the true box nor a CAM's.
PROTOCOL = "none"


def score(output: pathlib.Path) -> list[Evaluation]:
    """Scores the predictions of an export; writes OUTPUT/evaluation.

    The cases.csv and results.json there are as `sammix_jax.evaluate` writes them, under the
    protocol `none`; nnU-Net has no classifier and no prompt, so "classifier" and "prompt" are None.
    "method" names nnU-Net.

    Returns:
      An evaluation of the split's part, then one of each other folder that was exported.

    Raises:
      UserError: no export, predictions that are missing or belong to no case, or one that is no
        mask on its scan's grid.
    """
    layout, exported = read_cases(output)
    _refuse_unpaired(layout, exported["evaluations"])
    return [_score(layout, evaluation) for evaluation in exported["evaluations"]]


def read_prediction(layout: Layout, case: str, scan: volumes.Volume) -> np.ndarray:
    """The predicted mask of a case on its scan's canonical grid: (D, H, W) bool.

    Raises:
      UserError: unreadable, values other than 0 and 1, or another grid or affine than that of the
        exported scan.
    """
    exported = volumes.Volume(
        path=layout.image("imagesTs", case),
        hu=scan.hu,
        spacing=scan.spacing,
        affine=canonical_affine(scan),
        # Of the exported voxels; the affine of a scan that lost its own says another.
        orientation=nib.orientations.axcodes2ornt(CANONICAL),
    )
    try:
        return read_mask(layout.prediction(case), exported, (1,), (0, 1))
    except UserError as error:
        raise UserError(
            f"{error} It is of the scan {scan.path}: predict {exported.path} again, as `run` does."
        ) from error


def as_prediction(mask: np.ndarray, scan: volumes.Volume, config) -> VolumePrediction:
    """A (D, H, W) mask in the form that `score_scan` takes, without all that a classifier gives.

    The logits are ±1 on slices of `PAPER_SIDE` squared, as the truth is brought onto them.
    """
    paper = scan.geometry(PAPER_SIDE, config.data.resize)
    inside = np.stack([paper.mask_to_square(m) for m in mask])
    logits = np.where(inside, np.float32(1), np.float32(-1))
    slices = SlicePredictions({PROTOCOL: logits})
    return VolumePrediction({PROTOCOL: mask}, slices, None, None)


def _score(layout: Layout, exported: dict) -> Evaluation:
    config = load_config(layout.output)
    config.evaluate.root, config.evaluate.scans = exported["root"], exported["scans"]
    at_paper_side = config.copy_and_resolve_references()
    at_paper_side.data.size = PAPER_SIDE  # of the logits
    trained = training_scans(config, layout.output)
    cases, guidance, seen, digests = [], [], [], {}
    for case, fields in tqdm(exported["cases"].items(), desc="score", unit="scan", disable=None):
        known = read_labelled(_scan(fields), config)
        mask = read_prediction(layout, case, known.volume)
        mask = keep_component(mask, config.evaluate.component)
        prediction = as_prediction(mask, known.volume, config)
        cases += score_scan(known, prediction, (PROTOCOL,), at_paper_side)
        guidance.append(Guidance(known.organ_pixels > 0, None, None, None))
        found = scan_digests(known)
        digests[known.name] = "-".join(found)
        if trained.digests.intersection(found):
            seen.append(known.name)
    results = collect(config, layout.output, cases, guidance, (), seen, digests, (), None)
    results["method"] = "nnU-Net"
    write_results(results_folder(config, layout.output), results, cases)
    return Evaluation(cases, results, [])


def _scan(fields: dict) -> datasets.Scan:
    return datasets.Scan(
        fields["name"],
        as_path(fields["image"]),
        as_path(fields["label"]),
        tuple(fields["label_values"]),
        tuple(fields["known_values"]),
        fields["ignore_value"],
    )


def _refuse_unpaired(layout: Layout, evaluations: list[dict]) -> None:
    scans = {case: scan for each in evaluations for case, scan in each["cases"].items()}
    missing = [case for case in scans if not layout.prediction(case).exists()]
    if missing:
        named = ", ".join(f"{case}{ENDING} (scan {scans[case]['name']})" for case in missing[:8])
        raise UserError(
            f"{layout.predictions}: {len(missing)} of {len(scans)} predictions are missing: "
            f"{named}; predict all of {layout.raw / 'imagesTs'}, as `run` does."
        )
    found = {path.name.removesuffix(ENDING) for path in layout.predictions.glob(f"*{ENDING}")}
    if unknown := sorted(found - set(scans)):
        raise UserError(
            f"{layout.predictions}: {unknown[:8]} belong to no scan of {layout.output / CASES}; "
            "are these the predictions of another export? Remove them."
        )
