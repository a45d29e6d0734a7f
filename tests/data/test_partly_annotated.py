"""Scans of which only some slices are annotated: nnU-Net's "ignore" label, from file to batch."""

import json
import pathlib

import nibabel as nib
import numpy as np
import pytest

from sammix_jax.config import default_config
from sammix_jax.data.slices import SliceId
from sammix_jax.data.split_files import load_or_draw
from sammix_jax.data.splits import split_scans
from sammix_jax.errors import UserError
from sammix_jax.evaluation.scans import read_labelled, scans_to_score
from sammix_jax.prepare import prepare
from sammix_jax.train import slices_without_masks

LIVER, IGNORE = 1, 255
# Of each slice: annotated throughout with and without the organ, a scribble on the organ, nothing.
MASKED, EMPTY, SCRIBBLED, UNKNOWN = range(4)
PARTLY = (EMPTY, MASKED, SCRIBBLED, UNKNOWN, UNKNOWN)
WHOLE = (EMPTY, MASKED, MASKED, MASKED, EMPTY)


def slice_mask(kind: int) -> np.ndarray:
    mask = np.full((16, 16), IGNORE if kind in (SCRIBBLED, UNKNOWN) else 0, np.uint8)
    if kind in (MASKED, SCRIBBLED):
        mask[4:12, 4:12] = LIVER
    return mask


@pytest.fixture
def config(tmp_path):
    """nnU-Net's folder of two scans annotated in part and three annotated throughout."""
    root = tmp_path / "data"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    labels = {"background": 0, "liver": LIVER, "ignore": IGNORE}
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    affine = np.diag([-2.0, -2.0, 5.0, 1.0])  # the files lie as the store has them
    rng = np.random.default_rng(0)
    for name, kinds in {"a": PARTLY, "b": PARTLY, "c": WHOLE, "d": WHOLE, "e": WHOLE}.items():
        hu = rng.normal(0, 200, (16, 16, len(kinds))).astype(np.int16)
        mask = np.stack([slice_mask(kind) for kind in kinds], axis=2)
        nib.save(nib.Nifti1Image(hu, affine), root / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(mask, affine), root / "labelsTr" / f"{name}.nii.gz")
    config = default_config()
    config.data.root = str(root)
    config.data.size = 16
    config.data.split = (1, 1, 1)
    config.data.labelled_slices = 0
    return config


def test_any_layout_may_have_a_value_to_ignore(config, tmp_path):
    """Here LiTS's: the same files under its names."""
    lits, root = tmp_path / "lits", pathlib.Path(config.data.root)
    lits.mkdir()
    for number, name in enumerate("abcde"):
        image, label = (
            root / "imagesTr" / f"{name}_0000.nii.gz",
            root / "labelsTr" / f"{name}.nii.gz",
        )
        image.rename(lits / f"volume-{number}.nii.gz")
        label.rename(lits / f"segmentation-{number}.nii.gz")
    config.data.root = str(lits)
    with pytest.raises(UserError, match=r"holds the values \[255\].*annotated with ignore_v"):
        prepare(config, tmp_path)
    config.data.ignore_value = 2  # which LiTS has for tumours
    with pytest.raises(UserError, match=r"data\.ignore_value=2: is among .*\(1, 2\); name the oth"):
        prepare(config, tmp_path)
    config.data.ignore_value = IGNORE
    store = prepare(config, tmp_path)
    labels = [store.image_label(s) for s in store.slices("volume-0")]
    assert labels == [0, 1, 1, -1, -1]


def test_only_whole_slices_lend_masks_and_scribbles_say_that_the_organ_is_there(config, tmp_path):
    store = prepare(config, tmp_path)
    slices = store.slices("a")
    assert [store.image_label(s) for s in slices] == [0, 1, 1, -1, -1]
    assert [store.has_mask(s) for s in slices] == [True, True, False, False, False]

    split, labelled = load_or_draw(config, store, tmp_path)
    assert {"a", "b"} < set(split.train) and len(split.train) == 3
    assert len(split.val) == len(split.test) == 1
    assert {s for s in labelled if s.scan in "ab"} == {SliceId("a", 1), SliceId("b", 1)}

    others = [s for s in slices_without_masks(config, store, split, labelled) if s.scan == "a"]
    assert [s.position for s in others] == [0, 2]
    config.consistency.weight = 1.0
    others = [s for s in slices_without_masks(config, store, split, labelled) if s.scan == "a"]
    assert [s.position for s in others] == [0, 2, 3, 4]


def test_patients_annotated_in_part_train():
    names = ["p1_a", "p1_b", "p2_a", "p3_a", "p4_a"]
    for seed in range(10):
        split = split_scans(names, (1, 1, 1), seed, r"^p\d", partly={"p1_b"})
        assert {"p1_a", "p1_b"} <= set(split.train)
        assert len(split.val) == len(split.test) == 1
    # They fill the training part where the others are but two.
    assert set(split_scans(names[:4], (1, 1, 1), 0, r"^p\d", {"p1_a"}).train) == {"p1_a", "p1_b"}
    with pytest.raises(UserError, match=r"1 labelled .* annotated throughout cannot fill 2 parts"):
        split_scans(names[:3], (1, 1, 1), 0, r"^p\d", {"p1_a"})


def test_what_is_not_annotated_is_not_scored(config, tmp_path):
    store = prepare(config, tmp_path)
    given = {"train": ["c", "d"], "val": ["e"], "test": ["a"]}
    config.data.split_file = str(tmp_path / "given.json")
    (tmp_path / "given.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match=r"given\.json: \['a'\] validate or test"):
        load_or_draw(config, store, tmp_path)

    given = {"train": ["a", "c"], "val": ["d"], "test": ["e"]}
    (tmp_path / "split.json").write_text(json.dumps(given))
    config.evaluate.part = "train"
    scans, faults = scans_to_score(config, tmp_path)
    assert [scan.name for scan in scans] == ["c"]
    assert len(faults) == 1 and "a.nii.gz: annotated in part" in faults[0]
    given["train"] = ["a", "b"]
    (tmp_path / "split.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match="every scan is annotated in part"):
        scans_to_score(config, tmp_path)


def test_nor_where_what_is_not_annotated_was_left_out_of_training(config, tmp_path):
    """A slab may be annotated, and `data.slice_range` keep it; the whole scan is what is scored."""
    labels = tmp_path / "data" / "labelsTr" / "c.nii.gz"
    slab = (UNKNOWN, MASKED, MASKED, EMPTY, UNKNOWN)
    mask = np.stack([slice_mask(kind) for kind in slab], axis=2)
    nib.save(nib.Nifti1Image(mask, nib.load(labels).affine), labels)
    config.data.slice_range = (0.2, 0.8)
    assert prepare(config, tmp_path).records["c"].unannotated == ()
    (tmp_path / "split.json").write_text(json.dumps({"train": ["d"], "val": ["e"], "test": ["c"]}))
    (scan,), faults = scans_to_score(config, tmp_path)
    config.evaluate.root, config.evaluate.label_values = config.data.root, (LIVER,)
    other = next(scan for scan in scans_to_score(config, tmp_path)[0] if scan.name == "c")
    for found in (scan, other):
        with pytest.raises(UserError, match=r"c\.nii\.gz: annotated in part \(3 of 5 slices"):
            read_labelled(found, config)
    assert not faults


def test_a_label_file_names_whole_slices_alone(config, tmp_path):
    store = prepare(config, tmp_path)
    config.data.labels_file = str(tmp_path / "given.json")
    (tmp_path / "given.json").write_text(json.dumps([{"scan": "a", "slice": 1}]))
    assert load_or_draw(config, store, tmp_path)[1] == [SliceId("a", 1)]
    (tmp_path / "given.json").write_text(json.dumps([{"scan": "a", "slice": 2}]))
    with pytest.raises(UserError, match=r"slice 2 of a is not annotated throughout"):
        load_or_draw(config, store, tmp_path)
