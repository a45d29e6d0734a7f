"""A slice store is resumed, never half-written, and never replaced by another."""

import json
import os
import shutil
import threading
import time

import nibabel as nib
import numpy as np
import pytest

from sammix_jax import prepare as prepare_module
from sammix_jax.data import phantom
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.errors import UserError
from sammix_jax.prepare import prepare


@pytest.fixture
def config(config, lits):
    config.data.root = str(lits)
    return config


def test_rerun_keeps_finished_scans(config, tmp_path, monkeypatch):
    prepare(config, tmp_path / "run")
    read = []
    original = prepare_module.volumes.read_volume
    monkeypatch.setattr(
        prepare_module.volumes,
        "read_volume",
        lambda path, *how: read.append(path) or original(path, *how),
    )
    prepare(config, tmp_path / "run")
    assert read == []
    # A scan that changed since is prepared anew, and that one only.
    changed = tmp_path / "scans" / "volume-1.nii.gz"
    image = nib.load(changed)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.int16(7), image.affine), changed)
    before = SliceStore.open(tmp_path / "run" / "store")
    mean = before.hu(SliceId("volume-1", 0))[16:48].mean()
    store = prepare(config, tmp_path / "run")
    assert read == [changed]
    assert store.hu(SliceId("volume-1", 0))[16:48].mean() == pytest.approx(mean + 7, abs=0.1)


def test_a_full_disk_leaves_no_half_store(config, tmp_path, monkeypatch):
    save, calls = np.save, []

    def full(path, array):
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(path, array)

    monkeypatch.setattr(np, "save", full)
    config.data.workers = 1
    with pytest.raises(UserError, match=r"No space left on device.*data\.store"):
        prepare(config, tmp_path / "run")
    root = tmp_path / "run" / "store"
    assert not (root / "manifest.json").exists()
    with pytest.raises(UserError, match="run --mode=prepare first"):
        SliceStore.open(root)
    left = list((root / "scans").iterdir())
    assert "volume-1" not in {p.name for p in left}  # the one that met the full disk
    assert left and all((p / "scan.json").exists() for p in left)
    monkeypatch.setattr(np, "save", save)
    assert len(prepare(config, tmp_path / "run").records) == 3


@pytest.mark.parametrize("moment", ["before the old folder goes", "after it went"])
def test_another_process_may_finish_a_scan_first(config, tmp_path, monkeypatch, moment):
    finished = prepare(config, tmp_path / "other").root / "scans"
    scans = tmp_path / "run" / "store" / "scans"
    save, rmtree, came = np.save, shutil.rmtree, set()

    def come(name):
        came.add(name)
        shutil.copytree(finished / name, scans / name)

    def slow(path, array):
        save(path, array)
        if moment.startswith("before") and path.name == "hu.npy":
            come(path.parent.name.split(".")[1])

    def removed(path, **options):
        rmtree(path, **options)
        if moment.startswith("after") and path.parent == scans and path.suffix != ".partial":
            come(path.name)

    monkeypatch.setattr(np, "save", slow)
    monkeypatch.setattr(shutil, "rmtree", removed)
    store = prepare(config, tmp_path / "run")
    assert came == set(store.records) == {p.name for p in scans.iterdir()}


def test_a_folder_that_cannot_be_replaced_is_told(config, tmp_path, monkeypatch):
    scans = tmp_path / "run" / "store" / "scans"
    rmtree = shutil.rmtree

    def removed(path, **options):
        rmtree(path, **options)
        if path == scans / "volume-1":
            path.mkdir()
            (path / "stray").touch()

    monkeypatch.setattr(shutil, "rmtree", removed)
    with pytest.raises(UserError, match=r"volume-1: could not be written.*data\.store"):
        prepare(config, tmp_path / "run")


def test_other_settings_in_the_same_store_are_refused(config, tmp_path):
    prepare(config, tmp_path / "run")
    config.data.size = 32
    with pytest.raises(UserError, match=r"data\.size=64 \(now 32\)"):
        prepare(config, tmp_path / "run")


def test_settings_that_never_made_a_store_bind_nobody(config, tmp_path):
    config.data.central_fraction = 0.05
    with pytest.raises(UserError, match="central_fraction"):
        prepare(config, tmp_path / "run")
    config.data.central_fraction = 1.0
    assert len(prepare(config, tmp_path / "run").records) == 3


def test_all_bad_scans_are_told_at_once(config, lits, tmp_path):
    for n in (0, 2):
        path = lits / f"volume-{n}.nii.gz"
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="2 scans") as error:
        prepare(config, tmp_path / "run")
    assert "volume-0.nii.gz" in str(error.value) and "volume-2.nii.gz" in str(error.value)
    assert not (tmp_path / "run" / "store" / "manifest.json").exists()


def test_a_scan_that_turned_bad_unmakes_the_store(config, lits, tmp_path):
    prepare(config, tmp_path / "run")
    (lits / "volume-1.nii.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"volume-1\.nii\.gz"):
        prepare(config, tmp_path / "run")
    with pytest.raises(UserError, match="prepare first"):
        SliceStore.open(tmp_path / "run" / "store")


def test_a_store_of_other_scans_is_not_replaced(config, lits, tmp_path):
    prepare(config, tmp_path / "run")
    (lits / "volume-2.nii.gz").rename(lits / "volume-7.nii.gz")
    with pytest.raises(UserError, match="holds 1 scans that the data set lacks, such as volume-2"):
        prepare(config, tmp_path / "run")


def test_a_moved_data_set_is_found_again(config, lits, tmp_path):
    prepare(config, tmp_path / "run")
    moved = tmp_path / "elsewhere"
    os.rename(lits, moved)
    config.data.root = str(moved)
    store = prepare(config, tmp_path / "run")
    assert store.records["volume-0"].image == str(moved / "volume-0.nii.gz")


def test_a_half_store_of_another_version_is_made_anew(config, tmp_path):
    store = prepare(config, tmp_path / "run").root
    (store / "manifest.json").unlink()
    path = store / "scans" / "volume-1" / "scan.json"
    fields = json.loads(path.read_text())
    fields["fingerprint"], fields["geometry"] = "of an older version", {"side": 64}
    path.write_text(json.dumps(fields))
    (path.parent / ".DS_Store").touch()
    assert len(prepare(config, tmp_path / "run").records) == 3


def test_a_store_takes_the_place_of_no_scans(config, tmp_path):
    """Whose folders have the names of a store's: nothing of them is lost."""
    root = tmp_path / "data" / "scans"
    phantom.write_totalsegmentator(root, 2, seed=1)
    before = {path: path.stat().st_size for path in root.rglob("*")}
    config.data.root, config.data.store = str(root), str(tmp_path / "data")
    told = r"s0000: a prepared scan would take the place of ct\.nii\.gz, segmentations"
    with pytest.raises(UserError, match=told):
        prepare(config, tmp_path / "run")
    assert {path: path.stat().st_size for path in root.rglob("*")} == before
    assert not (tmp_path / "data" / "manifest.json").exists()


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_the_manifest_of_another_program_is_left_alone(config, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    config.data.store = str(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json: no manifest of a slice store"):
        prepare(config, tmp_path / "run")
    assert (tmp_path / "manifest.json").read_text() == content


def test_an_unchanged_store_is_not_written_to(config, tmp_path, monkeypatch):
    """It may be another user's, to be read alone."""
    prepare(config, tmp_path / "run")
    written = []
    monkeypatch.setattr(prepare_module, "write_json", lambda *args: written.append(args))
    assert len(prepare(config, tmp_path / "run").records) == 3
    assert not written


@pytest.mark.parametrize("change", ["labels", "scan"])
def test_a_store_is_not_remade_under_its_other_users(config, lits, tmp_path, change):
    before = prepare(config, tmp_path / "run")
    if change == "labels":
        config.data.label_values = (2,)
        told = (
            r"volume-0 was prepared with label values=\(1, 2\) \(now \(2,\)\) in .*data\.store=DIR"
        )
    else:  # of that name
        other = tmp_path / "other"
        shutil.copytree(lits, other)
        image = nib.load(lits / "volume-1.nii.gz")
        image = nib.Nifti1Image(np.asarray(image.dataobj) + np.int16(7), image.affine)
        nib.save(image, other / "volume-1.nii.gz")
        config.data.root = str(other)
        told = r"other/volume-1\.nii\.gz: volume-1 was prepared from another file, .*scans/volume-1"
    with pytest.raises(UserError, match=told):
        prepare(config, tmp_path / "run")
    assert SliceStore.open(before.root).records == before.records


def test_a_bug_does_not_wait_for_all_scans(config, tmp_path, monkeypatch):
    begun, go_on = [], threading.Event()

    def prepare_scan(scan, store, params):
        begun.append(scan.name)
        if len(begun) == 1:
            raise RuntimeError("a bug")
        go_on.wait(20)

    # The second scan is at work when the bug is told; the third waits, and never begins.
    shutdown = prepare_module.concurrent.futures.ThreadPoolExecutor.shutdown

    def ended(pool, wait=True, *, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        go_on.set()
        shutdown(pool, wait)

    monkeypatch.setattr(prepare_module.concurrent.futures.ThreadPoolExecutor, "shutdown", ended)
    monkeypatch.setattr(prepare_module, "_prepare_scan", prepare_scan)
    config.data.workers = 1
    with pytest.raises(RuntimeError, match="a bug"):
        prepare(config, tmp_path / "run")
    assert begun[0] == "volume-0" and "volume-2" not in begun


def test_what_was_abandoned_is_cleared(config, tmp_path):
    scans = tmp_path / "run" / "store" / "scans"
    for name, age in ((".volume-0.aaaa.partial", 2 * 24 * 3600), (".volume-0.bbbb.partial", 60)):
        (scans / name).mkdir(parents=True)
        (scans / name / "hu.npy").write_bytes(b"half")
        os.utime(scans / name, (time.time() - age,) * 2)
    prepare(config, tmp_path / "run")
    assert {p.name for p in scans.glob(".*")} == {".volume-0.bbbb.partial"}  # another's, at work
