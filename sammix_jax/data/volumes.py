"""Scans and masks, read into one canonical orientation and written back onto their own grid.

Canonical arrays are (D, H, W): D runs to the patient's Superior, H to Posterior and W to Left, so a
slice drawn with `imshow` is the radiological view (anterior up, the patient's right on the left).
Reorientation only permutes and flips axes: every voxel keeps its value and its place in the world.
Files are NIfTI, or the authors' HDF5 (`hdf5.py`), which know no place in the world.
"""

import dataclasses
import gzip
import logging
import pathlib
import zlib
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError

from sammix_jax.data import hdf5
from sammix_jax.data.files import local_copy, whole_file
from sammix_jax.data.paths import Path, as_path
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

CANONICAL = ("L", "P", "S")
SUFFIXES = (".nii", ".nii.gz")
# Two exports of one scan differ in the last digits of their affines; a hundredth of a millimetre is
# far below any voxel and far above rounding.
AFFINE_TOLERANCE_MM = 1e-2
# A scan without anything below this has most likely been shifted or scaled.
MOST_AIR_HU = -200
# For files without spacing and orientation: file order is canonical order, at a unit that
# `Volume.has_spacing` tells from a spacing.
UNPLACED = np.diag([-1.0, -1.0, 1.0, 1.0])
# What nibabel, gzip and NumPy raise for files that are cut short or damaged.
_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    OSError,
    EOFError,
    OverflowError,
    ValueError,
    zlib.error,
)


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
        return not _lost_spacing(self.affine, self.placed)


class Annotation(NamedTuple):
    """What a mask file tells of its scan.

    Attributes:
      organ: (D, H, W) bool, the voxels that are known to be the organ's.
      annotated: (D,) bool, the slices of which every voxel is annotated.
    """

    organ: np.ndarray
    annotated: np.ndarray


def _lost_spacing(affine: np.ndarray, placed: bool) -> bool:
    """An identity affine is what a lost one looks like; some programs leave the origin at 1, and
    without sform and qform it is made up."""
    unit = np.array_equal(np.abs(affine[:3, :3]), np.eye(3))
    return unit and (not placed or np.isin(affine[:3, 3], (0, 1)).all())


def _is_placed(image) -> bool:
    return bool(image.header["sform_code"] or image.header["qform_code"])


def is_nifti(path) -> bool:
    """Whether the file's name ends as a NIfTI file's does."""
    return pathlib.PurePath(path).name.endswith(SUFFIXES)


def stem(path) -> str:
    """The file's name without `.nii` or `.nii.gz`."""
    name = pathlib.PurePath(path).name
    return name.removesuffix(".gz").removesuffix(".nii")


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
    image, voxels = _read(path)
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
    placed = _is_placed(image)
    if not placed or _lost_spacing(image.affine, placed):
        _LOG.warning(
            "%s: %s, so its orientation is unknown and taken for %s: look at the overlay.",
            path,
            "the affine is the identity" if placed else "neither sform nor qform is set",
            "".join(nib.aff2axcodes(image.affine)),
        )
    i, j, k = (int(a) for a in _to_canonical(orientation)[:, 0].argsort())
    zooms = nib.affines.voxel_sizes(image.affine)
    return Volume(
        path=path,
        hu=_canonical(_as_int16(voxels), orientation),
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
    image, voxels = _read(path)
    shape = tuple(np.shape(voxels))
    expected = _file_shape(scan)
    if shape != expected:
        raise UserError(
            f"{path}: the mask's grid is {shape}, its scan {scan.path} has {expected}; "
            "resample the mask onto the scan's grid, or pair it with the scan it was drawn on."
        )
    shift = _largest_shift(image.affine, scan.affine, shape)
    has_spacing = not _lost_spacing(image.affine, _is_placed(image))
    if scan.has_spacing != has_spacing:
        _LOG.warning(
            "%s: the %s has no spacing (its affine is the identity or unset); the mask's voxels "
            "are taken for those of its scan %s, in the order of the file: look whether they fit.",
            path,
            "scan" if has_spacing else "mask",
            scan.path,
        )
    elif not shift <= AFFINE_TOLERANCE_MM:  # also catches NaN
        raise UserError(
            f"{path}: the mask's affine places its voxels up to {shift:.3g} mm from those of its "
            f"scan {scan.path}; resample the mask onto the scan, or copy the scan's affine into it "
            "if the voxels are known to match."
        )
    if not np.issubdtype(voxels.dtype, np.integer) and not (np.rint(voxels) == voxels).all():
        raise UserError(
            f"{path}: the mask holds values that are no whole numbers (from {voxels.min()} to "
            f"{voxels.max()}), expected label values; was it resampled with interpolation?"
        )
    ignored = _is_any(voxels, () if ignore_value is None else (ignore_value,))
    if known_values and not (known := ignored | _is_any(voxels, known_values)).all():
        raise UserError(
            f"{path}: the mask holds the values {np.unique(voxels[~known])[:5].tolist()}, expected "
            f"{known_values} with {label_values} for the organ; relabel the mask, which must be "
            "annotated throughout, or name the organ's values with label_values."
        )
    organ = _is_any(voxels, label_values)
    return Annotation(
        _canonical(organ, scan.orientation),
        ~_canonical(ignored, scan.orientation).any(axis=(1, 2)),
    )


def _is_any(voxels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """np.isin without its copies, which of a whole scan take gigabytes."""
    found = np.zeros(voxels.shape, bool, order="F")
    for value in values:
        found |= voxels == value
    return found


def organ_pixels(path, mask: np.ndarray) -> np.ndarray:
    """Organ pixels of each slice of the (D, H, W) mask that was read from `path`: (D,) int.

    At least 1 where the file itself says that the slice shows the organ: a mask that was resized
    may have lost a small one.
    """
    counted = mask.sum(axis=(1, 2))
    return np.maximum(counted, hdf5.read_image_labels(path)) if hdf5.is_hdf5(path) else counted


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
    transform = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(CANONICAL), scan.orientation
    )
    voxels = nib.apply_orientation(mask.astype(np.uint8).transpose(2, 1, 0), transform)
    voxels = np.ascontiguousarray(voxels)
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


def _read(path: Path):
    """The nibabel image and its scaled voxels in file order."""
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if not is_nifti(path):
        raise UserError(
            f"{path}: expected a NIfTI file (.nii or .nii.gz); convert DICOM with dcm2niix."
        )
    try:
        with local_copy(path) as local:
            image = nib.load(local)
            with _opened(local) as file:
                image = type(image).from_file_map({"image": FileHolder(fileobj=file)})
                voxels = np.asanyarray(image.dataobj)
                file.read()
    except _UNREADABLE as error:
        raise UserError(
            f"{path}: cannot be read as NIfTI ({error}); the file is truncated or damaged, copy or "
            "export it again."
        ) from error
    if voxels.ndim > 3 and set(voxels.shape[3:]) == {1}:
        voxels = voxels.reshape(voxels.shape[:3], order="F")  # one phase of one channel
    if voxels.ndim != 3:
        raise UserError(
            f"{path}: the image is {voxels.ndim}D with shape {voxels.shape}, expected one 3D "
            "volume; save a single phase or stack the slices into one file."
        )
    if voxels.dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels of type {voxels.dtype}, expected plain numbers (HU).")
    if 0 in voxels.shape:
        raise UserError(f"{path}: the image has shape {voxels.shape}, expected voxels.")
    affine = image.affine
    if not (
        np.isfinite(affine).all()
        and abs(np.linalg.det(affine[:3, :3])) > 1e-9
        and np.isfinite(nib.io_orientation(affine)).all()
    ):
        raise UserError(
            f"{path}: the affine {affine.tolist()} places no volume in space; mend the "
            "header's sform or qform."
        )
    return image, voxels


def _opened(path: pathlib.Path):
    """A file to be read to its end: there gzip holds what it gave against its checksum."""
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")


def _to_canonical(orientation: np.ndarray) -> np.ndarray:
    return nib.orientations.ornt_transform(orientation, nib.orientations.axcodes2ornt(CANONICAL))


def _canonical(voxels: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """File order → (D, H, W), contiguous."""
    lps = nib.apply_orientation(voxels, _to_canonical(orientation))
    return np.ascontiguousarray(lps.transpose(2, 1, 0))


def _file_shape(scan: Volume) -> tuple[int, ...]:
    w, h, d = scan.hu.shape[::-1]
    canonical = (w, h, d)
    return tuple(canonical[int(axis)] for axis in _to_canonical(scan.orientation)[:, 0])


def _largest_shift(a: np.ndarray, b: np.ndarray, shape) -> float:
    """The largest distance in mm between the two affines' places of the grid's corners."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)  # (3, 8)
    difference = (a - b)[:3]
    return float(np.linalg.norm(difference[:, :3] @ corners + difference[:, 3:], axis=0).max())
