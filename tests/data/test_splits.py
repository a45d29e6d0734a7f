"""Splits by patient and label draws: by seed, kept, and given back."""

import dataclasses
import json

import numpy as np
import pytest

from sammix_jax.data.geometry import slice_geometry
from sammix_jax.data.slices import ScanRecord, SliceStore
from sammix_jax.data.split_files import (
    changed_scans,
    keep,
    load_or_draw,
    training_scans,
)
from sammix_jax.data.splits import PARTS, draw_labelled_slices, split_scans, whose
from sammix_jax.errors import UserError
from sammix_jax.train import slices_without_masks

NAMES = [f"volume-{n}" for n in range(131)]


def fake_store(tmp_path, scans=8, slices=10, unlabelled=1):
    """Records and masks: the organ on the upper half of each scan's slices."""
    records = [
        ScanRecord(
            name=f"volume-{n}",
            image="",
            label="" if n >= scans - unlabelled else "mask",
            label_values=(1,),
            fingerprint="",
            image_digest=f"image {n}",
            label_digest="" if n >= scans - unlabelled else f"mask {n}",
            shape=(slices, 8, 8),
            spacing=(1.0, 1.0, 1.0),
            affine=tuple(map(tuple, np.eye(4).tolist())),
            axcodes="RAS",
            geometry=slice_geometry((8, 8), (1, 1), 8, "fit"),
            slices=tuple(range(5, 5 + slices)),
            organ_pixels=tuple(int(z >= slices // 2) for z in range(slices)),
        )
        for n in range(scans)
    ]
    hu = np.random.default_rng(0).integers(-200, 200, (scans, slices, 8, 8), np.int16)
    for record, scan_hu in zip(records, hu, strict=True):
        folder = tmp_path / "store" / "scans" / record.name
        folder.mkdir(parents=True, exist_ok=True)
        masks = np.zeros((slices, 8, 8), np.uint8)
        masks[slices // 2 :, 2:5, 2:5] = 1
        np.save(folder / "mask.npy", masks)
        np.save(folder / "hu.npy", scan_hu)
    return SliceStore(tmp_path / "store", {"organ": "liver"}, records)


def test_a_mask_that_resizing_emptied_is_not_drawn(tmp_path):
    store = fake_store(tmp_path)
    path = tmp_path / "store" / "scans" / "volume-0" / "mask.npy"
    masks = np.load(path)
    masks[7] = 0
    np.save(path, masks)
    drawn = draw_labelled_slices(store, ("volume-0",), 0, 0)
    assert [s.position for s in drawn] == [5, 6, 8, 9]


def test_lits_counts():
    split = split_scans(NAMES, (91, 13, 27), seed=0)
    assert (len(split.train), len(split.val), len(split.test)) == (91, 13, 27)
    assert sorted(split.train + split.val + split.test) == sorted(NAMES)


def test_seed_decides():
    assert split_scans(NAMES, (91, 13, 27), 1) == split_scans(NAMES, (91, 13, 27), 1)
    assert split_scans(NAMES, (91, 13, 27), 1) != split_scans(NAMES, (91, 13, 27), 2)


def test_shares_and_empty_parts():
    split = split_scans(NAMES[:5], (91, 13, 27), 0)
    assert (len(split.train), len(split.val), len(split.test)) == (3, 1, 1)
    assert split_scans(NAMES[:1], (1, 0, 0), 0).train == ("volume-0",)


def test_a_patients_scans_stay_together(tmp_path, config):
    names = [f"p{n:02d}_{phase}" for n in range(12) for phase in ("arterial", "portal")]
    for pattern in ("^[^_]+", r"p(\d+)_"):
        split = split_scans(names, (8, 2, 2), 0, pattern)
        parts = [{name[:3] for name in split.part(part)} for part in PARTS]
        assert [len(part) for part in parts] == [8, 2, 2] and not set.intersection(*parts)
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert len(split.train) == 16
    two_sources = [f"{source}{n}_{i}" for source in ("lits", "msd") for n in range(6) for i in "ab"]
    split = split_scans(two_sources, (8, 2, 2), 0, r"^(lits\d+)|^(msd\d+)")
    assert [len(split.part(part)) for part in PARTS] == [16, 4, 4]
    with pytest.raises(UserError, match=r"data\.patient=q: finds nothing in .* p00_arterial"):
        split_scans(names, (8, 2, 2), 0, "q")
    with pytest.raises(UserError, match=r"finds nothing in the scan's name p00_arterial"):
        split_scans(names, (8, 2, 2), 0, "p|(q)")
    with pytest.raises(UserError, match="1 labelled scans of different patients"):
        split_scans(names[:2], (8, 2, 2), 0, "^[^_]+")

    # And a file that tears them apart is refused.
    store = fake_store(tmp_path)
    split = {"train": ["volume-0", "volume-1"], "val": ["volume-2"], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    config.data.split_file = str(tmp_path / "split.json")
    config.data.labelled_slices, config.data.patient = 1, "volume"
    with pytest.raises(UserError, match="scans of volume stand in train and in val"):
        load_or_draw(config, store, tmp_path / "run")


def test_in_another_data_set_a_pattern_may_find_nothing():
    assert whose("p07_portal", "^p[0-9]+") == "p07" and whose("case", "^p[0-9]+") == "case"
    assert whose("case", "([0-9]*)") == "case"  # which matches nothing at all


def test_a_ratio_of_fractions():
    split = split_scans(NAMES[:20], (0.7, 0.15, 0.15), 0)
    assert [len(split.part(part)) for part in PARTS] == [14, 3, 3]


@pytest.mark.parametrize("ratio", [(0, 1, 1), (1, 1), (2, -1, 1)])
def test_bad_ratios(ratio):
    with pytest.raises(UserError, match="three parts"):
        split_scans(NAMES, ratio, 0)


def test_too_few_scans():
    with pytest.raises(UserError, match="2 labelled scans of different patients cannot fill 3"):
        split_scans(NAMES[:2], (91, 13, 27), 0)


def test_labels_are_positive_slices_of_training_patients(tmp_path):
    store = fake_store(tmp_path)
    drawn = draw_labelled_slices(store, ("volume-0", "volume-3"), 6, seed=0)
    assert len(set(drawn)) == 6
    assert {s.scan for s in drawn} <= {"volume-0", "volume-3"}
    assert all(store.image_label(s) == 1 for s in drawn)
    assert drawn == draw_labelled_slices(store, ("volume-0", "volume-3"), 6, seed=0)
    assert drawn != draw_labelled_slices(store, ("volume-0", "volume-3"), 6, seed=1)
    assert len(draw_labelled_slices(store, ("volume-0",), 0, seed=0)) == 5


def test_too_many_labels_asked_for(tmp_path):
    with pytest.raises(UserError, match="on 5 slices"):
        draw_labelled_slices(fake_store(tmp_path), ("volume-0",), 50, 0)


def test_masks_that_never_show_the_organ(tmp_path):
    """There is nothing to take all of."""
    for count in (0, 3):
        with pytest.raises(UserError, match=r"no mask of the 0 training scans shows data\.organ="):
            draw_labelled_slices(fake_store(tmp_path), (), count, 0)


def test_kept_files_are_read_back(tmp_path, config):
    store = fake_store(tmp_path)
    config.data.labelled_slices = 4
    split, labels = load_or_draw(config, store, tmp_path)
    assert not list(tmp_path.glob("*.json"))  # nothing is pinned before the run is sound
    keep(split, labels, store, tmp_path)
    assert "volume-7" not in split.train + split.val + split.test  # unlabelled
    config.data.seed = 99  # the files, not the seed, hold for a workdir once begun
    assert load_or_draw(config, store, tmp_path) == (split, labels)

    other = tmp_path / "other"
    other.mkdir()
    config.data.split_file = str(tmp_path / "split.json")
    config.data.labels_file = str(tmp_path / "labels.json")
    assert load_or_draw(config, store, other) == (split, labels)
    written = json.loads((tmp_path / "labels.json").read_text())[0]
    assert written["slice"] == labels[0].position + 5  # the scan's own slice index


def test_a_workdir_knows_its_scans(tmp_path, config):
    store = fake_store(tmp_path)
    config.data.labelled_slices = 4
    keep(*load_or_draw(config, store, tmp_path), store, tmp_path)
    record = store.records["volume-2"]
    store.records["volume-2"] = dataclasses.replace(record, label_digest="corrected")
    with pytest.raises(UserError, match="begun on other scans: volume-2"):
        load_or_draw(config, store, tmp_path)


def test_a_workdir_knows_its_images(tmp_path, config):
    """Another export of the same patient: the mask and the grid are what they were."""
    store = fake_store(tmp_path)
    config.data.labelled_slices = 4
    keep(*load_or_draw(config, store, tmp_path), store, tmp_path)
    assert changed_scans(store, tmp_path) == []
    record = store.records["volume-2"]
    store.records["volume-2"] = dataclasses.replace(record, image_digest="of another export")
    assert changed_scans(store, tmp_path) == ["volume-2"]
    assert changed_scans(store, tmp_path, ["volume-1", "volume-3"]) == []
    with pytest.raises(UserError, match="begun on other scans: volume-2"):
        load_or_draw(config, store, tmp_path)


def test_one_image_in_two_parts_is_refused(tmp_path, config):
    store = fake_store(tmp_path)
    config.data.labelled_slices = 4
    split, _ = load_or_draw(config, store, tmp_path)
    (trains, other), test = split.train[:2], split.test[0]
    digest = store.records[trains].image_digest

    def copied(name):
        return dataclasses.replace(store.records[name], image_digest=digest, image=f"{name}.nii")

    store.records[other] = copied(other)
    assert load_or_draw(config, store, tmp_path)[0] == split  # of one part they may be
    store.records[test] = copied(test)
    with pytest.raises(UserError, match=rf"^{test}\.nii: the same image .* train where .* test"):
        load_or_draw(config, store, tmp_path)


def test_what_a_teacher_teaches_on_stays_the_same(tmp_path, config):
    store = fake_store(tmp_path, unlabelled=2)
    config.data.labelled_slices, config.consistency.weight = 4, 0.1
    kept = load_or_draw(config, store, tmp_path)
    keep(*kept, store, tmp_path)
    begun = (tmp_path / "images.json").read_text()
    del store.records["volume-7"]
    with pytest.raises(UserError, match="begun on other scans: volume-7 changed, vanished or"):
        load_or_draw(config, store, tmp_path)
    config.consistency.weight = 0.0  # nobody learns from them
    assert load_or_draw(config, store, tmp_path) == kept
    keep(*kept, store, tmp_path)
    assert (tmp_path / "images.json").read_text() == begun  # what it was begun on


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_every_scan_that_trains_is_known_by_its_image(tmp_path, config, weight):
    """And by its mask, if it has one; the same scans as training takes slices from."""
    store = fake_store(tmp_path, unlabelled=2)
    config.data.labelled_slices = 4
    config.consistency.weight = weight
    split, labels = load_or_draw(config, store, tmp_path)
    keep(split, labels, store, tmp_path)
    slices = slices_without_masks(config, store, split, labels)
    names = {s.scan for s in (*slices, *labels)}
    assert names == set(split.train) | ({"volume-6", "volume-7"} if weight else set())

    trained = training_scans(config, tmp_path)
    for name in store.records:
        assert (store.records[name].image_digest in trained.digests) == (name in names)
    digests = json.loads((tmp_path / "scans.json").read_text())
    assert trained.digests >= {digests[name] for name in split.train}
    assert not trained.hdf5


def test_training_on_hdf5_is_known(tmp_path, config):
    store = fake_store(tmp_path)
    config.data.labelled_slices = 4
    for name, record in store.records.items():
        store.records[name] = dataclasses.replace(record, image=f"{name}.h5")
    keep(*load_or_draw(config, store, tmp_path), store, tmp_path)
    assert training_scans(config, tmp_path).hdf5
    (tmp_path / "images.json").unlink()
    with pytest.raises(UserError, match=r"images\.json: .*run the command that trained"):
        training_scans(config, tmp_path)


@pytest.mark.parametrize(
    ("split", "labels", "message"),
    [
        ({"train": ["volume-0"], "val": ["volume-0"], "test": []}, [], "two parts"),
        ({"train": ["volume-99"], "val": [], "test": []}, [], r"no labelled .* as volume-0, "),
        ({"train": ["volume-0"]}, [], "train, val, test"),
        ({"train": ["volume-0"], "val": ["volume-1"], "test": []},
         [{"scan": "volume-1", "slice": 11}], "no training scan"),
        ({"train": ["volume-0"], "val": [], "test": []},
         [{"scan": "volume-0", "slice": 99}], "no slice 99"),
        ({"train": ["volume-0"], "val": [], "test": []}, ["volume-0"], "expected"),
        ({"train": ["volume-0"], "val": [], "test": []}, {"scan": "volume-0"}, "expected a list"),
        ({"train": ["volume-0"], "val": None, "test": []}, [], "val is None, expected a list"),
        ({"train": ["volume-0"], "val": [1], "test": []}, [], r"val is \[1\], expected a list"),
        ({"train": [["volume-0"]], "val": [], "test": []}, [], "train is .* of scans' names"),
        ({"train": ["volume-0"], "val": [], "test": []},
         [{"scan": "volume-0", "slice": 11}] * 2, "slice 11 of volume-0 stands there twice"),
        ({"train": ["volume-0"], "val": [], "test": []},
         [{"scan": "volume-0", "slice": 5}], "slice 5 of volume-0 does not show liver"),
        ({"train": ["volume-0"], "val": [], "test": []}, [], "names no slice"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, config, split, labels, message):
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(UserError, match=message):
        load_or_draw(config, fake_store(tmp_path), tmp_path)


def test_missing_file(tmp_path, config):
    config.data.split_file = str(tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"nothing\.json"):
        load_or_draw(config, fake_store(tmp_path), tmp_path)


def test_no_masks_at_all(tmp_path, config):
    with pytest.raises(UserError, match="none of the 3 scans has a mask"):
        load_or_draw(config, fake_store(tmp_path, scans=3, unlabelled=3), tmp_path)
