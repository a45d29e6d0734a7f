"""What is handed to nnU-Net as a peer: cases, folds and the layout of its files."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from nnunet_exports import FILE_ORDER, NEGATIVES, K, config_of_k, exported, layout, others, prepared

from benchmarks.nnunet import __main__ as command_line
from benchmarks.nnunet.export import draw_negatives, export, patient_folds
from benchmarks.nnunet.layout import (
    Layout,
    canonical_affine,
    read_cases,
    slice_affine,
    write_nifti,
)
from benchmarks.nnunet.score import read_prediction
from sammix_jax.data import volumes
from sammix_jax.data.files import read_json
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.data.splits import draw_labelled_slices
from sammix_jax.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def lps(path):
    """Voxels (D, H, W) and spacing (D, H, W) of a file, which must lie in canonical order."""
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    return np.asarray(image.dataobj).transpose(2, 1, 0), image.header.get_zooms()[::-1]


def test_names_and_dataset_json(layout):
    assert layout.raw.parts[-2:] == ("nnUNet_raw", "Dataset501_liver")
    cases = [f"case_{i:04d}" for i in range(K + NEGATIVES)]
    assert names(layout.raw) == ["dataset.json", "imagesTr", "imagesTs", "labelsTr"]
    assert names(layout.raw / "imagesTr") == [f"{case}_0000.nii.gz" for case in cases]
    assert names(layout.raw / "labelsTr") == [f"{case}.nii.gz" for case in cases]
    tests = ["test_0000_0000.nii.gz", "test_0001_0000.nii.gz"]
    assert names(layout.raw / "imagesTs") == tests
    assert read_json(layout.raw / "dataset.json") == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": K + NEGATIVES,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }


def test_the_labelled_slices_and_no_others(layout, prepared):
    """HU, masks and spacing of every case, against the scans' own files."""
    store = SliceStore.open(prepared / "store")
    split = read_json(layout.output / "split.json")
    drawn = draw_labelled_slices(store, tuple(split["train"]), K, config_of_k().data.labels_seed)
    training = read_cases(layout.output)[1]["training"]
    where = [(fields["scan"], fields["slice"]) for fields in training.values()]
    assert where[:K] == [(s.scan, store.records[s.scan].slices[s.position]) for s in drawn]
    assert len(set(where)) == K + NEGATIVES
    for case, fields in training.items():
        record = store.records[fields["scan"]]
        assert record.name in split["train"]
        source = nib.load(record.image)
        assert nib.aff2axcodes(source.affine)[2] == "S"
        flip = slice(None, None, -1 if nib.aff2axcodes(source.affine)[1] == "A" else 1)
        hu = np.asarray(source.dataobj)[:, flip, fields["slice"]].T
        truth = np.asarray(nib.load(record.label).dataobj)[:, flip, fields["slice"]].T > 0
        image, spacing = lps(layout.image("imagesTr", case))
        mask, mask_spacing = lps(layout.label(case))
        assert image.shape == mask.shape == (1, *hu.shape)
        assert image.dtype == np.int16 and mask.dtype == np.uint8
        np.testing.assert_array_equal(image[0], hu)
        np.testing.assert_array_equal(mask[0], truth)
        assert truth.any() == fields["shows_organ"] == (case < f"case_{K:04d}")
        np.testing.assert_allclose(spacing[1:], record.spacing[1:], rtol=1e-6)
        assert spacing[0] == 999 and mask_spacing == spacing


def test_slices_keep_their_place(layout, prepared):
    """The corner voxel lies where the scan's affine has it, and what crosses it is flat."""
    store = SliceStore.open(prepared / "store")
    for case, fields in read_cases(layout.output)[1]["training"].items():
        source = nib.load(store.records[fields["scan"]].image)
        voxel = np.array([0, 0, fields["slice"], 1.0])
        if nib.aff2axcodes(source.affine)[1] == "A":
            voxel[1] = source.shape[1] - 1
        affine = nib.load(layout.image("imagesTr", case)).affine
        np.testing.assert_allclose(affine[:, 3], source.affine @ voxel, atol=1e-4)


@pytest.mark.parametrize("order", ["RAS", "IPR", "SLA"])
def test_affines_of_sheared_scans(write_scan, ct, order):
    """A gantry tilt stays; voxels are followed to where the file's own affine puts them."""
    affine = np.array([[-2.0, 0, 0, 9], [0, -3, 1.5, 8], [0, 0, 5, -7], [0, 0, 0, 1]])
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(order)
    )
    image = nib.Nifti1Image(ct, affine).as_reoriented(turn)
    volume = volumes.read_volume(write_scan("scan.nii", np.asarray(image.dataobj), image.affine))
    np.testing.assert_allclose(canonical_affine(volume), affine, atol=1e-5)
    flat = slice_affine(volume, 4)
    np.testing.assert_allclose(flat[:3, 3], (affine @ [0, 0, 4, 1])[:3], atol=1e-5)
    np.testing.assert_allclose(nib.affines.voxel_sizes(flat), (2, 3, 999), rtol=1e-6)
    np.testing.assert_allclose(np.cross(flat[:3, 2], affine[:3, 2]), 0, atol=1e-3)


@pytest.mark.parametrize("orientation", ["", "RAS", "LAS", "PIR"])
def test_a_prediction_for_a_scan_without_affine_lies_as_it_was_exported(
    write_scan, ct, tmp_path, orientation
):
    scan = volumes.read_volume(write_scan("scan.nii", ct, np.eye(4)), orientation)
    layout = Layout(tmp_path / "export", "Dataset501_liver")
    affine = canonical_affine(scan)
    write_nifti(layout.image("imagesTs", "test_0000"), scan.hu, affine)
    truth = scan.hu > 60
    write_nifti(layout.prediction("test_0000"), truth.astype(np.uint8), affine)
    np.testing.assert_array_equal(read_prediction(layout, "test_0000", scan), truth)


def test_test_scans_are_whole_and_in_canonical_order(layout, others):
    first, second = read_cases(layout.output)[1]["evaluations"]
    assert [scan["name"] for scan in first["cases"].values()] == (
        read_json(layout.output / "split.json")["test"]
    )
    assert second["root"] == str(others.resolve()) and list(second["cases"]) == ["test_0001"]
    (path,) = others.glob("volume-*")
    source = nib.load(path)
    assert "".join(nib.aff2axcodes(source.affine)) == FILE_ORDER
    image, spacing = lps(layout.image("imagesTs", "test_0001"))
    # I, P, R → L, P, S: the first and the last axis turned round.
    hu = np.asarray(source.dataobj)[::-1, :, ::-1]  # (D, H, W)
    np.testing.assert_array_equal(image, hu)
    np.testing.assert_allclose(spacing, source.header.get_zooms(), rtol=1e-6)


def test_folds_hold_patients_apart(layout):
    training = read_cases(layout.output)[1]["training"]
    folds = read_json(layout.splits)
    assert layout.splits.parts[-3:-1] == ("nnUNet_preprocessed", "Dataset501_liver")
    patients = {fields["scan"] for fields in training.values() if fields["shows_organ"]}
    assert len(folds) == len(patients) > 1
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(training)
        sides = [{training[case]["scan"] for case in fold[side]} for side in ("train", "val")]
        assert not sides[0] & sides[1]
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(training)


def test_every_fold_has_a_labelled_slice():
    counts = {"a": 9, "b": 1, "c": 4, "d": 2, "e": 1, "f": 1, "g": 0}
    labels = [SliceId(scan, i) for scan, count in counts.items() for i in range(count)]
    counts |= dict.fromkeys("hi", 0)
    empty = [SliceId(scan, 50) for scan in "aghi"]
    training = {f"case_{i:04d}": s for i, s in enumerate([*labels, *empty])}
    folds = patient_folds(training, labels)
    held = [sum(training[case] in labels for case in fold["val"]) for fold in folds]
    assert held == [9, 4, 2, 2, 1]
    # Patients of whom nothing is labelled do not pile up in one of them.
    assert [len(fold["val"]) for fold in folds] == [10, 4, 3, 3, 2]
    assert patient_folds(dict(zip("xy", labels[:2], strict=True)), labels[:2]) == []


def test_scans_of_one_patient_are_in_one_fold():
    labels = [SliceId(f"p{p}_{phase}", 0) for p in (1, 2) for phase in ("art", "portal")]
    training = {s.scan: s for s in labels}
    folds = patient_folds(training, labels, r"(p\d+)_")
    assert [fold["val"] for fold in folds] == [["p1_art", "p1_portal"], ["p2_art", "p2_portal"]]


def test_what_cannot_be_scored_is_not_exported(prepared, others, tmp_path):
    """A mask that is annotated in part."""
    shutil.copytree(others, tmp_path / "scans")
    (path,) = (tmp_path / "scans").glob("segmentation-*")
    label = nib.load(path)
    voxels = np.asarray(label.dataobj).copy()
    voxels[0] = 9
    nib.save(nib.Nifti1Image(voxels, label.affine, label.header), path)
    config = config_of_k()
    config.evaluate.ignore_value = 9
    with pytest.raises(UserError, match=r"segmentation-0\.nii.*: annotated in part"):
        export(config, prepared, tmp_path / "out", roots=[str(tmp_path / "scans")])


def test_a_config_file_may_have_variants():
    config = command_line._config("configs/baselines/nnunet.py:lits")
    assert (config.model.system, config.data.phantom.scans) == ("nnunet", 0)
    assert command_line._config("configs/lits.py").data.resize == "paper"
    for named in ("configs/nowhere.py:lits", "sammix_jax/errors.py"):
        with pytest.raises(UserError, match=rf"--config={named}: cannot be read as a config"):
            command_line._config(named)


def test_negatives_are_slices_without_the_organ(prepared):
    store = SliceStore.open(prepared / "store")
    known = [s for s in store.slices("volume-1") if store.image_label(s) == 0]
    draw = lambda count, seed=3: draw_negatives(store, ["volume-1"], count, seed, most=5)  # noqa: E731
    drawn = draw(4)
    assert len(set(drawn)) == 4 and set(drawn) <= set(known)
    assert drawn == draw(4)
    assert drawn != draw(4, seed=4)
    assert draw(0) == []
    assert len(draw(None)) == min(5, len(known))
    with pytest.raises(UserError, match=rf"negatives=999: .* have {len(known)} slices without"):
        draw(999)


def test_a_trained_workdir_lends_its_own_slices(workdir, tmp_path):
    layout = export(command_line.load_config(workdir), workdir, tmp_path / "out", negatives=0)
    for name in ("split.json", "labels.json"):
        assert (layout.output / name).read_text() == (workdir / name).read_text()
    training = read_cases(layout.output)[1]["training"].values()
    kept = [{"scan": fields["scan"], "slice": fields["slice"]} for fields in training]
    assert kept == read_json(workdir / "labels.json")


def test_an_export_needs_a_folder_of_its_own(prepared, layout):
    with pytest.raises(UserError, match="is not empty; delete it or give another --output"):
        export(config_of_k(), prepared, layout.output)
    with pytest.raises(UserError, match="dataset_id=1000: expected 1 to 999"):
        export(config_of_k(), prepared, layout.output, dataset_id=1000)
