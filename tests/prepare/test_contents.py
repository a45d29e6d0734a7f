"""What a slice store holds is what the scans hold."""

import json
import math
import os

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from sammix_jax.data import paper, phantom
from sammix_jax.data.geometry import RESIZES, kept_slices
from sammix_jax.data.volumes import read_volume
from sammix_jax.errors import UserError
from sammix_jax.inference import predict_volume
from sammix_jax.prepare import prepare
from sammix_jax.presets import apply_preset
from sammix_jax.systems.system import SlicePredictions

AFFINE = np.diag([3.0, 3.0, 5.0, 1.0])  # RAS


@pytest.fixture
def config(config, lits):
    config.data.root = str(lits)
    return config


def test_store_holds_what_the_scans_hold(config, tmp_path):
    store = prepare(config, tmp_path / "run")
    assert list(store.records) == ["volume-0", "volume-1", "volume-2"]
    record = store.records["volume-0"]
    assert record.shape == (6, 30, 40) and record.spacing == (5.0, 3.0, 3.0)
    assert record.axcodes == "RAS" and record.affine == tuple(map(tuple, AFFINE.tolist()))
    assert record.organ_pixels == (0, 0, 150, 150, 0, 0)
    assert [store.image_label(s) == 1 for s in store.slices("volume-0")] == [
        False, False, True, True, False, False,
    ]  # fmt: skip
    assert [r.has_label for r in store.records.values()] == [True, True, False]
    hu, mask = store.hu(store.slices("volume-0")[3]), store.mask(store.slices("volume-0")[3])
    assert hu.shape == mask.shape == (64, 64)
    assert hu.dtype == np.int16 and mask.dtype == np.uint8
    # Canonical rows run to posterior, columns to the left: RAS is mirrored in both.
    rows, columns = np.nonzero(mask)
    assert rows.mean() == pytest.approx(64 / 40 * (40 - 30) / 2 + (29 - 14.5) * 64 / 40, abs=1)
    assert columns.mean() == pytest.approx((39 - 12) * 64 / 40, abs=1)


def test_manifest_lists_scan_slices_and_labels(config, tmp_path):
    prepare(config, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "store" / "manifest.json").read_text())
    scan = manifest["scans"][0]
    assert {"name", "slices", "spacing", "affine", "label", "organ_pixels"} <= set(scan)
    assert manifest["params"]["organ"] == "liver"


def test_a_broken_link_is_named(config, lits, tmp_path):
    (lits / "volume-3.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    with pytest.raises(UserError, match=r"volume-3\.nii\.gz: no such file"):
        prepare(config, tmp_path / "run")


def test_a_link_keeps_its_name(config, lits, tmp_path):
    """What it points to may be called anything, as in a store of blobs."""
    blob = tmp_path / "blobs" / "5f3a"
    blob.parent.mkdir()
    os.rename(lits / "volume-0.nii.gz", blob)
    (lits / "volume-0.nii.gz").symlink_to(blob)
    store = prepare(config, tmp_path / "run")
    assert store.records["volume-0"].image == str(lits / "volume-0.nii.gz")


@pytest.mark.parametrize(
    ("depth", "fraction", "slice_range", "kept"),
    [
        (100, 0.3, (0.0, 1.0), range(35, 64)),  # the authors'
        (7, 1.0, (0.0, 1.0), range(7)),
        (10, 1.0, (0.25, 0.75), range(2, 8)),  # 2.5 to 7.5: slices 2 and 7 are in it by half
        (100, 1.0, (0.29, 0.55), range(29, 55)),  # as floats 28.999… and 55.00…01
        (3, 1.0, (0.9, 1.0), range(2, 3)),
    ],
)
def test_kept_slices(depth, fraction, slice_range, kept):
    assert kept_slices(depth, fraction, slice_range) == kept


def test_a_part_of_the_height_is_counted_from_the_feet(config, tmp_path):
    config.data.slice_range = (0.5, 1.0)
    store = prepare(config, tmp_path / "run")
    record = store.records["volume-0"]
    assert record.slices == (3, 4, 5) and record.organ_pixels == (150, 0, 0)
    config.data.slice_range = (0.0, 0.5)
    with pytest.raises(UserError, match=r"data\.slice_range=\[0\.5, 1\.0\] \(now \[0\.0, 0\.5\]\)"):
        prepare(config, tmp_path / "run")


def authors_slices(image_file, label_file):
    """The authors' float16 slices and masks of one scan, written out from their description."""
    canonical = [
        np.asarray(nib.as_closest_canonical(nib.load(f)).dataobj)[::-1, ::-1].transpose(2, 1, 0)
        for f in (image_file, label_file)
    ]
    middle = (len(canonical[0]) - 1) / 2
    central = slice(math.ceil(middle - 0.3 * middle), math.floor(middle + 0.3 * middle))
    images, masks = [], []
    for hu, labels in zip(*(volume[central] for volume in canonical), strict=True):
        clipped = np.clip(hu, -160, 240).astype(np.int16)
        image = Image.fromarray(clipped).resize((256, 256), resample=Image.BILINEAR)
        mask = Image.fromarray(labels.astype(np.uint8)).resize((256, 256), resample=Image.NEAREST)
        images.append((np.array(image).astype(np.float16) + 3055) / 8866)
        masks.append(np.array(mask) > 0)
    return np.stack(images), np.stack(masks)


def test_a_store_of_the_paper_preset_is_the_authors_to_the_bit(config, tmp_path):
    apply_preset(config, "paper")
    config.data.root = str(tmp_path / "phantom")
    phantom.write_lits(tmp_path / "phantom", 2, seed=3)
    store = prepare(config, tmp_path / "run")
    for name in store.records:
        files = (
            tmp_path / "phantom" / f"{n}.nii.gz"
            for n in (name, name.replace("volume", "segmentation"))
        )
        images, masks = authors_slices(*files)
        slices = store.slices(name)
        assert len(slices) == len(images) > 0 and masks.any()
        stored = paper.scale(np.stack([store.hu(s) for s in slices]))
        np.testing.assert_array_equal(stored.view(np.uint16), images.view(np.uint16))
        np.testing.assert_array_equal(np.stack([store.mask(s) for s in slices]) > 0, masks)


@pytest.mark.parametrize("resize", RESIZES)
def test_prediction_sees_what_the_store_holds(config, lits, tmp_path, resize):
    config.data.resize = resize
    store = prepare(config, tmp_path / "run")

    def predict(variables, hu, truth):
        """No model: right of the middle is organ."""
        logits = np.broadcast_to(np.arange(64) - 31.5, hu.shape).astype(np.float32)
        nothing = np.zeros(len(hu))
        return SlicePredictions({"cam": logits}, nothing, logits, nothing, nothing)

    volume = read_volume(lits / "volume-0.nii.gz")
    variables = {"of": {"no": jnp.zeros(1)}}  # which say on what device to predict
    predicted = predict_volume(predict, variables, volume, None, config)
    stored = np.stack([store.hu(s) for s in store.slices("volume-0")])
    np.testing.assert_array_equal(predicted.hu, stored)
    mask = predicted.masks["cam"]
    assert mask.shape == volume.hu.shape
    assert mask[:, :, 20:].all() and not mask[:, :, :20].any()


def test_an_organ_that_vanishes_in_the_resize_is_still_told(config, lits, tmp_path):
    """One pixel of 512 × 512 between those that nearest neighbour takes."""
    hu = np.random.default_rng(0).normal(0, 50, (512, 512, 5)).astype(np.int16)
    mask = np.zeros(hu.shape, np.uint8)
    mask[200, 300, 2] = 1
    nib.save(nib.Nifti1Image(hu, AFFINE), lits / "volume-0.nii.gz")
    nib.save(nib.Nifti1Image(mask, AFFINE), lits / "segmentation-0.nii.gz")
    config.data.size, config.data.resize = 128, "paper"
    store = prepare(config, tmp_path / "run")
    slices = store.slices("volume-0")
    assert not any(store.mask(s).any() for s in slices)
    assert [store.image_label(s) for s in slices] == [0, 0, 1, 0, 0]


def test_files_pair_by_number(config, lits, tmp_path):
    """Number 10 comes before 2 in a directory that is sorted by name."""
    for n, column in ((2, 5), (10, 30)):
        mask = np.zeros((40, 30, 6), np.uint8)
        mask[column, 10:20, 1] = 1
        volume = np.full(mask.shape, -1000, np.int16)
        volume[column] = 100
        nib.save(nib.Nifti1Image(mask, AFFINE), lits / f"segmentation-{n}.nii.gz")
        nib.save(nib.Nifti1Image(volume, AFFINE), lits / f"volume-{n}.nii.gz")
    store = prepare(config, tmp_path / "run")
    for name in ("volume-2", "volume-10"):
        shown = store.slices(name)[1]
        assert store.mask(shown).any()
        assert (store.hu(shown)[store.mask(shown) > 0] > -500).all()


def test_a_store_that_is_a_file(config, tmp_path):
    (tmp_path / "file").touch()
    config.data.store = str(tmp_path / "file")
    with pytest.raises(UserError, match=r"data\.store=.*file: a file, expected a folder"):
        prepare(config, tmp_path / "run")


def test_no_root_and_no_phantom(config, tmp_path):
    config.data.root = ""
    config.data.phantom.scans = 0
    with pytest.raises(UserError, match=r"data\.root is empty"):
        prepare(config, tmp_path / "run")


def test_masks_with_gaps_are_told(config, lits, tmp_path, caplog):
    """As where a few slices were annotated, and the others left at zero."""
    path = lits / "segmentation-0.nii.gz"
    mask = nib.load(path)
    values = np.asarray(mask.dataobj).copy()
    values[..., 0], values[..., 3], values[..., 5] = values[..., 2], 0, values[..., 2]
    nib.save(nib.Nifti1Image(values, mask.affine), path)
    prepare(config, tmp_path / "run")
    assert "slices between its first and its last: 1 scans (volume-0)" in caplog.text


def test_masks_without_the_organ_are_told(config, lits, tmp_path, caplog):
    empty = np.zeros((40, 30, 6), np.uint8)
    nib.save(nib.Nifti1Image(empty, AFFINE), lits / "segmentation-1.nii.gz")
    prepare(config, tmp_path / "run")
    assert "masks without any liver: 1 scans (volume-1)" in caplog.text


@pytest.mark.parametrize("orientation", ["", "LAS"])
def test_scans_that_seem_mirrored_are_told(config, lits, tmp_path, caplog, orientation):
    """As some of LiTS's may be, which lost their affines: here one scan has its first axis turned,
    and the identity for an affine."""
    for path in lits.iterdir():
        path.unlink()
    x, y = np.meshgrid(np.arange(40), np.arange(30), indexing="ij")
    body = (x - 20) ** 2 + (y - 15) ** 2 < 14**2
    hu = np.where(body, 40, -1000).astype(np.int16)[..., None].repeat(6, axis=2)
    mask = np.zeros(hu.shape, np.uint8)
    mask[24:30, 10:20, 2:4] = 1  # at the patient's right, as axis 0 runs there
    for n, affine in enumerate((AFFINE, AFFINE, np.eye(4))):
        turned = slice(None, None, -1 if n == 2 else 1)
        nib.save(nib.Nifti1Image(hu[turned], affine), lits / f"volume-{n}.nii.gz")
        nib.save(nib.Nifti1Image(mask[turned], affine), lits / f"segmentation-{n}.nii.gz")
    config.data.default_orientation = orientation
    store = prepare(config, tmp_path / "run")
    sides = [store.records[f"volume-{n}"].organ_side for n in range(3)]
    assert sides[0] == sides[1] < 0
    told = "1 scans that know no orientation (volume-2) than in those"
    assert (told in caplog.text) == (orientation == "")
    assert sides[2] == pytest.approx(-sides[0] if orientation == "" else sides[0], abs=0.03)
    assert ("--config.data.default_orientation=LAS" in caplog.text) == (orientation == "")
