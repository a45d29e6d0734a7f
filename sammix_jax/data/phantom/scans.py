"""Procedurally generated abdominal CT, written in the layouts of LiTS and TotalSegmentator.

The embedded data set: deterministic, free of any patient data, yet with organs that share the
liver's HU range, so that a network has to learn shape and place.  Two domains differ in contrast
phase, noise, sampling, field of view and file orientation.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel import orientations
from scipy import ndimage
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.data.files import whole_file
from sammix_jax.data.paths import Path, as_path
from sammix_jax.data.phantom.anatomy import ORGANS, paint_abdomen
from sammix_jax.data.phantom.body import TOP, Build

LIVER, TUMOUR = 1, 2  # LiTS label values

# tissue -> (mean, half range between patients, sd of the texture inside the organ), HU
_COMMON_HU = {
    "table": (-650, 60, 20), "gas": (-960, 20, 5), "skin": (10, 15, 5), "fat": (-102, 7, 7),
    "lung": (-830, 35, 30), "cortex": (480, 90, 60), "marrow": (145, 40, 35),
    "disc": (90, 15, 6), "cartilage": (105, 15, 12), "canal": (28, 6, 5), "fluid": (14, 8, 4),
    "contrast": (210, 90, 35), "stool": (25, 25, 55),
    "gallbladder": (9, 7, 2),
}  # fmt: skip
_PORTAL_HU = _COMMON_HU | {
    "liver": (100, 15, 5), "vessel": (158, 12, 3), "tumour": (62, 14, 6),
    "tumour_dark": (40, 10, 5), "tumour_bright": (135, 10, 8), "necrosis": (28, 6, 4),
    "spleen": (112, 15, 4), "muscle": (64, 8, 10), "pancreas": (92, 14, 8),
    "kidney_cortex": (182, 14, 6), "kidney_medulla": (158, 12, 6), "aorta": (150, 14, 3),
    "cava": (142, 14, 4), "blood": (142, 15, 4), "myocardium": (105, 12, 5),
    "stomach_wall": (88, 14, 8), "bowel_wall": (95, 18, 10), "chyme": (75, 30, 18),
}  # fmt: skip
_UNENHANCED_HU = _COMMON_HU | {
    "liver": (55, 8, 4), "vessel": (42, 4, 2), "tumour": (36, 6, 4),
    "tumour_dark": (22, 8, 3), "tumour_bright": (62, 5, 4), "necrosis": (16, 5, 3),
    "spleen": (48, 6, 3), "muscle": (52, 7, 7), "pancreas": (41, 7, 6),
    "kidney_cortex": (33, 4, 2), "kidney_medulla": (30, 4, 2), "aorta": (41, 5, 2),
    "cava": (40, 5, 2), "blood": (41, 5, 2), "myocardium": (46, 5, 3),
    "stomach_wall": (40, 6, 5), "bowel_wall": (40, 7, 6), "chyme": (42, 18, 12),
}  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """How one hospital scans: contrast phase, noise and sampling.  Pairs are uniform ranges."""

    name: str
    hu: Mapping[str, tuple[float, float, float]]  # tissue -> mean, half range, texture sd in HU
    noise: tuple[float, float]  # sd of the noise in HU
    pixel: tuple[float, float]  # in-plane voxel spacing in mm
    slice_spacing: tuple[float, float]  # mm
    slices: tuple[int, int]  # least and most slices in a volume
    fov: tuple[float, float]  # field of view, as a multiple of the width of the body
    aspect: tuple[float, float]  # depth of the field of view over its width
    orientations: tuple[str, ...]  # of the file's axes, as nibabel's axis codes


PORTAL = Domain(
    name="portal", hu=_PORTAL_HU, noise=(20, 30), pixel=(2.5, 2.9), slice_spacing=(4.8, 6.0),
    slices=(32, 56), fov=(1.08, 1.2), aspect=(1.0, 1.0), orientations=("RAS", "LPS", "LAS"),
)  # fmt: skip
UNENHANCED = Domain(
    name="unenhanced", hu=_UNENHANCED_HU, noise=(18, 28), pixel=(2.7, 3.2),
    slice_spacing=(3.0, 5.0), slices=(48, 90), fov=(0.88, 0.98), aspect=(0.72, 0.85),
    orientations=("RAS", "ASR", "LPI", "PIR"),
)  # fmt: skip
DOMAINS = {domain.name: domain for domain in (PORTAL, UNENHANCED)}


@dataclass(frozen=True)
class Phantom:
    """One scan; all arrays share one shape, in the axis order of the file."""

    image: np.ndarray  # int16, HU
    labels: dict[str, np.ndarray]  # organ -> uint8 mask; 'liver' holds its vessels and tumours
    affine: np.ndarray  # (4, 4) float64, voxel index -> RAS+ mm


def make_patient(seed: int | Sequence[int], domain: Domain = PORTAL) -> Phantom:
    """Generate the patient of `seed` (one or several non-negative integers) in `domain`.

    The anatomy depends on the domain as well, so equal seeds do not leak a patient from one
    domain into the other.
    """
    rng = np.random.default_rng([*np.atleast_1d(seed), *domain.name.encode()])
    build = Build.draw(rng)
    axes, spacing = _grid(rng, build, domain)
    hu = {
        tissue: (np.float32(mean + half * rng.uniform(-1, 1)), np.float32(texture))
        for tissue, (mean, half, texture) in domain.hu.items()
    }
    canvas = paint_abdomen(rng, build, axes, hu, softness=spacing[0])
    image = _acquire(rng, canvas.image, rng.uniform(*domain.noise))
    masks = {organ: canvas.organ == code for code, organ in enumerate(ORGANS)}
    masks["liver"] |= masks["tumour"]

    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # LPS index -> RAS+ mm
    affine[:3, 3] = -axes[0][0], -axes[1][0], axes[2][0]
    affine[:3, 3] += rng.uniform(-60, 60, 3)  # the scanner's origin is not the patient's
    code = domain.orientations[rng.integers(len(domain.orientations))]
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(code)
    )

    def oriented(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(orientations.apply_orientation(array, turn))

    return Phantom(
        oriented(image),
        {organ: oriented(mask.astype(np.uint8)) for organ, mask in masks.items()},
        affine @ orientations.inv_ornt_aff(turn, image.shape),
    )


def _grid(rng, build: Build, domain: Domain):
    """World LPS axes in mm of the sampling grid, and their spacing."""
    pixel, thick = rng.uniform(*domain.pixel), rng.uniform(*domain.slice_spacing)
    width = 2 * build.width * build.scale * rng.uniform(*domain.fov)
    nx, ny = round(width / pixel), round(width * rng.uniform(*domain.aspect) / pixel)
    # Some slices above the liver and more below, so that about half of them show it.
    share = rng.uniform(0.43, 0.53)
    height = (TOP - build.tip) * build.scale
    nz = int(np.clip(round(height / share / thick), *domain.slices))
    below = (nz * thick - height) * rng.uniform(0.5, 0.7)
    spacing = np.array((pixel, pixel, thick))
    start = -0.5 * spacing * (nx - 1, ny - 1, 0)
    start += (*rng.uniform(-6, 6, 2), build.tip * build.scale - below)
    axes = [s + d * np.arange(n) for s, d, n in zip(start, spacing, (nx, ny, nz), strict=True)]
    return axes, spacing


def _acquire(rng, image: np.ndarray, noise: float) -> np.ndarray:
    """What the scanner adds: slice thickness, point spread and correlated noise; int16 HU."""
    image = ndimage.gaussian_filter(image, (0.45, 0.45, 0.4))
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(grain, (0.6, 0.6, 0.3), truncate=3)
    # Fewest photons cross the middle of the body, so it is noisiest there; air is quiet.
    dose = ndimage.gaussian_filter(np.float32(image > -500), (12, 12, 0), truncate=2)
    image += grain * (noise / grain.std()) * (0.25 + 0.75 * dose)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def write_lits(
    root: str | os.PathLike, n: int, seed: int, domain: Domain = PORTAL, unlabelled: int = 0
) -> list[Path]:
    """Write `n` scans as volume-N.nii.gz and segmentation-N.nii.gz below `root`.

    Segmentations are uint8: 0 background, 1 liver, 2 tumour.  The last `unlabelled` volumes get
    none.  Files that are there already are kept.  Returns the paths of the volumes.
    """
    root = as_path(root)

    def files(index: int) -> dict[Path, Callable[[Phantom], np.ndarray]]:
        volume = {root / f"volume-{index}.nii.gz": lambda p: p.image}
        if index >= n - unlabelled:
            return volume
        return volume | {
            root / f"segmentation-{index}.nii.gz": lambda p: np.where(
                p.labels["tumour"], np.uint8(TUMOUR), p.labels["liver"] * np.uint8(LIVER)
            )
        }

    return _write(files, n, seed, domain)


def write_totalsegmentator(
    root: str | os.PathLike, n: int, seed: int, domain: Domain = UNENHANCED
) -> list[Path]:
    """Write `n` scans as sNNNN/ct.nii.gz with binary uint8 masks in sNNNN/segmentations/.

    The liver mask holds the tumours and leaves out the gallbladder.  Files that are there
    already are kept.  Returns the paths of the scans.
    """
    root = as_path(root)

    def files(index: int) -> dict[Path, Callable[[Phantom], np.ndarray]]:
        case = root / f"s{index:04d}"
        masks = {
            case / "segmentations" / f"{organ}.nii.gz": lambda p, organ=organ: p.labels[organ]
            for organ in ("liver", "spleen", "kidney_left", "kidney_right")
        }
        return {case / "ct.nii.gz": lambda p: p.image} | masks

    return _write(files, n, seed, domain)


def _write(files: Callable[[int], Mapping], n: int, seed: int, domain: Domain) -> list[Path]:
    def patient(index: int) -> Path:
        wanted = files(index)
        missing = [path for path in wanted if not path.exists()]
        if missing:
            phantom = make_patient((seed, index), domain)
            for path in missing:
                _save(path, wanted[path](phantom), phantom.affine)
        return next(iter(wanted))

    def progress() -> Iterator[Path]:
        with ThreadPoolExecutor(hosts.usable_cores()) as pool:
            made = pool.map(patient, range(n))
            yield from tqdm(made, total=n, desc="phantom", unit="scan", disable=None)

    return list(progress())


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with whole_file(path) as partial:
        nib.save(image, partial)
