"""The picture of what was prepared."""

import nibabel as nib
import numpy as np

from sammix_jax.evaluation.gallery import MOST, gallery
from sammix_jax.prepare import prepare


def panels(config, folder):
    """Title → what is drawn there, of the scans in the picture."""
    figure = gallery(prepare(config, folder), (-160, 240))
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def test_the_slice_with_most_of_the_organ_and_its_outline(config, lits, tmp_path):
    label = next(lits.glob("segmentation-1.*"))
    whole = nib.load(label)
    nib.save(nib.Nifti1Image(np.zeros(whole.shape, np.uint8), whole.affine), label)
    config.data.root, config.data.store = str(lits), ""
    found = panels(config, tmp_path / "run")
    assert list(found) == [
        "volume-0, slice 3 of 6",
        "volume-1, slice 4 of 6\nno liver",
        "volume-2, slice 4 of 6\nno mask",
    ]
    assert [len(axis.images) for axis in found.values()] == [1, 1, 1]
    assert [axis.texts[0].get_text() for axis in found.values()] == ["R", "R", "R"]
    outlined = [len(axis.collections) for axis in found.values()]
    assert outlined == [1, 0, 0]


def test_scans_that_know_no_orientation_are_marked(config, lits, tmp_path):
    for path in lits.iterdir():
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), np.eye(4)), path)
    config.data.root, config.data.store = str(lits), ""
    found = panels(config, tmp_path / "run")
    assert next(iter(found)).partition("\n")[2] == "knows no orientation"
    assert not any(axis.texts for axis in found.values())


def test_of_many_scans_some_along_the_list_are_shown(config, lits, tmp_path):
    image, label = (next(lits.glob(f"{kind}-0.*")) for kind in ("volume", "segmentation"))
    for n in range(3, 20):
        (lits / f"volume-{n}.nii.gz").write_bytes(image.read_bytes())
        (lits / f"segmentation-{n}.nii.gz").write_bytes(label.read_bytes())
    config.data.root, config.data.store = str(lits), ""
    found = [title.partition(",")[0] for title in panels(config, tmp_path / "run")]
    assert len(found) == MOST and found[0] == "volume-0" and found[-1] == "volume-19"
