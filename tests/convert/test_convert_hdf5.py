"""Slice store → the authors' HDF5 files → slice store: the model sees the same bits."""

import dataclasses

import h5py
import nibabel as nib
import numpy as np
import pytest

from convert.hdf5 import convert
from sammix_jax.data import paper
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.slices import SliceStore
from sammix_jax.errors import UserError
from sammix_jax.prepare import prepare

AFFINE = np.diag([0.8, 0.8, 5.0, 1.0])


@pytest.fixture
def store(config, tmp_path):
    """A store of the paper's arithmetic: two labelled scans and one without a mask."""
    root = tmp_path / "scans"
    root.mkdir()
    rng = np.random.default_rng(0)
    for n in (2, 10, 11):
        hu = rng.normal(40, 150, (300, 280, 10 + n)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, AFFINE), root / f"volume-{n}.nii")
        mask = np.zeros(hu.shape, np.uint8)
        mask[50:80, 60:120, 5:7] = 1
        mask[3, 3, 7:10] = 1  # lost in the resize
        if n != 11:
            nib.save(nib.Nifti1Image(mask, AFFINE), root / f"segmentation-{n}.nii")
    config.data.root, config.data.size, config.data.resize = str(root), 256, "paper"
    config.data.central_fraction = 0.3
    return prepare(config, tmp_path / "run")


def test_there_and_back(store, config, tmp_path):
    assert convert(store.root, tmp_path / "h5") == (2, 1)
    assert sorted(p.name for p in (tmp_path / "h5").iterdir()) == ["volume-10.h5", "volume-2.h5"]
    config.data.root = str(tmp_path / "h5")
    again = prepare(config, tmp_path / "again")
    labels, lost = set(), 0
    for name in ("volume-2", "volume-10"):
        slices = store.slices(name)
        assert again.slices(name) == slices
        for s in slices:
            seen, seen_again = paper.scale(store.hu(s)), paper.scale(again.hu(s))
            np.testing.assert_array_equal(seen_again.view(np.uint16), seen.view(np.uint16))
            np.testing.assert_array_equal(again.mask(s), store.mask(s))
            assert again.image_label(s) == store.image_label(s)
            labels.add(store.image_label(s))
            lost += store.image_label(s) == 1 and not store.mask(s).any()
    assert labels == {0, 1} and lost


def test_scans_annotated_in_part_are_left_out(store, tmp_path):
    """The form cannot say that nobody knows: another reader would take the rest for empty."""
    record = store.records["volume-2"]
    store.records["volume-2"] = dataclasses.replace(record, unannotated=(1,))
    manifest = read_json(store.root / "manifest.json")
    manifest["scans"] = [r.to_json() for r in store.records.values()]
    write_json(store.root / "manifest.json", manifest)
    assert convert(store.root, tmp_path / "h5") == (1, 2)
    assert [p.name for p in (tmp_path / "h5").iterdir()] == ["volume-10.h5"]


def test_the_files_have_the_authors_form(store, tmp_path):
    convert(store.root, tmp_path / "h5")
    with h5py.File(tmp_path / "h5" / "volume-10.h5") as file:
        kept = store.records["volume-10"].slices
        assert set(file) == {f"Slice{i}" for i in kept} and kept[0] > 0
        group = file[f"Slice{kept[0]}"]
        assert (group["Slice"].shape, group["Slice"].dtype) == ((256, 256), np.float16)
        assert (group["Segmentation"].shape, group["Segmentation"].dtype) == ((256, 256), np.uint8)
        assert group.attrs["ImageLabel"] in (0, 1)


def test_stores_of_another_arithmetic_are_refused(config, tmp_path):
    config.data.phantom.scans = 1
    config.data.phantom.unlabelled = 0
    store = prepare(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.resize=fit, data\.size=64; expected .*paper"):
        convert(store.root, tmp_path / "h5")
    assert not (tmp_path / "h5").exists()


def test_other_files_in_the_output_are_no_scans_of_it(store, tmp_path):
    (tmp_path / "h5").mkdir()
    (tmp_path / "h5" / ".303a9f77.volume-1.h5").write_bytes(b"")  # a killed conversion's
    (tmp_path / "h5" / "volume-3.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds \['volume-3\.h5'\].*new folder"):
        convert(store.root, tmp_path / "h5")


def test_a_full_disk_leaves_no_half_file(store, tmp_path, monkeypatch):
    mask = SliceStore.mask

    def full(self, slice_id):
        if slice_id.scan == "volume-10" and slice_id.position == 2:
            raise OSError(28, "No space left on device")
        return mask(self, slice_id)

    monkeypatch.setattr(SliceStore, "mask", full)
    with pytest.raises(UserError, match=r"volume-10\.h5: could not be written.*No space left"):
        convert(store.root, tmp_path / "h5")
    assert [p.name for p in (tmp_path / "h5").iterdir()] == ["volume-2.h5"]
    monkeypatch.undo()
    assert convert(store.root, tmp_path / "h5") == (2, 1)
