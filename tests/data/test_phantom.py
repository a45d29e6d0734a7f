"""The embedded phantom: anatomy in the right place, HU that overlap, files in both layouts."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from sammix_jax.data.phantom import (
    DOMAINS,
    LIVER,
    PORTAL,
    TUMOUR,
    UNENHANCED,
    make_patient,
    scans,
    write_lits,
    write_totalsegmentator,
)

SEEDS = {"portal": range(5), "unenhanced": range(3)}


@pytest.fixture(scope="module")
def patients():
    return {
        name: [make_patient((7, i), DOMAINS[name]) for i in seeds] for name, seeds in SEEDS.items()
    }


@pytest.fixture(scope="module")
def everyone(patients):
    return [p for group in patients.values() for p in group]


def world_centre(patient, organ):
    """Centroid of an organ, RAS+ mm."""
    return nib.affines.apply_affine(patient.affine, np.argwhere(patient.labels[organ]).mean(0))


def in_lps(patient, array):
    have = nib.orientations.io_orientation(patient.affine)
    want = nib.orientations.axcodes2ornt("LPS")
    turn = nib.orientations.ornt_transform(have, want)
    return nib.orientations.apply_orientation(array, turn)


def best_window_dice(image, liver):
    """Dice of the best HU window of all, from counts of voxels at or below each HU."""
    low, high = -200, 400
    hu = np.clip(image, low, high).astype(int) - low
    every = np.r_[0, np.bincount(hu.ravel(), minlength=high - low + 1).cumsum()]
    inside = np.r_[0, np.bincount(hu[liver > 0], minlength=high - low + 1).cumsum()]
    picked = every[None] - every[:, None]  # [a, b]: voxels with a <= HU < b
    hits = inside[None] - inside[:, None]
    dice = 2 * hits / np.maximum(picked + inside[-1], 1)
    return dice[np.triu_indices_from(dice)].max()


def test_same_seed_same_scan(patients):
    again = make_patient((7, 0), PORTAL)
    first = patients["portal"][0]
    assert again.image.tobytes() == first.image.tobytes()
    assert np.array_equal(again.affine, first.affine)
    for organ, mask in first.labels.items():
        assert np.array_equal(again.labels[organ], mask)


def test_patients_differ(everyone):
    assert len({p.image.tobytes() for p in everyone}) == len(everyone)
    volumes = [p.labels["liver"].sum() * abs(np.linalg.det(p.affine[:3, :3])) for p in everyone]
    assert np.std(volumes) > 0.05 * np.mean(volumes)
    assert min(volumes) > 0.7e6 and max(volumes) < 2.5e6  # mm3, as in adults


def test_domain_is_part_of_the_seed(patients):
    # Equal in all but the name: still not the same patient.
    other = dataclasses.replace(PORTAL, name="elsewhere")
    assert make_patient((7, 0), other).image.tobytes() != patients["portal"][0].image.tobytes()


def test_arrays_and_affine(everyone):
    for p in everyone:
        assert p.image.dtype == np.int16 and p.affine.dtype == np.float64
        assert -1024 <= p.image.min() < -950 and p.image.max() > 250
        for mask in p.labels.values():
            assert mask.dtype == np.uint8 and mask.shape == p.image.shape and mask.max() <= 1


@pytest.mark.parametrize("domain", [PORTAL, UNENHANCED], ids=lambda d: d.name)
def test_hu_of_tissues(patients, domain):
    soft = ("liver", "spleen", "kidney_left", "kidney_right", "aorta")
    for p in patients[domain.name]:
        median = {organ: np.median(p.image[mask > 0]) for organ, mask in p.labels.items()
                  if mask.any()}  # fmt: skip
        for organ in soft:
            mean, half, _ = domain.hu["kidney_cortex" if "kidney" in organ else organ]
            # Kidneys hold darker medulla, and thin organs lose some HU to the fat around them.
            assert mean - half - 22 < median[organ] < mean + half + 10, organ
        assert -950 < median["lung"] < -700
        assert -125 < median["fat"] < -80
        assert median["bone"] > 120
        assert median["gallbladder"] < median["liver"] - 20


def test_lesions_lie_in_the_liver_and_are_mostly_darker(everyone):
    gaps = []
    for p in everyone:
        tumour, liver = p.labels["tumour"] > 0, p.labels["liver"] > 0
        assert not (tumour & ~liver).any()
        if tumour.sum() > 50:
            gaps.append(p.image[tumour].mean() - p.image[liver & ~tumour].mean())
    assert len(gaps) >= 3 and np.median(gaps) < -10


def test_organs_do_not_overlap(everyone):
    for p in everyone:
        organs = [mask for organ, mask in p.labels.items() if organ != "tumour"]
        assert np.sum(organs, axis=0).max() == 1


def test_organs_are_where_they_belong_in_the_world(everyone):
    for p in everyone:
        at = {organ: world_centre(p, organ) for organ in p.labels if p.labels[organ].any()}
        # RAS+: coordinates grow to the patient's right, to the front and upwards.
        right, front, up = ({organ: c[axis] for organ, c in at.items()} for axis in range(3))
        assert right["liver"] - 20 > right["aorta"] > right["spleen"] + 50
        assert right["kidney_right"] - 30 > right["aorta"] > right["kidney_left"] + 30
        assert front["stomach"] > front["aorta"] > front["bone"]
        assert front["stomach"] > front["spleen"] and front["aorta"] > front["kidney_left"]
        assert up["lung"] > up["liver"] > up["kidney_right"]


def test_slices_with_and_without_liver(everyone):
    shares = []
    for p in everyone:
        shows = in_lps(p, p.labels["liver"]).any((0, 1))
        assert not shows[0] and not shows[-1]  # pelvis below, lungs above
        shares.append(shows.mean())
    assert min(shares) > 0.4 and max(shares) < 0.7 and 0.45 < np.mean(shares) < 0.62


def test_grids_vary(everyone, patients):
    assert len({nib.aff2axcodes(p.affine) for p in everyone}) >= 4
    spacings = {tuple(nib.affines.voxel_sizes(p.affine).round(3)) for p in everyone}
    assert len(spacings) == len(everyone)
    for p in patients["portal"]:
        assert 32 <= in_lps(p, p.image).shape[2] <= 56
    for p in patients["unenhanced"]:
        assert len(set(in_lps(p, p.image).shape[:2])) == 2  # not square


def test_threshold_search_finds_a_separable_liver():
    liver = np.zeros((8, 8, 8), np.uint8)
    liver[2:5, 1:6] = 1
    assert best_window_dice(np.where(liver, 100, 40), liver) == 1


def test_no_hu_window_segments_the_liver(everyone):
    for p in everyone:
        assert 0.2 < best_window_dice(p.image, p.labels["liver"]) < 0.6


def test_lits_layout(tmp_path, patients):
    paths = write_lits(tmp_path, 2, seed=7, unlabelled=1)
    assert [path.name for path in paths] == ["volume-0.nii.gz", "volume-1.nii.gz"]
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "segmentation-0.nii.gz", "volume-0.nii.gz", "volume-1.nii.gz",
    ]  # fmt: skip
    patient = patients["portal"][0]
    scan, labels = nib.load(paths[0]), nib.load(tmp_path / "segmentation-0.nii.gz")
    assert scan.get_data_dtype() == np.int16 and labels.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(scan.dataobj), patient.image)
    classes = np.asarray(labels.dataobj)
    assert np.array_equal(classes > 0, patient.labels["liver"] > 0)
    assert np.array_equal(classes == TUMOUR, patient.labels["tumour"] > 0)
    assert set(np.unique(classes)) <= {0, LIVER, TUMOUR}
    for image in (scan, labels):
        assert image.header["sform_code"] == image.header["qform_code"] == 1
        assert image.header.get_xyzt_units()[0] == "mm"
        assert np.allclose(image.get_sform(), patient.affine, atol=1e-3)
        assert np.allclose(image.get_qform(), patient.affine, atol=1e-3)


def test_totalsegmentator_layout(tmp_path, patients):
    (path,) = write_totalsegmentator(tmp_path, 1, seed=7)
    assert path == tmp_path / "s0000" / "ct.nii.gz"
    patient = patients["unenhanced"][0]
    assert np.array_equal(np.asarray(nib.load(path).dataobj), patient.image)
    for organ in ("liver", "spleen", "kidney_left", "kidney_right"):
        mask = nib.load(path.parent / "segmentations" / f"{organ}.nii.gz")
        assert mask.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(mask.dataobj), patient.labels[organ])
        assert np.allclose(mask.affine, patient.affine, atol=1e-3)


def test_writing_resumes(tmp_path, monkeypatch, patients):
    made = []

    def cheap(seed, domain):
        made.append(seed[1])
        return patients[domain.name][seed[1]]

    monkeypatch.setattr(scans, "make_patient", cheap)
    write_lits(tmp_path, 2, seed=7)
    (tmp_path / "segmentation-1.nii.gz").unlink()
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    write_lits(tmp_path, 3, seed=7)
    assert sorted(made) == [0, 1, 1, 2]  # only what was missing was made again
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in kept.items())
    assert len(list(tmp_path.iterdir())) == 6
