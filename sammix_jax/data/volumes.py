"""Scans, read into one canonical orientation (`nifti.py`).

Files are NIfTI, or the authors' HDF5 (`hdf5.py`), which know no place in the world.
"""

import dataclasses
import logging

import nibabel as nib
import numpy as np

from sammix_jax.data import hdf5
from sammix_jax.data.nifti import (
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
      already_cut: whether the file holds only the slices that its maker kept of the scan, so that
        none of them is to be left out again.
    """

    path: Path
    hu: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    orientation: np.ndarray
    placed: bool = True
    already_cut: bool = False

    @property
    def axcodes(self) -> str:
        """The file's own orientation, such as `"RAS"`."""
        return "".join(nib.orientations.ornt2axcodes(self.orientation))

    @property
    def voxel_ml(self) -> float:
        """The volume of one voxel in millilitres; right for sheared grids (gantry tilt) too."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def has_spacing(self) -> bool:
        """Whether the file knows its spacing."""
        return not lost_spacing(self.affine, self.placed)


def read_volume(path) -> Volume:
    """Reads a CT scan.

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
            already_cut=True,
        )
    image, voxels = read_nifti(path)
    if not np.issubdtype(voxels.dtype, np.integer) and not np.isfinite(voxels).all():
        bad = int(np.size(voxels) - np.isfinite(voxels).sum())
        raise UserError(
            f"{path}: {bad} of {voxels.size} voxels are NaN or infinite, expected Hounsfield units "
            "everywhere; fill them (air is -1000) or export the scan again."
        )
    low, high = voxels.min(), voxels.max()
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
    orientation = nib.io_orientation(image.affine)
    placed = is_placed(image)
    if not placed or lost_spacing(image.affine, placed):
        _LOG.warning(
            "%s: %s, so its orientation is unknown and taken for %s: look at the overlay.",
            path,
            "the affine is the identity" if placed else "neither sform nor qform is set",
            "".join(nib.aff2axcodes(image.affine)),
        )
    i, j, k = (int(a) for a in canonical_transform(orientation)[:, 0].argsort())
    zooms = nib.affines.voxel_sizes(image.affine)
    return Volume(
        path=path,
        hu=to_canonical(_as_int16(voxels), orientation),
        spacing=(float(zooms[k]), float(zooms[j]), float(zooms[i])),
        affine=image.affine,
        orientation=orientation,
        placed=placed,
    )


def _as_int16(voxels: np.ndarray) -> np.ndarray:
    """Slice by slice, for scaled voxels are float64, four times what is kept of them."""
    if voxels.dtype == np.int16:
        return voxels
    rounded = np.empty(voxels.shape, np.int16, order="F")
    for k in range(voxels.shape[2]):
        rounded[..., k] = np.clip(np.rint(voxels[..., k]), -32768, 32767)
    return rounded
