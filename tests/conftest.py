"""Shared fixtures. Compiled programs are kept between runs; set before JAX is imported."""

import gc
import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
    # Accelerators round the factors of float32 products; what is expected here is whole float32.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
# All of them: the many small ones that files share take a tenth of the tests' time.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Where tests compile without optimisations, the older of XLA's two emitters of CPU code takes 0.6
# of the time; jaxlib 0.11 has the newer one alone.
jaxlib = importlib.metadata.version("jaxlib")
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1" and jaxlib.startswith("0.10."):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
# epath prefers TensorFlow where there is one; tests/object_store.py stands in for gcsfs.
os.environ["EPATH_USE_TF"] = "false"

import jax
import nibabel as nib
import numpy as np
import pytest
from sam_cases import TINY
from toy import Toy

from sammix_jax.models.sam.variants import VARIANTS

VARIANTS["tiny"] = TINY  # before the config's rules read which there are

from configs import quickstart
from sammix_jax import prepare, train
from sammix_jax.systems.sam_mix import SamMixSystem

# Python's collector would go through the libraries' objects again and again while JAX traces.
gc.freeze()
gc.set_threshold(100_000, 50, 50)

# A real CT, where it is at hand.
SAMPLE = ROOT.parent / "shared" / "data" / "totalsegmentator_sample"


# Files that take minutes begin first, so that the workers end together.
LONG = (
    *("test_sharding", "test_train", "test_run", "test_killed", "test_main", "test_evaluate"),
    *("test_sam_mix_fields", "test_shipped_weights", "test_real_ct"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="module")
def fresh_programs():
    """Compiled programs are let go after each file: those of all files are more than ten GB."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def sample():
    """Folder of the real CT, in TotalSegmentator's layout."""
    if not SAMPLE.is_dir():
        pytest.skip(f"the real CT sample is not at {SAMPLE}")
    return SAMPLE


def small_config():
    """The quickstart in a size that trains in seconds, with the smallest SAM there is."""
    config = quickstart.get_config("random")
    config.data.size = 64
    config.data.phantom.scans = 5
    config.data.phantom.unlabelled = 1
    config.data.split = (2, 1, 1)
    config.data.labelled_slices = 12
    config.model.sam, config.model.image_size = "tiny", 64
    config.train.steps = 30
    config.train.learning_rate = 0.01
    config.train.batch_labelled = 4
    config.train.batch_unlabelled = 2
    config.train.warmup_steps = 3
    config.log.every_steps = 5
    config.log.validate_every_steps = 15
    config.checkpoint.every_steps = 10
    config.loss.bce = 0.0  # Dice alone finds the organ sooner
    return config


@pytest.fixture
def config():
    return small_config()


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A workdir trained on a few phantoms: whole, though no good."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config()
    train.train(config, folder, prepare.prepare(config, folder))
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """The phantoms of `small_config`, which take seconds to paint: their folder, and a store."""
    folder = tmp_path_factory.mktemp("phantoms")
    prepare.prepare(small_config(), folder)
    (scans,) = folder.glob("phantom-*")
    return scans, folder / "store"


@pytest.fixture
def write_scan(tmp_path):
    """Writes a NIfTI: `write_scan(name, voxels, affine=...)` → its path."""

    def write(name, voxels, affine=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(
            nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 5.0, 1.0]) if affine is None else affine),
            path,
        )
        return path

    return write


@pytest.fixture
def write_hdf5(tmp_path):
    """Writes a scan as the authors do: six slices, of which the last four are said to show the
    organ; without masks. `write_hdf5(name)` → its path."""
    h5py = pytest.importorskip("h5py")

    def write(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for n in range(6):
                group = file.create_group(f"Slice{n}")
                hu = np.full((256, 256), 40 * n - 100, np.float16)
                group["Slice"] = (hu + np.float16(3055)) / np.float16(8866)
                group["Segmentation"] = np.zeros((256, 256), np.float16)
                group.attrs["ImageLabel"] = int(n > 1)
        return path

    return write


@pytest.fixture
def toy_config(config, phantoms, monkeypatch):
    """A config whose model is compiled in a moment, on slices that are prepared."""
    monkeypatch.setattr(train, "make_system", lambda c: SamMixSystem(Toy(), c))
    config.data.root, config.data.store = map(str, phantoms)
    config.data.split = (3, 0, 1)
    config.train.steps, config.train.augment = 12, False
    config.checkpoint.every_steps = 4
    config.log.every_steps = 100
    return config


@pytest.fixture
def lits(tmp_path):
    """Three scans in LiTS's layout, RAS, the last one unlabelled; the organ on slices 2 and 3."""
    root, affine = tmp_path / "scans", np.diag([3.0, 3.0, 5.0, 1.0])
    root.mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        hu = rng.normal(0, 50, (40, 30, 6)).astype(np.int16)
        mask = np.zeros(hu.shape, np.uint8)
        mask[5:20, 10:20, 2:4] = 1
        mask[8:10, 12:14, 3] = 2
        nib.save(nib.Nifti1Image(hu, affine), root / f"volume-{n}.nii.gz")
        if n < 2:
            nib.save(nib.Nifti1Image(mask, affine), root / f"segmentation-{n}.nii.gz")
    return root


@pytest.fixture
def ct():
    """(20, 16, 6) int16: noise about soft tissue, no two axes alike."""
    return np.random.default_rng(0).normal(40, 60, (20, 16, 6)).astype(np.int16)
