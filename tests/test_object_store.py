"""Everything that a user may place in a bucket: the same there as on this machine."""

import dataclasses
import shutil

import jax
import nibabel as nib
import numpy as np
import object_store
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from object_store import ObjectStore, upload
from scored import DICES, case, evaluation, example

from sammix_jax import options, prepare
from sammix_jax.config import default_config
from sammix_jax.config_files import check_workdir, claim_workdir, load_config
from sammix_jax.config_rules import check_files
from sammix_jax.data import phantom
from sammix_jax.data.datasets import find_scans
from sammix_jax.data.files import local_copy, read_json, write_json
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.split_files import keep, kept_split, load_or_draw, training_scans
from sammix_jax.errors import UserError
from sammix_jax.evaluate import evaluate
from sammix_jax.evaluation.report import write_report
from sammix_jax.evaluation.results import load_results, write_results
from sammix_jax.evaluation.scores import Guidance
from sammix_jax.evaluation.seeds import over_seeds, write_over_seeds
from sammix_jax.evaluation.so_far import ScoredScan, ScoredSoFar
from sammix_jax.predict import predict
from sammix_jax.training import log as train_log
from sammix_jax.training.log import TrainLog, read_log
from sammix_jax.weights import read_weights, write_weights

BUCKET = epath.Path("gs://bucket")


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """An empty store for each test. What took gs:// for a local path would leave a folder `gs:`."""
    object_store.install()
    here = tmp_path / "current"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert not list(here.iterdir())


@pytest.fixture(scope="module")
def lits(tmp_path_factory):
    """Four phantoms in LiTS layout, one of them without a mask."""
    root = tmp_path_factory.mktemp("lits")
    phantom.write_lits(root, 4, 0, unlabelled=1)
    return root


def prepared(config, root, workdir) -> SliceStore:
    config.data.root = str(root)
    return prepare.prepare(config, workdir)


def test_a_store_is_the_same_to_the_bit(config, lits, tmp_path):
    here = prepared(config, lits, tmp_path / "run")
    there = prepared(config, upload(lits, "gs://bucket/scans"), "gs://bucket/run")
    assert str(there.root) == "gs://bucket/run/store"
    assert list(there.records) == list(here.records)
    files = ("image", "label", "fingerprint")
    for name, record in here.records.items():
        other = dataclasses.asdict(there.records[name])
        assert {k: v for k, v in other.items() if k not in files} == {
            k: v for k, v in dataclasses.asdict(record).items() if k not in files
        }
        assert other["image"] == f"gs://bucket/scans/{name}.nii.gz"
        for array in ("hu.npy", "mask.npy")[: 1 + record.has_label]:
            local = here.root / "scans" / name / array
            assert (there.root / "scans" / name / array).read_bytes() == local.read_bytes()
        for s in here.slices(name):
            np.testing.assert_array_equal(there.hu(s), here.hu(s))
            if record.has_label:
                np.testing.assert_array_equal(there.mask(s), here.mask(s))
                assert there.image_label(s) == here.image_label(s)


def test_a_remote_array_is_fetched_once_and_mapped(config, lits):
    store = prepared(config, lits, "gs://bucket/run")
    first, *_, last = store.slices("volume-0")
    ObjectStore.fetched.clear()
    maps = [store.hu(first), store.hu(last)]
    assert ObjectStore.fetched == ["bucket/run/store/scans/volume-0/hu.npy"]
    assert all(isinstance(array, np.memmap) for array in maps)


def test_a_rerun_prepares_what_changed(config, lits, tmp_path):
    root = upload(lits, "gs://bucket/scans")
    prepared(config, root, tmp_path / "run")
    ObjectStore.fetched.clear()
    prepared(config, root, tmp_path / "run")
    assert ObjectStore.fetched == []
    again = root / "volume-1.nii.gz"
    again.write_bytes(again.read_bytes())
    ObjectStore.fetched.clear()
    prepared(config, root, tmp_path / "run")
    names = ("volume-1", "segmentation-1")
    assert ObjectStore.fetched == [f"bucket/scans/{name}.nii.gz" for name in names]


def test_a_scan_is_whole_in_the_store_or_not_there(config, lits):
    config.data.store = "gs://bucket/store"
    prepared(config, lits, "gs://bucket/run")
    changed = lits / "volume-1.nii.gz"
    changed.touch()
    ObjectStore.full.add("bucket/store/scans/volume-1/mask.npy")
    with pytest.raises(UserError, match=r"gs://bucket/store/scans/volume-1: .*quota.*data\.store"):
        prepared(config, lits, "gs://bucket/run")
    assert "bucket/store/scans/volume-0/scan.json" in ObjectStore.objects
    assert "bucket/store/scans/volume-1/scan.json" not in ObjectStore.objects
    with pytest.raises(UserError, match=r"gs://bucket/store/manifest\.json: no such file"):
        SliceStore.open("gs://bucket/store")
    ObjectStore.full.clear()
    assert len(prepared(config, lits, "gs://bucket/run").records) == 4


def test_the_phantom_is_made_in_a_bucket(config):
    config.data.phantom.scans, config.data.phantom.unlabelled = 2, 0
    store = prepare.prepare(config, "gs://bucket/run")
    assert store.records["volume-1"].label.startswith("gs://bucket/run/phantom-portal-2-0-")


def layouts(lits, tmp_path):
    """A folder of each layout, and the organ it names."""
    nested = tmp_path / "nested"
    for scan in lits.iterdir():
        batch = nested / f"Training Batch {1 + ('0' in scan.name)}"
        batch.mkdir(parents=True, exist_ok=True)
        shutil.copy(scan, batch)
    phantom.write_totalsegmentator(tmp_path / "total", 2, 0)
    decathlon = tmp_path / "decathlon"
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (decathlon / part).mkdir(parents=True)
        shutil.copy(lits / "volume-0.nii.gz", decathlon / part / f"{part == 'imagesTs'}.nii.gz")
    write_json(decathlon / "dataset.json", {"labels": {"background": 0, "spleen": 1}})
    return {lits: "liver", nested: "tumour", tmp_path / "total": "spleen", decathlon: "spleen"}


def test_layouts_are_found(lits, tmp_path):
    for folder, organ in layouts(lits, tmp_path).items():
        root = upload(folder, f"gs://bucket/{folder.name}")
        here, there = find_scans(folder, organ), find_scans(str(root), organ)
        assert [scan.label is None for scan in here] == [scan.label is None for scan in there]
        for a, b in zip(here, there, strict=True):
            assert b.image.relative_to(root).parts == a.image.relative_to(folder).parts
            assert str(b.image).startswith(f"gs://bucket/{folder.name}/")
            assert (a.name, a.label_values, a.known_values) == (
                b.name, b.label_values, b.known_values
            )  # fmt: skip


def test_hdf5_slices(config, lits, tmp_path):
    pytest.importorskip("h5py")
    from convert import hdf5

    config.data.size, config.data.resize, config.data.central_fraction = 256, "paper", 0.3
    store = prepared(config, lits, "gs://bucket/run")
    assert hdf5.convert("gs://bucket/run/store", "gs://bucket/h5") == (3, 1)
    again = prepared(config, "gs://bucket/h5", "gs://bucket/again")
    for name in again.records:
        for a, b in zip(store.slices(name), again.slices(name), strict=True):
            np.testing.assert_array_equal(store.mask(a), again.mask(b))


def test_split_and_labels(config, lits, tmp_path):
    store = prepared(config, lits, "gs://bucket/run")
    split, labels = load_or_draw(config, store, "gs://bucket/run")
    keep(split, labels, store, "gs://bucket/run")
    assert kept_split("gs://bucket/run") == split
    assert training_scans(config, "gs://bucket/run").digests
    config.data.split_file = "gs://bucket/run/split.json"
    config.data.labels_file = "gs://bucket/run/labels.json"
    config.data.seed = config.data.labels_seed = 7
    assert load_or_draw(config, store, tmp_path / "other") == (split, labels)


def test_config(config):
    claim_workdir(config, "gs://bucket/run")
    assert load_config("gs://bucket/run").to_dict() == config.to_dict()
    config.seed = 3
    with pytest.raises(UserError, match=r"^gs://bucket/run/config\.json: .*seed=0 \(now 3\)"):
        check_workdir(config, "gs://bucket/run")


def test_weights(tmp_path):
    config = default_config()
    config.model.sam_weights = "gs://bucket/sam.safetensors"
    with pytest.raises(UserError, match=r"model\.sam_weights=gs://bucket/sam\.safetensors: no"):
        check_files(config)
    about = {"kind": "sam", "model": "mini", "source": "nowhere", "sha256": ""}
    write_weights("gs://bucket/sam.safetensors", {"a/kernel": np.eye(3, dtype="f4")}, about)
    check_files(config)
    arrays, metadata = read_weights("gs://bucket/sam.safetensors")
    np.testing.assert_array_equal(arrays["a/kernel"], np.eye(3))
    assert metadata["model"] == "mini"
    with pytest.raises(UserError, match=r"^gs://bucket/none\.safetensors: "):
        read_weights("gs://bucket/none.safetensors")


def test_predict(workdir, lits, tmp_path):
    config = load_config(workdir)
    config.evaluate.gate = False
    scans = tmp_path / "scans"
    scans.mkdir()
    for n in (0, 1):
        shutil.copy(lits / f"volume-{n}.nii.gz", scans)
    here = predict(config, workdir, scans, tmp_path / "masks")
    there = predict(config, workdir, str(upload(scans, "gs://bucket/scans")), "gs://bucket/masks")
    for a, b in zip(here, there, strict=True):
        assert str(b.mask) == f"gs://bucket/masks/{a.mask.name}" and a.organ_ml == b.organ_ml
        with local_copy(b.mask) as copy:
            mine, other = nib.load(a.mask), nib.load(copy)
            np.testing.assert_array_equal(np.asarray(mine.dataobj), np.asarray(other.dataobj))
        assert mine.header == other.header
        assert b.overlay.read_bytes() == a.overlay.read_bytes()
    scan = "gs://bucket/scans/volume-0.nii.gz"
    with pytest.raises(UserError, match=f"^--output={scan}: that is the scan itself"):
        predict(config, workdir, scan, scan)


def test_evaluate_a_folder_of_scans(workdir, lits, tmp_path):
    config = load_config(workdir)
    shutil.copytree(workdir, tmp_path / "run")
    config.evaluate.protocols, config.evaluate.gate = ("cam",), False
    scores = []
    for root in (str(lits), str(upload(lits, "gs://bucket/lits"))):
        config.evaluate.root = root
        scores.append(evaluate(config, tmp_path / "run").cases)
        assert load_results(config, tmp_path / "run")["evaluate"]["root"] == root
    assert scores[0] == scores[1]


def test_scans_scored_so_far():
    done = case("v-1", "cam", 0.8)
    so_far = ScoredSoFar(BUCKET / "evaluation" / "test", default_config(), "model")
    so_far.save(
        ScoredScan([done], Guidance(np.ones(2), None, None, None), example(done)), ("a", "b")
    )
    assert so_far.load("v-1", ("a", "b")).cases == [done]
    assert so_far.load("v-1", ("a", "c")) is None
    so_far.clear()
    assert so_far.load("v-1", ("a", "b")) is None


def test_results_report_and_means(tmp_path):
    config, run = default_config(), BUCKET / "runs" / "seed-0"
    write_json(run / "split.json", {"train": ["a", "b"], "val": ["c"], "test": []})
    write_json(run / "labels.json", [{"scan": "a", "slice": 1}])
    (run / "metrics.csv").write_text("step,metric,value\n1,train/loss,0.9\n")
    best = run / "checkpoints" / "best"
    (best / "40" / "commit_success.txt").write_bytes(b"")
    (best / "41" / "state").write_bytes(b"")  # still being written
    folder = run / "evaluation" / "test"
    (folder / "stale.png").write_bytes(b"of an earlier evaluation")

    made = evaluation(run, DICES, config)
    assert made.results["checkpoint_step"] == 40
    write_results(folder, made.results, made.cases)
    page = write_report(folder, made, config, run)
    assert str(page) == "gs://bucket/runs/seed-0/evaluation/test/report.html"
    assert "learning curves" not in page.read_text()
    assert {p.name for p in folder.glob("*.png")} == {f"{name}.png" for name in DICES}
    found = load_results(config, str(run))
    assert found == read_json(folder / "results.json")

    assert options.workdirs("gs://bucket/runs/seed-*") == [run]
    with pytest.raises(UserError, match=r"^--workdir=gs://bucket/none-\*: no such folder"):
        options.workdirs("gs://bucket/none-*")
    with local_copy(folder / "cases.csv") as copy:
        assert len(copy.read_text().splitlines()) == 1 + len(made.cases)
    found["digests"] = dict.fromkeys(found["scans"], "12ab")
    write_over_seeds("gs://bucket/means", over_seeds([found], [str(run)]))
    assert read_json("gs://bucket/means/summary.json")["runs"][0]["run"] == str(run)


def test_curves(monkeypatch):
    with TrainLog("gs://bucket/run", 0) as log:
        log.write(1, {"train/loss": 0.5})
        assert not ObjectStore.objects  # not at every step
        monkeypatch.setattr(train_log, "SECONDS_BETWEEN_UPLOADS", -1)
        log.write(2, {"train/loss": 0.25})
        assert read_log("gs://bucket/run") == [(1, "train/loss", 0.5), (2, "train/loss", 0.25)]
    with TrainLog("gs://bucket/run", 1) as log:
        log.write(2, {"train/loss": 0.125})
    assert read_log("gs://bucket/run") == [(1, "train/loss", 0.5), (2, "train/loss", 0.125)]
    events = list((BUCKET / "run" / "tensorboard").iterdir())
    assert events and all(path.read_bytes() for path in events)


def test_a_log_that_cannot_be_copied_ends_no_run(monkeypatch, caplog):
    monkeypatch.setattr(train_log, "SECONDS_BETWEEN_UPLOADS", -1)
    with TrainLog("gs://bucket/run", 0) as log:
        ObjectStore.full.add("bucket/run/metrics.csv")
        log.write(1, {"train/loss": 0.5})
        assert "gs://bucket/run/metrics.csv: could not be written" in caplog.text
        ObjectStore.full.clear()
        log.write(2, {"train/loss": 0.25})
    assert read_log("gs://bucket/run") == [(1, "train/loss", 0.5), (2, "train/loss", 0.25)]


def test_compiled_programs_are_taken_up_again(monkeypatch):
    """As docs/cloud.md says of JAX_COMPILATION_CACHE_DIR."""
    # JAX asks for the folder, of which gcsfs makes nothing.
    monkeypatch.setattr(ObjectStore, "makedirs", lambda *_, **__: None)

    def sevenfold(x):
        return 7 * x

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    compilation_cache.reset_cache()
    try:
        for _ in range(2):
            assert jax.jit(sevenfold)(6) == 42
            jax.clear_caches()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    (program,) = (name for name in ObjectStore.objects if "sevenfold" in name)
    assert program.startswith("bucket/compiled/") and program in ObjectStore.fetched


def test_what_is_wrong_is_named_as_the_user_wrote_it(config, lits, tmp_path):
    with pytest.raises(UserError, match=r"^data\.root=gs://bucket/none: no such folder"):
        prepared(config, "gs://bucket/none", tmp_path / "run")
    (BUCKET / "bad" / "volume-0.nii.gz").write_bytes((lits / "volume-0.nii.gz").read_bytes()[:500])
    with pytest.raises(UserError, match=r"^gs://bucket/bad/volume-0\.nii\.gz: cannot be read as"):
        prepared(config, "gs://bucket/bad", tmp_path / "run")
