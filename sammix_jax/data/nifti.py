"""NIfTI files, whole or refused, and the one orientation into which their voxels are brought.

Canonical arrays are (D, H, W): D runs to the patient's Superior, H to Posterior and W to Left, so a
slice drawn with `imshow` is the radiological view (anterior up, the patient's right on the left).
Reorientation only permutes and flips axes: every voxel keeps its value and its place in the world.
"""

import dataclasses
import gzip
import pathlib
import zlib

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError

from sammix_jax.data.files import local_copy
from sammix_jax.data.paths import Path
from sammix_jax.errors import UserError

CANONICAL = ("L", "P", "S")
SUFFIXES = (".nii", ".nii.gz")
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
class Nifti:
    """A NIfTI file's image and voxels.

    As floats a rescaled scan takes four times its file's memory, so values are had by planes.

    Attributes:
      image: nibabel's, for header and affine.
      raw: (I, J, K), as the file holds them.
      slope, inter: a voxel's value is slope * raw + inter.
    """

    image: nib.spatialimages.SpatialImage
    raw: np.ndarray
    slope: float
    inter: float

    @property
    def is_scaled(self) -> bool:
        return (self.slope, self.inter) != (1, 0)

    def plane(self, k: int) -> np.ndarray:
        """(I, J) values of one plane: the file's own numbers, or floats where they are scaled."""
        plane = self.raw[..., k]
        return plane * self.slope + self.inter if self.is_scaled else plane

    def values(self) -> np.ndarray:
        """(I, J, K), of all planes."""
        if not self.is_scaled:
            return self.raw
        return np.stack([self.plane(k) for k in range(self.raw.shape[2])], axis=-1)


def is_nifti(path) -> bool:
    """Whether the file's name ends as a NIfTI file's does."""
    return pathlib.PurePath(path).name.endswith(SUFFIXES)


def stem(path) -> str:
    """The file's name without `.nii` or `.nii.gz`."""
    name = pathlib.PurePath(path).name
    return name.removesuffix(".gz").removesuffix(".nii")


def read_nifti(path: Path) -> Nifti:
    """Reads one 3D image.

    Raises:
      UserError: no whole file of one 3D image of plain numbers, or an affine that places none.
    """
    if not is_nifti(path):
        raise UserError(
            f"{path}: expected a NIfTI file (.nii or .nii.gz, in small letters); convert DICOM "
            "with dcm2niix."
        )
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file.")
        with local_copy(path) as local, _opened(local) as file:
            image = nib.load(local)
            image = type(image).from_file_map({"image": FileHolder(fileobj=file)})
            voxels = np.asanyarray(image.dataobj.get_unscaled())
            file.read()
    except PermissionError as error:
        raise UserError(
            f"{path}: cannot be opened ({error.strerror}); you lack the right to read it."
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{path}: its voxels do not fit in memory, by its header {image.shape}; where it is "
            "no such large scan the header is damaged: copy or export the file again."
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, expected a file; give the one in it.") from error
    except _UNREADABLE as error:
        zipped = isinstance(error, gzip.BadGzipFile)
        raise UserError(
            f"{path}: cannot be read as NIfTI ({error}); the file is truncated or damaged, copy or "
            f"export it again{', or it is not compressed: rename it to .nii' * zipped}."
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
    return Nifti(image, voxels, float(image.dataobj.slope), float(image.dataobj.inter))


def _opened(path: pathlib.Path):
    """A file to be read to its end: there gzip holds what it gave against its checksum."""
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")


def lost_spacing(affine: np.ndarray, placed: bool) -> bool:
    """Whether the file no longer knows its spacing.

    An identity affine is what a lost one looks like; some programs leave the origin at 1, and
    without sform and qform it is made up.

    Args:
      affine: (4, 4), as nibabel gives it.
      placed: `is_placed` of the image.
    """
    unit = np.array_equal(np.abs(affine[:3, :3]), np.eye(3))
    return unit and (not placed or np.isin(affine[:3, 3], (0, 1)).all())


def is_placed(image) -> bool:
    """Whether the nibabel image says where its voxels lie, by a sform or a qform."""
    return bool(image.header["sform_code"] or image.header["qform_code"])


def canonical_transform(orientation: np.ndarray) -> np.ndarray:
    """From a file's nibabel orientation, (3, 2), to the axes (L, P, S), as nibabel's transforms."""
    return nib.orientations.ornt_transform(orientation, nib.orientations.axcodes2ornt(CANONICAL))


def to_canonical(voxels: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """(I, J, K) in the order of the file → (D, H, W), contiguous."""
    lps = nib.apply_orientation(voxels, canonical_transform(orientation))
    return np.ascontiguousarray(lps.transpose(2, 1, 0))
