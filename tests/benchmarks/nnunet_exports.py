"""Exports to nnU-Net that its tests share, and predictions as nnU-Net would leave them."""

import nibabel as nib
import numpy as np
import pytest
from conftest import small_config

from benchmarks.nnunet.export import export
from benchmarks.nnunet.layout import read_cases
from sammix_jax import prepare
from sammix_jax.data import phantom

K, NEGATIVES = 7, 3
FILE_ORDER = "IPR"  # of the second domain's scans here: no axis where nnU-Net would look for it


def config_of_k():
    config = small_config()
    config.data.labelled_slices = K
    config.data.split = (3, 1, 1)
    config.data.phantom.unlabelled = 0
    config.evaluate.scans = 0
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workdir that holds a prepared store and has not been trained."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare(config_of_k(), folder)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A scan of the second domain, stored in another axis order."""
    folder = tmp_path_factory.mktemp("others")
    phantom.write_lits(folder, 1, seed=5, domain=phantom.DOMAINS["unenhanced"])
    for path in folder.glob("*.nii*"):
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(FILE_ORDER)
        )
        turned = nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn)
        path.unlink()
        nib.save(turned, path)
    return folder


@pytest.fixture(scope="module")
def exported(prepared, others, tmp_path_factory):
    output = tmp_path_factory.mktemp("nnunet") / "export"
    config = config_of_k()
    return export(config, prepared, output, negatives=NEGATIVES, roots=[str(others)])


@pytest.fixture
def layout(exported):
    """The export without predictions and scores."""
    for path in (*exported.output.glob("predictions/*"), *exported.output.glob("evaluation/*/*")):
        path.unlink()
    return exported


def predict(layout, change=lambda mask: mask, move=lambda affine: affine):
    """Writes the truth as nnU-Net's prediction, changed as told."""
    layout.predictions.mkdir(exist_ok=True)
    for evaluation in read_cases(layout.output)[1]["evaluations"]:
        for case, scan in evaluation["cases"].items():
            given = nib.load(layout.image("imagesTs", case))
            label = nib.load(scan["label"])
            turn = nib.orientations.ornt_transform(
                nib.io_orientation(label.affine), nib.io_orientation(given.affine)
            )
            truth = np.asarray(label.as_reoriented(turn).dataobj) > 0
            mask = change(truth).astype(np.uint8)
            nib.save(nib.Nifti1Image(mask, move(given.affine)), layout.prediction(case))
