"""Masks of scans, in the scans' canonical orientation, and written back onto their own grid."""

import logging
from typing import NamedTuple

import nibabel as nib
import numpy as np

from sammix_jax.data import hdf5
from sammix_jax.data.files import local_copy, whole_file
from sammix_jax.data.nifti import (
    CANONICAL,
    is_nifti,
    is_placed,
    lost_spacing,
    read_nifti,
    to_canonical,
)
from sammix_jax.data.paths import Path, as_path
from sammix_jax.data.volumes import Volume
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# Of the smallest side of a voxel. Exports of one scan differ in the last digits of their affines,
# and by a tenth of a millimetre where one tells a tilted grid by a float32 quaternion; where one
# takes a voxel's corner for its centre, by half a voxel.
AFFINE_TOLERANCE = 0.25


class Annotation(NamedTuple):
    """What a mask file tells of its scan.

    Attributes:
      organ: (D, H, W) bool, the voxels that are known to be the organ's.
      annotated: (D,) bool, the slices of which every voxel is annotated.
    """

    organ: np.ndarray
    annotated: np.ndarray


def read_mask(
    path, scan: Volume, label_values: tuple[int, ...], known_values: tuple[int, ...] = ()
) -> np.ndarray:
    """Reads the mask that belongs to `scan`: (D, H, W) bool, true where the label is in the values.

    Args:
      path: the label file.
      scan: the scan it was drawn on.
      label_values: count as the organ.
      known_values: all that the file may hold; () for any.

    Raises:
      UserError: unreadable, labels that are no integers, or a grid or affine other than the scan's.
    """
    return read_annotation(path, scan, label_values, known_values).organ


def read_annotation(
    path,
    scan: Volume,
    label_values: tuple[int, ...],
    known_values: tuple[int, ...] = (),
    ignore_value: int | None = None,
) -> Annotation:
    """Reads the mask that belongs to `scan`, of which parts may not be annotated.

    Args, Raises: as `read_mask`, and
      ignore_value: of the voxels that nobody annotated; None where there are none.
    """
    path = as_path(path)
    if hdf5.is_hdf5(path):  # scan and mask share the file, which knows its labels
        organ = hdf5.read_mask(path)
        return Annotation(organ, np.ones(len(organ), bool))
    nifti = read_nifti(path)
    image, voxels = nifti.image, nifti.values()
    shape = voxels.shape
    expected = scan.file_shape
    if shape != expected:
        raise UserError(
            f"{path}: the mask's grid is {shape}, its scan {scan.path} has {expected}; "
            "resample the mask onto the scan's grid, or pair it with the scan it was drawn on."
        )
    shift = _largest_shift(image.affine, scan.affine, shape)
    tolerance = AFFINE_TOLERANCE * min(scan.spacing)
    has_spacing = not lost_spacing(image.affine, is_placed(image))
    if not (scan.has_spacing and has_spacing):
        if shift > tolerance:
            without = "mask" if scan.has_spacing else "scan" if has_spacing else "scan and mask"
            _LOG.warning(
                "%s: no spacing (an affine that is the identity or unset) in the file of the %s; "
                "the mask's voxels are taken for those of its scan %s, in the order of the file: "
                "look whether they fit.",
                path,
                without,
                scan.path,
            )
    elif not shift <= tolerance:  # also catches NaN
        raise UserError(
            f"{path}: the mask's affine places its voxels up to {shift:.3g} mm from those of its "
            f"scan {scan.path}; resample the mask onto the scan, or copy the scan's affine into it "
            "if the voxels are known to match."
        )
    voxels = _whole(voxels, nifti.slope if nifti.is_scaled else 0.0, path)
    ignored = _is_any(voxels, () if ignore_value is None else (ignore_value,))
    if known_values and not (known := ignored | _is_any(voxels, known_values)).all():
        raise UserError(
            f"{path}: the mask holds the values {np.unique(voxels[~known])[:5].tolist()}, expected "
            f"{known_values} with {label_values} for the organ; relabel the mask, or name all of "
            "the organ's values with label_values, as in --config.data.label_values='(1, 255)', "
            "and the one of voxels that nobody annotated with ignore_value."
        )
    organ = _is_any(voxels, label_values)
    return Annotation(
        to_canonical(organ, scan.orientation),
        ~to_canonical(ignored, scan.orientation).any(axis=(1, 2)),
    )


def _whole(voxels: np.ndarray, slope: float, path: Path) -> np.ndarray:
    """Labels as whole numbers, though a header scales them.

    nibabel scales what is saved as floats under the header of an integer file, the common way to
    edit one: labels of 0 to 2 come back as multiples of 2 / 255, each next to its whole number.

    Args:
      voxels: as the file gives them.
      slope: by which its header scales them; 0 where it does not.
      path: for the message.
    """
    if np.issubdtype(voxels.dtype, np.integer):
        return voxels
    whole = np.rint(voxels)
    # Half a step of the scaled numbers, and what float32 rounds; a step of 1 tells no labels apart.
    tolerance = slope / 2 + 1e-3 if 0 < slope < 1 else 0.0
    if not (np.abs(voxels - whole) <= tolerance).all():
        scaled = f", by a header that scales them by {slope:.6g}" if slope else ""
        raise UserError(
            f"{path}: the mask holds values that are no whole numbers (from {voxels.min()} to "
            f"{voxels.max()}{scaled}), expected label values; was it resampled with interpolation?"
        )
    return whole


def _is_any(voxels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """np.isin without its copies, which of a whole scan take gigabytes."""
    found = np.zeros(voxels.shape, bool, order="F")
    for value in values:
        found |= voxels == value
    return found


def count_organ_pixels(path, mask: np.ndarray) -> np.ndarray:
    """Organ pixels of each slice of the (D, H, W) mask that was read from `path`: (D,) int.

    At least 1 where the file itself says that the slice shows the organ: a mask that was resized
    may have lost a small one.
    """
    counted = mask.sum(axis=(1, 2))
    return np.maximum(counted, hdf5.read_image_labels(path)) if hdf5.is_hdf5(path) else counted


def file_voxels(mask: np.ndarray, scan: Volume) -> np.ndarray:
    """A (D, H, W) mask as (I, J, K) uint8, in the order of the scan's own file."""
    transform = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(CANONICAL), scan.orientation
    )
    voxels = nib.apply_orientation(mask.astype(np.uint8).transpose(2, 1, 0), transform)
    return np.ascontiguousarray(voxels)


def write_mask(path, mask: np.ndarray, scan: Volume) -> None:
    """Writes a (D, H, W) mask as uint8 on the scan's own grid.

    Shape, affine, sform and qform with their codes, zooms and units are the scan's; for an HDF5
    scan, the order of its slices at unit spacing. The file appears whole or not at all.

    Raises:
      UserError: the name is not a NIfTI name, or the file cannot be written.
    """
    path = as_path(path)
    if not is_nifti(path):
        raise UserError(f"{path}: a mask is written as .nii or .nii.gz; give such a name.")
    voxels = file_voxels(mask, scan)
    if hdf5.is_hdf5(scan.path):
        image = nib.Nifti1Image(voxels, scan.affine)
    else:
        with local_copy(scan.path) as local:
            source = nib.load(local)
        header = source.header.copy()
        header.set_data_dtype(np.uint8)
        header.set_slope_inter(1, 0)
        header["cal_max"], header["cal_min"] = 1, 0
        # affine=None leaves sform, qform and both codes as the scan's header has them.
        image = type(source)(voxels, None, header)
    with whole_file(path) as partial:
        nib.save(image, partial)


def _largest_shift(a: np.ndarray, b: np.ndarray, shape) -> float:
    """The largest distance in mm between the two affines' places of the grid's corners."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)  # (3, 8)
    difference = (a - b)[:3]
    return float(np.linalg.norm(difference[:, :3] @ corners + difference[:, 3:], axis=0).max())
