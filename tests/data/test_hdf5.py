"""The authors' HDF5 files: read as they are, refused by name where they are not."""

import sys

import h5py
import nibabel as nib
import numpy as np
import pytest

from sammix_jax.data import datasets, hdf5, volumes
from sammix_jax.data.masks import count_organ_pixels, read_mask, write_mask
from sammix_jax.errors import UserError
from sammix_jax.prepare import prepare

RNG = np.random.default_rng(0)
HU = RNG.integers(-160, 241, (3, 256, 256), np.int16)
MASK = np.zeros(HU.shape, np.uint8)
MASK[1, 40:50, 60:90] = 1
MASK[1, 44, 70] = 2  # a lesion


def scaled(hu):
    """The authors' words in NumPy's float16."""
    return (hu.astype(np.float16) + 3055) / 8866


@pytest.fixture
def authors(tmp_path):
    """`authors(change)` writes scans/a.h5 and returns it; `change(file)` may spoil it first.

    Slices 9 to 11: without the organ, with it, with one too small for the resized mask.
    """

    def write(change=lambda file: None, holder=None, name="a.h5"):
        path = tmp_path / "scans" / name
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            for i, (hu, mask, shown) in enumerate(zip(HU, MASK, (0, 1, 1), strict=True), start=9):
                group = file.create_group(f"Slice{i}")
                group["Slice"], group["Segmentation"] = scaled(hu), mask
                (group[holder] if holder else group).attrs["ImageLabel"] = shown
            change(file)
        return path

    return write


def test_a_scan_and_its_mask(authors):
    path = authors()
    scan = volumes.read_volume(path)
    assert scan.hu.dtype == np.int16
    # Slice10 after Slice9, which the alphabet would turn round.
    np.testing.assert_array_equal(scaled(scan.hu).view(np.uint16), scaled(HU).view(np.uint16))
    assert not scan.has_spacing and scan.axcodes == "LPS" and scan.already_cut
    mask = read_mask(path, scan, (1, 2))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, MASK > 0)


@pytest.mark.parametrize("holder", [None, "Slice", "Segmentation"])
def test_the_image_level_label_is_the_files(authors, holder):
    path = authors(holder=holder)
    assert hdf5.read_image_labels(path).tolist() == [False, True, True]
    assert count_organ_pixels(path, MASK > 0).tolist() == [0, 300, 1]


def test_a_folder_of_them(authors, tmp_path):
    for name in ("scan-10.hdf5", "scan-9.h5", ".scan-1.h5"):
        authors(name=name)
    scans = datasets.find_scans(tmp_path / "scans", "liver")
    assert [s.name for s in scans] == ["scan-9", "scan-10"]
    assert all(s.image == s.label for s in scans)
    with pytest.raises(UserError, match=r"evaluate\.label_values=\(2,\): .* empty"):
        datasets.find_scans(tmp_path / "scans", "liver", (2,), field="evaluate.root")
    with pytest.raises(UserError, match=r"evaluate\.ignore_value=3: HDF5 files are annotated thr"):
        datasets.find_scans(tmp_path / "scans", "liver", (), 3, field="evaluate.root")


def test_a_store_of_them_holds_every_slice_and_its_label(authors, config, tmp_path):
    authors()
    config.data.root, config.data.size = str(tmp_path / "scans"), 256
    config.data.central_fraction = 0.3  # the files are cut to it already
    store = prepare(config, tmp_path / "run")
    slices = store.slices("a")
    assert [store.image_label(s) for s in slices] == [0, 1, 1]
    for i, slice_id in enumerate(slices):
        np.testing.assert_array_equal(scaled(store.hu(slice_id)), scaled(HU[i]))
        np.testing.assert_array_equal(store.mask(slice_id), MASK[i] > 0)


def test_a_mask_is_written_as_nifti(authors, tmp_path):
    scan = volumes.read_volume(authors())
    write_mask(tmp_path / "mask.nii.gz", MASK > 0, scan)
    back = read_mask(tmp_path / "mask.nii.gz", scan, (1,))
    np.testing.assert_array_equal(back, MASK > 0)
    assert nib.load(tmp_path / "mask.nii.gz").shape == (256, 256, 3)


def put(name, value):
    def change(file):
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value

    return change


def label(value):
    def change(file):
        del file["Slice10"].attrs["ImageLabel"]
        if value is not None:
            file["Slice10"].attrs["ImageLabel"] = value

    return change


def contradict(file):
    file["Slice10/Slice"].attrs["ImageLabel"] = 0


NONE_SUCH = scaled(HU[0])
NONE_SUCH[5, 5] = 0.5
NAN = scaled(HU[0])
NAN[5, 5] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("Slice10", None), None),  # a gap is no fault: the numbers only order the slices
        (lambda file: file.clear(), "holds nothing, expected groups Slice0"),
        (lambda file: file.move("Slice10", "x") or file.clear(), "expected groups Slice0"),
        (put("Slice10", np.zeros(3)), "/Slice10 has no Slice, expected a group"),
        (put("Slice10/Slice", None), "/Slice10 has no Slice, expected"),
        (put("Slice10/Segmentation", None), "/Slice10 has no Segmentation, expected"),
        (put("Slice10/Slice", np.zeros((256, 255), np.float16)), r"\(256, 255\) float16, expected"),
        (put("Slice10/Segmentation", np.zeros((64, 64))), r"\(64, 64\) float64, expected"),
        (put("Slice10/Slice", scaled(HU[0]).astype(np.float32)), "/Slice10/Slice is float32"),
        (put("Slice10/Slice", NONE_SUCH), r"/Slice10/Slice holds values that no HU gives.* 0\.5\)"),
        (put("Slice10/Slice", NAN), "/Slice10/Slice holds values that no HU gives"),
        (put("Slice10/Segmentation", MASK[1] * 3), r"/Slice10/Segmentation holds \[3, 6\]"),
        (label(0), "/Slice10 has ImageLabel 0 and a mask of 300 pixels"),
        (label(None), "/Slice10 has no attribute ImageLabel"),
        (label(7), r"/Slice10 states ImageLabel \[\[7\]\], expected 0 or 1"),
        (label("liver"), "/Slice10 states ImageLabel .*liver.*, expected 0 or 1"),
        (contradict, r"/Slice10 states ImageLabel \[\[1\], \[0\]\]"),
    ],
)
def test_what_is_no_file_of_theirs_is_named(authors, change, message):
    path = authors(change)

    def read():
        scan = volumes.read_volume(path)
        return count_organ_pixels(path, read_mask(path, scan, (1, 2)))

    if message is None:
        assert len(read()) == 2
        return
    with pytest.raises(UserError, match=rf"a\.h5: .*{message}"):
        read()


def test_damaged_and_missing_files(authors):
    path = authors()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"a\.h5: cannot be read as HDF5"):
        volumes.read_volume(path)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.h5: no such file"):
        volumes.read_volume(path)


def test_without_h5py(authors, monkeypatch):
    path = authors()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"a\.h5: .*pip install -r requirements/hdf5\.txt"):
        datasets.find_scans(path.parent, "liver")
