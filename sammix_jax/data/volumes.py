"""Scans, read into one canonical orientation (`nifti.py`).

Files are NIfTI, or the authors' HDF5 (`hdf5.py`), which know no place in the world.
"""

import dataclasses
import logging

import nibabel as nib
import numpy as np

from sammix_jax.data import hdf5
from sammix_jax.data.geometry import SliceGeometry, slice_geometry
from sammix_jax.data.nifti import (
    Nifti,
    canonical_transform,
    is_placed,
    lost_spacing,
    read_nifti,
    to_canonical,
)
from sammix_jax.data.paths import Path, as_path
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# A scan without anything below this has most likely been shifted or scaled.
MOST_AIR_HU = -200
# For files without spacing and orientation: file order is canonical order, at a unit that
# `Volume.has_spacing` tells from a spacing.
UNPLACED = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Volume:
    """A scan in canonical orientation, with all that is needed to write a mask on its own grid.

    Attributes:
      path: the file it came from.
      hu: (D, H, W) int16, Hounsfield units.
      spacing: (D, H, W) voxel size in mm.
      affine: (4, 4) float64, the file's own affine (file voxel order → RAS+ mm).
      orientation: (3, 2) nibabel orientation of the file's axes.
      placed: whether the file says where its voxels lie, by a sform or a qform.
      oriented: whether it says how its axes run; a lost affine says it of none.
      already_cut: whether the file holds only the slices that its maker kept of the scan, so that
        none of them is to be left out again.
    """

    path: Path
    hu: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    orientation: np.ndarray
    placed: bool = True
    oriented: bool = True
    already_cut: bool = False

    @property
    def axcodes(self) -> str:
        """The file's own orientation, such as `"RAS"`."""
        return "".join(nib.orientations.ornt2axcodes(self.orientation))

    @property
    def file_shape(self) -> tuple[int, int, int]:
        """(I, J, K): the file's own."""
        shape = self.hu.shape[::-1]  # (D, H, W) → (W, H, D)
        i, j, k = (shape[int(axis)] for axis in canonical_transform(self.orientation)[:, 0])
        return i, j, k

    @property
    def is_sheared(self) -> bool:
        """Whether two axes meet at another than a right angle by more than 0.6° (gantry tilt)."""
        axes = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool(np.abs(axes.T @ axes - np.eye(3)).max() > 0.01)

    @property
    def has_spacing(self) -> bool:
        """Whether the file knows its spacing."""
        return not lost_spacing(self.affine, self.placed)

    def millilitres(self, mask: np.ndarray) -> float | None:
        """The volume of a mask of any of the voxels; None where the file has lost its spacing.

        Right for sheared grids (gantry tilt) too.
        """
        if not self.has_spacing:
            return None
        return float(np.count_nonzero(mask) * abs(np.linalg.det(self.affine[:3, :3])) / 1000.0)

    def geometry(self, side: int, resize: str) -> SliceGeometry:
        """How its slices lie in squares of a side, as `slice_geometry` has it."""
        return slice_geometry(self.hu.shape[1:], self.spacing[1:], side, resize)


def read_volume(path, default_orientation: str = "") -> Volume:
    """Reads a CT scan.

    Args:
      path: a NIfTI file, or the authors' HDF5.
      default_orientation: nibabel's codes of the axes of a NIfTI file that knows none; "" leaves
        them to nibabel: RAS of an identity affine, LAS without sform and qform.

    Raises:
      UserError: not a whole 3D NIfTI file, non-finite or constant voxels, or an unusable affine;
        an HDF5 file that is not as the authors'.
    """
    path = as_path(path)
    if hdf5.is_hdf5(path):
        return Volume(
            path=path,
            hu=hdf5.read_hu(path),
            spacing=(1.0, 1.0, 1.0),
            affine=UNPLACED,
            orientation=nib.io_orientation(UNPLACED),
            placed=False,
            oriented=False,
            already_cut=True,
        )
    nifti = read_nifti(path)
    hu = _hounsfield(path, nifti)
    image = nifti.image
    orientation = nib.io_orientation(image.affine)
    placed = is_placed(image)
    oriented = placed and not lost_spacing(image.affine, placed)
    if not oriented:
        if default_orientation:
            orientation = nib.orientations.axcodes2ornt(default_orientation)
        _LOG.warning(
            "%s: %s, so its orientation is unknown and taken for %s, by data.default_orientation: "
            "look at the overlay.",
            path,
            "the affine is the identity" if placed else "neither sform nor qform is set",
            "".join(nib.orientations.ornt2axcodes(orientation)),
        )
    i, j, k = (int(a) for a in canonical_transform(orientation)[:, 0].argsort())
    zooms = nib.affines.voxel_sizes(image.affine)
    return Volume(
        path=path,
        hu=to_canonical(hu, orientation),
        spacing=(float(zooms[k]), float(zooms[j]), float(zooms[i])),
        affine=image.affine,
        orientation=orientation,
        placed=placed,
        oriented=oriented,
    )


def _hounsfield(path: Path, nifti: Nifti) -> np.ndarray:
    """(I, J, K) int16, rounded; refuses what is no scan."""
    as_they_are = nifti.raw.dtype == np.int16 and not nifti.is_scaled
    hu = nifti.raw if as_they_are else np.empty(nifti.raw.shape, np.int16, order="F")
    bad, low, high = 0, np.inf, -np.inf
    for k in range(hu.shape[2]):
        plane = nifti.plane(k)
        low, high = min(low, plane.min()), max(high, plane.max())
        if plane.dtype.kind == "f" and (faulty := np.count_nonzero(~np.isfinite(plane))):
            bad += faulty
        elif not as_they_are:
            hu[..., k] = np.clip(np.rint(plane), -32768, 32767)
    if bad:
        raise UserError(
            f"{path}: {bad} of {hu.size} voxels are NaN or infinite, expected Hounsfield units "
            "everywhere; fill them (air is -1000) or export the scan again."
        )
    if low == high:
        raise UserError(
            f"{path}: every voxel is {low}, expected a CT scan; the export is empty or broken."
        )
    if low > MOST_AIR_HU:
        _LOG.warning(
            "%s: the lowest value is %g, where CT has air near -1000; are these Hounsfield units?",
            path,
            low,
        )
    return hu
