"""Scans in any orientation come in canonical, masks go out on the scan's own grid."""

import gzip
import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from sammix_jax.data import nifti, volumes
from sammix_jax.data.masks import read_mask, write_mask
from sammix_jax.errors import UserError

AXCODES = [
    "".join(code)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for code in itertools.product(*axes)
]


def oriented(image, code):
    """The same scan stored in another axis order."""
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(code)
    )
    return image.as_reoriented(turn)


def test_there_are_48_orientations():
    assert len(set(AXCODES)) == 48


@pytest.mark.parametrize("code", AXCODES)
def test_orientation_leaves_voxels_in_place(tmp_path, ct, code):
    plain = nib.Nifti1Image(ct, np.array(
        [[-2.0, 0, 0, 30], [0, -3.0, 0, 40], [0, 0, 5.0, -7], [0, 0, 0, 1]]
    ))  # LPS  # fmt: skip
    path = tmp_path / "scan.nii.gz"
    nib.save(oriented(plain, code), path)
    volume = volumes.read_volume(path)
    assert volume.axcodes == code
    assert volume.spacing == (5.0, 3.0, 2.0)
    np.testing.assert_array_equal(volume.hu, ct.transpose(2, 1, 0))

    write_mask(tmp_path / "mask.nii.gz", volume.hu > 100, volume)
    mask = oriented(nib.load(tmp_path / "mask.nii.gz"), "LPS")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), ct > 100)
    np.testing.assert_allclose(mask.affine, plain.affine)


def test_header_goes_out_as_it_came(tmp_path, ct):
    sform = nib.affines.from_matvec(
        np.diag([2, 2, 5]) @ nib.eulerangles.euler2mat(0.3, 0.1, 0.2), (5, -60, 12)
    )
    image = nib.Nifti1Image(ct, None)
    image.set_sform(sform, code=4)
    image.set_qform(np.diag([-2.0, 2.0, 5.0, 1.0]), code=1)  # disagrees, as some scanners do
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"from the scanner"
    path = tmp_path / "scan.nii"
    nib.save(image, path)
    volume = volumes.read_volume(path)
    write_mask(tmp_path / "mask.nii", volume.hu > 0, volume)

    before, after = nib.load(path).header, nib.load(tmp_path / "mask.nii").header
    assert after.get_data_dtype() == np.uint8
    for field in ("sform_code", "qform_code", "pixdim", "xyzt_units", "dim", "descrip"):
        np.testing.assert_array_equal(before[field], after[field], err_msg=field)
    np.testing.assert_array_equal(before.get_sform(), after.get_sform())
    np.testing.assert_array_equal(before.get_qform(), after.get_qform())


def test_scaled_and_float_scans_are_read_in_hu(tmp_path, ct):
    image = nib.Nifti1Image((ct + 1024).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(ct.astype(np.float32), np.eye(4)), tmp_path / "b.nii.gz")
    a, b = (volumes.read_volume(tmp_path / name) for name in ("a.nii.gz", "b.nii.gz"))
    np.testing.assert_array_equal(a.hu, b.hu)
    assert a.hu.dtype == np.int16


def test_mask_values_choose_the_organ(write_scan, ct):
    scan = volumes.read_volume(write_scan("scan.nii.gz", ct))
    labels = np.random.default_rng(1).integers(0, 4, ct.shape).astype(np.uint8)
    path = write_scan("mask.nii.gz", labels)
    mask = read_mask(path, scan, (1, 2))
    assert mask.sum() == np.isin(labels, (1, 2)).sum()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_labels_that_a_header_scales_are_read_as_they_were(tmp_path, write_scan, ct, dtype):
    """As nibabel saves floats under the header of an integer file."""
    scan = volumes.read_volume(write_scan("scan.nii.gz", ct))
    labels = np.random.default_rng(1).integers(0, 3, ct.shape).astype(dtype)
    source = nib.load(write_scan("labels.nii.gz", labels))

    def saved(values):
        nib.save(nib.Nifti1Image(values, source.affine, source.header), tmp_path / "edited.nii.gz")
        return tmp_path / "edited.nii.gz"

    edited = source.get_fdata()
    edited[:2] = 0
    path = saved(edited)
    scaled = nib.load(path).dataobj.slope != 1
    assert scaled == np.issubdtype(dtype, np.integer)
    mask = read_mask(path, scan, (1, 2), (0, 1, 2))
    assert (
        mask.sum() == (edited > 0).sum() == read_mask(path, scan, (1,)).sum() + (edited == 2).sum()
    )
    edited[3, 3, 3] = 0.5
    told = "no whole numbers .*by a header that scales" if scaled else "no whole numbers"
    with pytest.raises(UserError, match=told):
        read_mask(saved(edited), scan, (1, 2))


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.full((4, 4, 4), np.nan, np.float32), "NaN or infinite"),
        (np.zeros((4, 4, 4), np.int16), "every voxel is 0"),
        (np.ones((4, 4, 4, 2), np.int16), "4D"),
        (np.ones((4, 4), np.int16), "2D"),
    ],
)
def test_refuses_what_is_no_scan(write_scan, voxels, message):
    path = write_scan("scan.nii.gz", voxels)
    with pytest.raises(UserError, match=message) as error:
        volumes.read_volume(path)
    assert str(path) in str(error.value)


def test_refuses_truncated_files(tmp_path, write_scan, ct):
    whole = write_scan("scan.nii.gz", ct).read_bytes()
    plain = gzip.decompress(whole)
    for name, content in {
        "short.nii.gz": whole[: len(whole) // 2],
        "header.nii.gz": whole[:40],
        "short.nii": plain[: len(plain) // 2],
        "text.nii.gz": b"this is no scan",
        "empty.nii": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="truncated or damaged") as error:
            volumes.read_volume(tmp_path / name)
        assert name in str(error.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_damaged_header_that_asks_for_too_much_is_named(tmp_path, suffix):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((32000,) * 3)
    header["magic"], header["vox_offset"] = b"n+1", 352
    content = header.binaryblock + bytes(1000)
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(UserError, match=r"scan.*(\(32000, 32000, 32000\)|truncated or damaged)"):
        volumes.read_volume(path)


def test_a_file_that_nobody_may_read_is_not_called_damaged(write_scan, ct, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    path = write_scan("scan.nii", ct)
    monkeypatch.setattr(nifti, "_opened", refuse)
    with pytest.raises(UserError, match=r"scan\.nii: cannot be opened \(Permission denied\)"):
        volumes.read_volume(path)


def test_refuses_other_formats_and_missing_files(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(b"DICM")
    with pytest.raises(UserError, match="expected a NIfTI file"):
        volumes.read_volume(tmp_path / "scan.dcm")
    with pytest.raises(UserError, match="no such file"):
        volumes.read_volume(tmp_path / "nothing.nii.gz")
    (tmp_path / "unpacked.nii").mkdir()
    with pytest.raises(UserError, match=r"unpacked\.nii: is a folder, expected a file"):
        volumes.read_volume(tmp_path / "unpacked.nii")


def test_refuses_masks_of_another_grid_or_place(write_scan, ct):
    scan = volumes.read_volume(write_scan("scan.nii.gz", ct))
    mask = (ct > 100).astype(np.uint8)
    other_grid = write_scan("grid.nii.gz", mask.transpose(1, 0, 2))
    with pytest.raises(UserError, match=r"grid is \(16, 20, 6\).*\(20, 16, 6\)"):
        read_mask(other_grid, scan, (1,))
    shifted = np.diag([2.0, 2.0, 5.0, 1.0])
    shifted[0, 3] = 1.0
    with pytest.raises(UserError, match="up to 1 mm"):
        read_mask(write_scan("shift.nii.gz", mask, shifted), scan, (1,))
    blurred = write_scan("blurred.nii.gz", mask * np.float32(0.5))
    with pytest.raises(UserError, match="no whole numbers"):
        read_mask(blurred, scan, (1,))


def test_a_mask_that_only_knows_a_tilted_grid_by_its_qform_fits(tmp_path, write_scan, ct):
    """A qform is a float32 quaternion, which of such a grid loses a tenth of a millimetre."""
    voxels = np.resize(ct, (256, 256, 4))
    tilted = nib.eulerangles.euler2mat(z=np.deg2rad(0.03)) @ np.diag([-0.7, -0.7, 1.0])
    scan = volumes.read_volume(
        write_scan("scan.nii.gz", voxels, nib.affines.from_matvec(tilted, (90, 90, 0)))
    )
    mask = nib.Nifti1Image((voxels > 100).astype(np.uint8), None)
    mask.header.set_qform(scan.affine, code=1)
    mask = nib.Nifti1Image(mask.dataobj, None, mask.header)
    nib.save(mask, tmp_path / "mask.nii.gz")
    affine = nib.load(tmp_path / "mask.nii.gz").affine
    assert np.abs(affine - scan.affine).max() * 256 > 0.05
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz", scan, (1,)), scan.hu > 100)


def test_refuses_a_degenerate_affine(write_scan, ct):
    path = write_scan("flat.nii", ct)
    content = bytearray(path.read_bytes())
    content[296:312] = bytes(16)  # srow_y, which nibabel would not write as zeros
    path.write_bytes(content)
    with pytest.raises(UserError, match="affine"):
        volumes.read_volume(path)


def test_a_failed_write_leaves_nothing(tmp_path, write_scan, ct, monkeypatch):
    scan = volumes.read_volume(write_scan("scan.nii.gz", ct))

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(UserError, match="No space left"):
        write_mask(tmp_path / "out" / "mask.nii.gz", scan.hu > 0, scan)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_mask_without_spacing_is_taken_in_the_files_order(write_scan, ct, caplog):
    scan = volumes.read_volume(write_scan("volume-0.nii.gz", ct, np.diag([-0.8, 0.8, 2.5, 1.0])))
    labels = np.zeros(ct.shape, np.uint8)
    labels[3, 2, 1] = 1
    lost = np.eye(4)
    lost[:3, 3] = 1
    found = read_mask(write_scan("lost.nii.gz", labels, lost), scan, (1,))
    assert (
        "in the file of the mask; the mask's voxels" in caplog.text
        and "look whether they fit" in caplog.text
    )
    placed = write_scan("placed.nii.gz", labels, scan.affine)
    np.testing.assert_array_equal(found, read_mask(placed, scan, (1,)))
    lost[0, 3] = 7.5
    with pytest.raises(UserError, match="the mask's affine places its voxels"):
        read_mask(write_scan("elsewhere.nii.gz", labels, lost), scan, (1,))


def test_a_scan_and_a_mask_that_both_lost_their_place(write_scan, ct, caplog):
    """Whatever unit affine each was left with."""
    scan = volumes.read_volume(write_scan("volume-28.nii.gz", ct, np.eye(4)))
    labels = (np.asarray(ct) > 50).astype(np.uint8)
    caplog.clear()
    read_mask(write_scan("same.nii.gz", labels, np.eye(4)), scan, (1,))
    assert not caplog.text
    lost = write_scan("lost.nii.gz", labels, np.diag([-1.0, -1.0, 1.0, 1.0]))
    found = read_mask(lost, scan, (1,))
    assert "in the file of the scan and mask" in caplog.text
    np.testing.assert_array_equal(found, scan.hu > 50)


def test_the_orientation_of_a_scan_that_knows_none(write_scan, ct, caplog):
    path = write_scan("volume-28.nii.gz", ct, np.eye(4))
    as_ras, as_las = volumes.read_volume(path), volumes.read_volume(path, "LAS")
    assert (as_ras.axcodes, as_las.axcodes) == ("RAS", "LAS")
    assert "data.default_orientation" in caplog.text
    np.testing.assert_array_equal(as_las.hu, np.flip(as_ras.hu, axis=2))
    # The mask is read, and written, as the file has it.
    mask = write_scan("segmentation-28.nii.gz", (np.asarray(ct) > 50).astype(np.uint8), np.eye(4))
    np.testing.assert_array_equal(read_mask(mask, as_las, (1,)), as_las.hu > 50)
    written = path.with_name("mask.nii.gz")
    write_mask(written, as_las.hu > 50, as_las)
    np.testing.assert_array_equal(nib.load(written).get_fdata() > 0, np.asarray(ct) > 50)
    # One that knows its own keeps it.
    known = write_scan("volume-1.nii.gz", ct, np.diag([0.8, 0.8, 2.5, 1.0]))
    assert volumes.read_volume(known, "LAS").axcodes == "RAS"


def test_a_rescaled_scan_is_never_whole_in_floats(write_scan, monkeypatch):
    hu = np.full((64, 64, 200), -1000, np.int16)
    hu[..., 3] = 40
    image = nib.Nifti1Image((hu + 1024).astype(np.int16), np.diag([0.8, 0.8, 2.5, 1.0]))
    image.header.set_slope_inter(1, -1024)
    path = write_scan("scan.nii.gz", hu)
    nib.save(image, path)
    tracemalloc.start()
    volume = volumes.read_volume(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (volume.hu[3] == 40).all() and volume.hu.dtype == np.int16
    assert peak < 4.5 * hu.nbytes  # file, HU and their canonical copy


def test_lost_spacing_and_tilted_gantry(write_scan, ct):
    lost = volumes.read_volume(write_scan("lost.nii.gz", ct, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert not lost.has_spacing and lost.millilitres(lost.hu) is None
    tilted = np.diag([2.0, 2.0, 5.0, 1.0])
    tilted[1, 2] = 5.0 * np.tan(np.deg2rad(20))  # each slice shifted along the table
    scan = volumes.read_volume(write_scan("tilted.nii.gz", ct, tilted))
    assert scan.has_spacing
    assert scan.millilitres(np.ones(1)) == pytest.approx(0.020)  # a shear keeps the volume


def test_a_scan_without_sform_and_qform_is_placed_nowhere(write_scan, ct, caplog):
    path = write_scan("scan.nii.gz", ct)
    nib.save(nib.Nifti1Image(ct, None), path)
    scan = volumes.read_volume(path)
    assert not scan.has_spacing
    assert "neither sform nor qform is set, so its orientation is unknown and taken" in caplog.text
    spaced = nib.Nifti1Image(ct, None)
    spaced.header.set_zooms((2.0, 2.0, 5.0))
    nib.save(spaced, path)
    scan = volumes.read_volume(path)
    assert scan.has_spacing and scan.spacing == (5.0, 2.0, 2.0)
    write_mask(path.with_name("mask.nii.gz"), scan.hu > 50, scan)
    np.testing.assert_array_equal(
        nib.load(path.with_name("mask.nii.gz")).get_fdata() > 0, np.asarray(ct) > 50
    )


def test_damage_within_a_compressed_file_is_found(write_scan, ct):
    """A flipped bit mostly decompresses to other voxels; only the checksum at the end tells."""
    path = write_scan("scan.nii.gz", np.repeat(np.repeat(ct, 4, 0), 4, 1))
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(100, len(whole) - 8, 30):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place) % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"scan\.nii\.gz: cannot be read as NIfTI"):
            volumes.read_volume(path)


def test_axes_of_one_phase_are_dropped(write_scan, ct):
    scan = volumes.read_volume(write_scan("scan.nii.gz", ct[..., None]))
    expected = volumes.read_volume(write_scan("flat.nii.gz", ct))
    np.testing.assert_array_equal(scan.hu, expected.hu)


def test_mask_values_that_nothing_names(write_scan, ct):
    """A mask of 0 and 255 must not pass for an empty one."""
    scan = volumes.read_volume(write_scan("scan.nii.gz", ct))
    path = write_scan("mask.nii.gz", (ct > 100).astype(np.uint8) * 255)
    with pytest.raises(UserError, match=r"mask\.nii\.gz: the mask holds the values \[255\]"):
        read_mask(path, scan, (1,), known_values=(0, 1))
    assert read_mask(path, scan, (255,)).any()


def test_a_scan_without_air_is_told(write_scan, ct, caplog):
    volumes.read_volume(write_scan("scan.nii.gz", np.minimum(ct, 300) - np.int16(700)))
    assert not caplog.records
    volumes.read_volume(write_scan("shifted.nii.gz", np.abs(ct)))
    assert "are these Hounsfield units?" in caplog.text
