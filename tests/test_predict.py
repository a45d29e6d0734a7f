"""A scan in, a mask on the same grid out, whatever the orientation."""

import shutil
import types

import nibabel as nib
import numpy as np
import pytest
from data.test_volumes import AXCODES, oriented

from sammix_jax import predict as predict_module
from sammix_jax.config_files import load_config
from sammix_jax.data import phantom
from sammix_jax.data.files import write_json
from sammix_jax.data.volumes import Volume
from sammix_jax.errors import UserError
from sammix_jax.evaluation import figures
from sammix_jax.inference import predict_volume
from sammix_jax.predict import predict

# A rotation by 20° about two axes: no axis of the grid lies along one of the body.
OBLIQUE = nib.eulerangles.euler2mat(0.35, 0.1, 0.0)


@pytest.fixture(scope="module")
def scan():
    """A small piece of a phantom in LPS: few, thick slices."""
    made = phantom.make_patient(5, phantom.PORTAL)
    image = oriented(nib.Nifti1Image(made.image, made.affine), "LPS")
    return image.slicer[::2, 4:-6:2, 10:34:6]


@pytest.fixture
def config(workdir):
    config = load_config(workdir)
    config.evaluate.gate = False  # the small model must say something on every slice
    return config


def test_all_orientations_agree_in_the_world(tmp_path, workdir, config, scan):
    scans = tmp_path / "scans"
    scans.mkdir()
    for code in AXCODES:
        nib.save(oriented(scan, code), scans / f"{code}.nii.gz")
    rotated = nib.affines.from_matvec(OBLIQUE) @ scan.affine
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj), rotated), scans / "oblique.nii.gz")

    predicted = predict(config, workdir, scans, tmp_path / "masks")
    assert len(predicted) == 49
    reference = np.asarray(nib.load(tmp_path / "masks" / "LPS.nii.gz").dataobj)
    assert 0.01 < reference.mean() < 0.9
    for axis in range(3):  # else a flip would go unseen
        assert not np.array_equal(reference, np.flip(reference, axis))
    for code in AXCODES:
        source = nib.load(scans / f"{code}.nii.gz")
        mask = nib.load(tmp_path / "masks" / f"{code}.nii.gz")
        assert mask.shape == source.shape
        np.testing.assert_array_equal(mask.affine, source.affine)
        back = oriented(mask, "LPS")
        np.testing.assert_allclose(back.affine, scan.affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(back.dataobj), reference, err_msg=code)
    oblique = nib.load(tmp_path / "masks" / "oblique.nii.gz")
    np.testing.assert_allclose(oblique.affine, rotated, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(oblique.dataobj), reference)
    assert len({round(p.organ_ml, 3) for p in predicted}) == 1


def test_mask_overlay_and_volume(tmp_path, workdir, config, scan):
    nib.save(scan, tmp_path / "scan.nii")
    (made,) = predict(config, workdir, tmp_path / "scan.nii", tmp_path / "out" / "mask.nii.gz")
    mask = nib.load(made.mask)
    voxel_ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    assert made.organ_ml == pytest.approx(np.asarray(mask.dataobj).sum() * voxel_ml)
    assert made.overlay.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"mask.nii.gz", "mask_overlay.png"}


def test_folders(tmp_path, workdir, config, scan):
    """Masks beside the scans are no scans; one bad scan does not stop the others."""
    lits = tmp_path / "lits"
    lits.mkdir()
    for name in ("volume-0.nii.gz", "segmentation-0.nii.gz", "volume-2.nii.gz"):
        nib.save(scan, lits / name)
    (lits / "volume-1.nii.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2 of 3 scans are predicted(.|\n)*volume-1"):
        predict(config, workdir, lits, tmp_path / "masks")
    made = {path.name for path in (tmp_path / "masks").glob("*.nii.gz")}
    assert made == {"volume-0.nii.gz", "volume-2.nii.gz"}

    (tmp_path / "total" / "s0003").mkdir(parents=True)
    nib.save(scan, tmp_path / "total" / "s0003" / "ct.nii.gz")
    nib.save(scan, tmp_path / "total" / "beside.nii")
    made = predict(config, workdir, tmp_path / "total", tmp_path / "out")
    assert [case.mask for case in made] == [
        tmp_path / "out" / name for name in ("s0003.nii.gz", "beside.nii")
    ]
    assert all(case.mask.exists() for case in made)


def test_overlay_shows_the_organ_where_it_is():
    """Also where it comes in pieces with gaps between."""
    volume = Volume(None, np.zeros((40, 8, 8), np.int16), (1.0, 1.0, 1.0), np.eye(4), None)
    mask = np.zeros((40, 8, 8), bool)
    mask[[2, 3, 36, 37], 2:5, 2:5] = True
    titles = [axis.get_title() for axis in figures.overlay(volume, mask, (0, 1)).axes]
    assert titles == ["slice 4 of 40", "slice 37 of 40", "slice 38 of 40"]


def test_refusals(tmp_path, workdir, config, scan):
    path = tmp_path / "scan.nii.gz"
    nib.save(scan, path)
    with pytest.raises(UserError, match="that is the scan itself"):
        predict(config, workdir, path, path)
    with pytest.raises(UserError, match=r"ending in \.nii"):
        predict(config, workdir, path, tmp_path / "mask")
    with pytest.raises(UserError, match=r"--input=.*scnas: no such file or folder"):
        predict(config, workdir, tmp_path / "scnas", tmp_path / "masks")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no scans there"):
        predict(config, workdir, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        predict(config, workdir, tmp_path / "nothing.nii.gz", tmp_path / "mask.nii.gz")
    with pytest.raises(UserError, match="no checkpoint there"):
        predict(config, tmp_path / "fresh", path, tmp_path / "mask.nii.gz")


def test_a_place_that_cannot_be_written_is_told_first(tmp_path, config, scan):
    """Before a checkpoint is read: here there is none."""
    nib.save(scan, tmp_path / "scan.nii.gz")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output: .*file/masks cannot be made .*give another"):
        predict(config, tmp_path, tmp_path / "scan.nii.gz", tmp_path / "file" / "masks" / "m.nii")


def test_what_the_model_never_saw_is_told(tmp_path, workdir, config, scan, caplog):
    nib.save(scan, tmp_path / "scan.nii.gz")
    places = (tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    predict(config, workdir, *places)
    assert "trained on" not in caplog.text
    config.data.central_fraction = 0.5
    predict(config, workdir, *places)
    assert "on a part of each scan's slices (data.central_fraction=0.5" in caplog.text
    assert "HDF5" not in caplog.text
    run = tmp_path / "run"
    shutil.copytree(workdir / "checkpoints", run / "checkpoints")
    predict(config, run, *places)  # a model alone is enough
    write_json(run / "images.json", {"a": {"file": "a.h5", "digest": ""}})
    predict(config, run, *places)
    assert "was trained on HDF5 slices" in caplog.text


def test_only_masks_of_this_program_are_replaced(tmp_path, workdir, config, scan):
    """In nnU-Net's folders references have the names of their scans."""
    images, labels = tmp_path / "imagesTs", tmp_path / "labelsTs"
    for folder in (images, labels):
        folder.mkdir()
        nib.save(scan, folder / "liver_1.nii.gz")
    reference = (labels / "liver_1.nii.gz").read_bytes()
    with pytest.raises(
        UserError, match=r"liver_1\.nii\.gz: is there already, and was changed since"
    ):
        predict(config, workdir, images, labels)
    assert (labels / "liver_1.nii.gz").read_bytes() == reference
    out = tmp_path / "out"
    first, again = (predict(config, workdir, images, out)[0].mask for _ in range(2))
    assert first == again and again.exists()

    made = nib.load(first)
    corrected = np.asarray(made.dataobj).copy()
    corrected[2, 2, 2] ^= 1
    nib.save(nib.Nifti1Image(corrected, made.affine, made.header), first)
    kept = first.read_bytes()
    with pytest.raises(UserError, match="is there already, and was changed since it was predicted"):
        predict(config, workdir, images, out)
    assert first.read_bytes() == kept
    nib.save(scan, images / "liver_2.nii.gz")
    (made,) = predict(config, workdir, images, out, skip_existing=True)
    assert made.mask.name == "liver_2.nii.gz" and first.read_bytes() == kept
    assert predict(config, workdir, images, out, skip_existing=True) == []
    second = nib.load(made.mask)
    nib.save(nib.Nifti1Image(1 - np.asarray(second.dataobj), second.affine), made.mask)
    with pytest.raises(UserError, match=r"in the way: .*--skip_existing:\n.*liver_1.*\n.*liver_2"):
        predict(config, workdir, images, out)
    (images / "liver_2.nii.gz").unlink()
    first.unlink()  # as if it had been stopped between overlay and mask
    predict(config, workdir, images, out)

    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "liver_1_overlay.png").write_bytes(b"my own figure")
    with pytest.raises(UserError, match=r"replace liver_1_overlay\.png, which this program did"):
        predict(config, workdir, images, tmp_path / "fresh")


def test_a_mask_that_is_corrected_meanwhile_stays(tmp_path, workdir, config, scan, monkeypatch):
    nib.save(scan, tmp_path / "scan.nii.gz")
    target = tmp_path / "mask.nii.gz"
    predict(config, workdir, tmp_path / "scan.nii.gz", target)

    def corrects(*given):
        mask = nib.load(target)
        nib.save(nib.Nifti1Image(1 - np.asarray(mask.dataobj), mask.affine, mask.header), target)
        return predict_volume(*given)

    monkeypatch.setattr(predict_module, "predict_volume", corrects)
    before = np.asarray(nib.load(target).dataobj)
    with pytest.raises(UserError, match=r"mask\.nii\.gz: is there already.*is left as it is"):
        predict(config, workdir, tmp_path / "scan.nii.gz", target)
    np.testing.assert_array_equal(np.asarray(nib.load(target).dataobj), 1 - before)


def test_a_prediction_that_was_cut_off_is_made_anew(tmp_path, workdir, config, scan, monkeypatch):
    """After the overlay, and where a mask of another model lay before."""
    nib.save(scan, tmp_path / "scan.nii.gz")
    target = tmp_path / "mask.nii.gz"

    def predicted():
        predict(config, workdir, tmp_path / "scan.nii.gz", target)
        return np.asarray(nib.load(target).dataobj)

    def others(*given):
        return types.SimpleNamespace(
            masks={name: ~mask for name, mask in predict_volume(*given).masks.items()}
        )

    def cut(*_):
        raise KeyboardInterrupt

    before = predicted()
    monkeypatch.setattr(predict_module, "predict_volume", others)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict_module, "write_mask", cut)
        predicted()
    np.testing.assert_array_equal(predicted(), 1 - before)


def test_a_mask_of_a_scan_without_orientation_is_known_again(tmp_path, workdir, config, scan):
    """Whose voxels lie as `data.default_orientation` says, and not as the mask's header."""
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj), np.eye(4)), tmp_path / "lost.nii")
    config.data.default_orientation = "PSR"
    for _ in range(2):
        predict(config, workdir, tmp_path / "lost.nii", tmp_path / "mask.nii")


def test_the_checkpoint_knows_how_its_input_was_made(tmp_path, workdir, config, scan):
    """Also where config.json was changed or lost: weights and window belong together."""
    path, mask = tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz"
    nib.save(scan, path)
    config.input.window = (-100.0, 200.0)
    config.input.normalise = "minmax"
    with pytest.raises(UserError) as error:
        predict(config, workdir, path, mask)
    assert "input.window=[-160.0, 240.0] (now [-100.0, 200.0])" in str(error.value)
    assert "input.normalise=unit (now minmax)" in str(error.value)

    shutil.copytree(workdir / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "config.json").unlink()
    with pytest.raises(UserError, match="copy the whole checkpoints folder"):
        predict(load_config(workdir), tmp_path / "run", path, mask)
