"""The folder layouts that people have, and what is wrong with the ones that fail."""

import json
import logging
import os

import pytest

from sammix_jax.data import datasets, paths
from sammix_jax.errors import UserError


@pytest.fixture(autouse=True)
def warnings_alone(caplog):
    """Whatever a program that was run before wants to hear of."""
    caplog.set_level(logging.WARNING, "sammix_jax")


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_lits_pairs_by_number_across_folders(tmp_path):
    touch(tmp_path, "a/volume-10.nii", "a/volume-2.nii", "volume-3.old/volume-3.nii.gz")
    touch(tmp_path, "labels/segmentation-2.nii", "labels/segmentation-10.nii")
    touch(tmp_path, "a/._volume-2.nii")  # left by macOS
    scans = datasets.find_scans(tmp_path, "liver")
    assert [s.name for s in scans] == ["volume-2", "volume-3", "volume-10"]
    assert [s.label and s.label.name for s in scans] == [
        "segmentation-2.nii", None, "segmentation-10.nii",
    ]  # fmt: skip
    assert scans[0].label_values == (1, 2)
    assert datasets.find_scans(tmp_path, "tumour")[0].label_values == (2,)
    touch(tmp_path, "test/test-volume-2.nii")
    tests = datasets.find_scans(tmp_path, "liver")[:1]
    assert [(s.name, s.image.name, s.label) for s in tests] == [
        ("test-volume-2", "test-volume-2.nii", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "organ", "values"),
    [
        ({"0": "background", "1": "liver", "2": "cancer"}, "liver", (1, 2)),
        ({"background": 0, "spleen": 3}, "spleen", (3,)),
        ({"background": 0, "liver": [1, 4], "other": 2}, "liver", (1, 4)),
        ({"background": 0, "liver": 1, "liver_tumor": 2, "Lesions": 3}, "liver", (1, 2, 3)),
    ],
)
def test_decathlon_and_nnunet(tmp_path, labels, organ, values):
    touch(tmp_path, "imagesTr/liver_1_0000.nii.gz", "imagesTr/liver_2_0000.nii.gz")
    touch(tmp_path, "labelsTr/liver_1.nii.gz", "imagesTs/liver_9_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    scans = datasets.find_scans(tmp_path, organ)
    assert [(s.name, bool(s.label)) for s in scans] == [
        ("liver_1", True), ("liver_2", False), ("liver_9", False),
    ]  # fmt: skip
    assert scans[0].label_values == values
    assert set(values) | {0} <= set(scans[0].known_values)
    assert datasets.find_scans(tmp_path, organ.title())[0].label_values == values


@pytest.mark.parametrize(
    ("labels", "organ", "told"),
    [
        ({"liver": 1, "hcc": 2}, "liver", "liver: hcc."),
        ({"pancreas": 1, "cancer": 2}, "pancreas", "pancreas: cancer."),
        ({"liver": 1, "tumour": 2, "cancer": 3}, "liver", ""),
    ],
)
def test_labels_that_do_not_count_are_told(tmp_path, caplog, labels, organ, told):
    """A lesion under another name would be a hole in its organ."""
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0} | labels}))
    (scan,) = datasets.find_scans(tmp_path, organ)
    assert (f"do not count as data.organ={told}" in caplog.text) == bool(told)
    assert (scan.label_values == (1,)) == bool(told)
    assert bool(caplog.text) == bool(told)


def test_what_nobody_annotated_is_no_label(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    labels = {"background": 0, "liver": 1, "ignore": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    (scan,) = datasets.find_scans(tmp_path, "liver")
    assert scan.known_values == (0, 1) and scan.ignore_value == 2
    with pytest.raises(UserError, match=r"names \['liver'\]"):
        datasets.find_scans(tmp_path, "spleen")


def test_lesions_join_the_liver_where_no_other_organ_is_named(tmp_path, caplog):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    labels = {"background": 0, "liver": 1, "tumor": 14}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert datasets.find_scans(tmp_path, "liver")[0].label_values == (1, 14)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels | {"pancreas": 4}}))
    assert datasets.find_scans(tmp_path, "liver")[0].label_values == (1,)
    assert "labels that do not count as data.organ=liver: pancreas, tumor." in caplog.text


def test_cases_may_be_numbered_as_channels_are(tmp_path):
    """AMOS and WORD have amos_0001.nii.gz in imagesTr and in labelsTr."""
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    cases = [f"amos_000{n}.nii.gz" for n in range(4)]
    touch(tmp_path, *(f"imagesTr/{c}" for c in cases), *(f"labelsTr/{c}" for c in cases[:3]))
    scans = datasets.find_scans(tmp_path, "liver")
    assert [s.name for s in scans] == ["amos_0000", "amos_0001", "amos_0002", "amos_0003"]
    assert [bool(s.label) for s in scans] == [True, True, True, False]


def test_linked_folders_are_looked_into_once(tmp_path):
    touch(tmp_path / "disk", "volume-1.nii", "segmentation-1.nii")
    touch(tmp_path / "data", "part2/volume-2.nii", "part2/segmentation-2.nii")
    (tmp_path / "data" / "part1").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "part2" / "loop").symlink_to(tmp_path / "data")
    scans = datasets.find_scans(tmp_path / "data", "liver")
    assert [scan.name for scan in scans] == ["volume-1", "volume-2"]


def test_totalsegmentator(tmp_path):
    touch(tmp_path, "s0001/ct.nii.gz", "s0001/segmentations/liver.nii.gz", "s0002/ct.nii.gz")
    scans = datasets.find_scans(tmp_path, "liver")
    assert [(s.name, bool(s.label)) for s in scans] == [("s0001", True), ("s0002", False)]
    assert scans[0].label_values == (1,)


def test_label_values_can_be_given(tmp_path):
    touch(tmp_path, "volume-1.nii", "segmentation-1.nii")
    assert datasets.find_scans(tmp_path, "liver", (1,))[0].label_values == (1,)
    (scan,) = datasets.find_scans(
        tmp_path, "spleen", (7,), 255
    )  # a name that no layout has to know
    assert scan.label_values == (7,) and scan.known_values == () and scan.ignore_value == 255
    touch(tmp_path / "other", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")  # without dataset.json
    assert datasets.find_scans(tmp_path / "other", "spleen", (7,))[0].label_values == (7,)


def test_label_values_stand_in_for_a_name_of_dataset_json(tmp_path, caplog):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    labels = {"background": 0, "left": 1, "right": 2, "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    (scan,) = datasets.find_scans(tmp_path, "kidney", (1, 2))
    assert scan.label_values == (1, 2) and scan.ignore_value == 3 and not caplog.text


def test_the_decathlons_test_scans_are_scored_by_their_own_folder(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b_0000.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    with pytest.raises(UserError, match="imagesTs: no labelsTs beside it"):
        datasets.find_scans(tmp_path / "imagesTs", "liver")
    touch(tmp_path, "labelsTs/b.nii.gz", "labelsTs/c.nii.gz")
    with pytest.raises(
        UserError, match=r"c\.nii\.gz: a mask without its scan, expected imagesTs/c"
    ):
        datasets.find_scans(tmp_path / "imagesTs", "liver")
    (tmp_path / "labelsTs" / "c.nii.gz").unlink()
    (scan,) = datasets.find_scans(tmp_path / "imagesTs", "liver")
    assert (scan.name, scan.label.parent.name, scan.label_values) == ("b", "labelsTs", (1,))
    named = {scan.name: scan.label for scan in datasets.find_scans(tmp_path, "liver")}
    assert named["a"] and not named["b"]  # a training never reads their masks


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"channel_names": {"0": "CT"}}, False),
        ({"modality": {"0": "CT"}}, False),
        ({"channel_names": {"0": "noNorm"}}, False),
        ({"channel_names": {"0": "MRI"}}, True),
        ({"modality": "MRI"}, True),
        ({}, False),
    ],
)
def test_scans_that_are_no_ct_are_told(tmp_path, caplog, said, told):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    fields = {"labels": {"background": 0, "liver": 1}} | said
    (tmp_path / "dataset.json").write_text(json.dumps(fields))
    datasets.find_scans(tmp_path, "liver")
    assert ("scans of MRI, not CT" in caplog.text) == told


@pytest.mark.parametrize(
    ("names", "organ", "message"),
    [
        ((), "liver", "no scans found"),
        (("notes.txt",), "liver", "notes.txt"),
        (("segmentation-4.nii", "volume-5.nii"), "liver", r"segmentation-4.*volume-4\.nii"),
        (("volume-1.nii", "x/volume-1.nii.gz"), "liver", "both scan 1"),
        (("volume-1.nii",), "pancreas", r"pancreas.*\['liver', 'tumour'\]"),
        (("s1/ct.nii.gz", "s1/segmentations/liver.nii.gz"), "livr", r"livr.*\['liver'\]"),
        (("s1/ct.nii.gz", "s2/segmentations/liver.nii.gz"), "liver", "without their scan"),
        (("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"), "liver", "dataset.json"),
        (("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"), "liver", "a second channel"),
        (("s1/ct.nii.gz", "s1/ct.nii"), "liver", "several files"),
        (("imagesTr/a.nrrd", "dataset.json"), "liver", r"a\.nrrd: expected NIfTI .*SimpleITK"),
        ((os.fsdecode(b"volume-1.nii"), os.fsdecode(b"M\xfcller/ct.nii")), "liver", "no UTF-8"),
    ],
)
def test_refusals_name_file_and_fix(tmp_path, names, organ, message):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        datasets.find_scans(tmp_path, organ)


def test_decathlon_refusals(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    with pytest.raises(UserError, match=r"b\.nii\.gz: a mask without its scan"):
        datasets.find_scans(tmp_path, "liver")
    with pytest.raises(UserError, match=r"spleen.*\['liver'\]"):
        datasets.find_scans(tmp_path, "spleen")
    for broken, message in {
        "{": "cannot be read as JSON",
        "{}": "'labels' cannot be read",
        '{"labels": ["liver"]}': "'labels' cannot be read",
        '{"labels": {"liver": "x"}}': "'labels' cannot be read",
    }.items():
        (tmp_path / "dataset.json").write_text(broken)
        with pytest.raises(UserError, match=message):
            datasets.find_scans(tmp_path, "liver")


@pytest.mark.parametrize(
    ("shut", "files"),
    [
        ("", ("volume-1.nii",)),
        ("imagesTr", ("imagesTr/a.nii",)),
        ("labelsTr", ("imagesTr/a.nii", "labelsTr/a.nii")),
        ("s1/segmentations", ("s1/ct.nii", "s1/segmentations/liver.nii")),
    ],
)
def test_scans_and_masks_do_not_vanish_where_nobody_may_look(tmp_path, monkeypatch, shut, files):
    touch(tmp_path, *files)
    monkeypatch.setattr(paths, "_is_open", lambda folder: folder != tmp_path / shut)
    with pytest.raises(UserError, match=rf"{tmp_path / shut}: cannot be looked into"):
        datasets.find_scans(tmp_path, "liver")


def test_a_case_where_nobody_may_look_is_told(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "s1/ct.nii", "s1/segmentations/liver.nii", "lost+found/x")
    monkeypatch.setattr(paths, "_is_open", lambda folder: folder != tmp_path / "lost+found")
    assert len(datasets.find_scans(tmp_path, "liver")) == 1
    assert "lost+found: cannot be looked into, and is left out" in caplog.text


@pytest.mark.parametrize(
    ("scans", "other"),
    [
        (("volume-1.nii", "segmentation-1.nii"), "volume-2.NII.GZ"),
        (("imagesTr/a_0000.nii", "labelsTr/a.nii"), "imagesTr/b_0000.mha"),
        (("s1/ct.nii", "s1/segmentations/liver.nii"), "s1/segmentations/spleen.nrrd"),
    ],
)
def test_files_of_other_formats_are_told(tmp_path, caplog, scans, other):
    touch(tmp_path, *scans, "volume-1_overlay.png", "notes.txt")
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    assert len(datasets.find_scans(tmp_path, "liver")) == 1 and not caplog.text
    touch(tmp_path, other)
    assert len(datasets.find_scans(tmp_path, "liver")) == 1
    assert "1 files are left out, for their names do not end in .nii or .nii.gz" in caplog.text
    assert other in caplog.text


def test_cases_without_a_scan_are_told(tmp_path, caplog):
    touch(tmp_path, "s1/ct.nii.gz", "s1/segmentations/Liver.nii.gz", "s2/CT.nii.gz")
    (scan,) = datasets.find_scans(tmp_path, "liver")
    assert scan.label.name == "Liver.nii.gz"
    assert "1 folders are left out, for they have no ct.nii.gz, such as" in caplog.text
    assert f"{tmp_path / 's2'}." in caplog.text


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        datasets.find_scans(tmp_path / "nowhere", "liver")
