"""The authors' preprocessed files: HDF5, with slices that are cut out, resized and scaled already.

One file a scan, in it a group `Slice{i}` for each slice with
    Slice         (256, 256) float16, (x + 3055) / 8866 of the HU x clipped to [-160, 240] (S)
    Segmentation  (256, 256) of 0 and 1; 2, a lesion, lies in the organ (S)
    ImageLabel    attribute: whether the slice shows the organ, told before resizing (S)

Not stated, and taken so: a file holds one scan, and the attribute sits on the group (G). It is read
from either dataset too. The files keep the central slices alone, neither spacing nor orientation;
slices are taken as they lie. `python -m convert.hdf5` writes such files.
"""

import contextlib
import pathlib
import re

import numpy as np

from sammix_jax.data import paper
from sammix_jax.data.files import local_copy
from sammix_jax.data.paths import as_path
from sammix_jax.errors import UserError

SUFFIXES = (".h5", ".hdf5")
SHAPE = (paper.SIZE, paper.SIZE)
IMAGE, MASK, IMAGE_LABEL = "Slice", "Segmentation", "ImageLabel"


def is_hdf5(path) -> bool:
    """Whether the file's name ends as an HDF5 file's does."""
    return pathlib.PurePath(path).suffix in SUFFIXES


def group_name(index: int) -> str:
    """The group of a slice."""
    return f"Slice{index}"


def import_h5py(path):
    """h5py, which only these files need.

    Raises:
      UserError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f"{path}: an HDF5 file needs h5py: pip install -r requirements/hdf5.txt."
        ) from error
    return h5py


def read_hu(path) -> np.ndarray:
    """The slices in the order of their numbers: (D, 256, 256) int16 HU in [-160, 240].

    Several HU share a float16, so these need not be the scan's own; they scale to the same bits.

    Raises:
      UserError: no such file, or slices that the authors' arithmetic does not make.
    """
    with _slices(path) as groups:
        return np.stack([_hu(path, group) for group in groups])


def read_mask(path) -> np.ndarray:
    """The masks in the order of `read_hu`: (D, 256, 256) bool.

    Raises:
      UserError: as `read_hu`; other labels than 0, 1, 2; a mask on a slice that is labelled 0.
    """
    with _slices(path) as groups:
        return np.stack([_mask(path, group) for group in groups])


def read_image_labels(path) -> np.ndarray:
    """Whether each slice shows the organ, in the order of `read_hu`: (D,) bool.

    Raises:
      UserError: as `read_hu`; no such attribute, or another value than 0 and 1.
    """
    with _slices(path) as groups:
        return np.array([_image_label(path, group) for group in groups])


@contextlib.contextmanager
def _slices(path):
    """The groups of an open file, in the order of their numbers."""
    path = as_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    h5py = import_h5py(path)
    try:
        with local_copy(path) as local, h5py.File(local, "r") as file:
            numbered = {int(n[1]): key for key in file if (n := re.fullmatch(r"Slice(\d+)", key))}
            if not numbered:
                raise UserError(
                    f"{path}: holds {sorted(file)[:5] or 'nothing'}, expected groups Slice0, "
                    "Slice1, …: one file a scan; split the file, or convert the scans anew."
                )
            yield [file[numbered[number]] for number in sorted(numbered)]
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises for damaged files
        raise UserError(
            f"{path}: cannot be read as HDF5 ({error}); the file is truncated or damaged, copy or "
            "make it again."
        ) from error


def _dataset(path, group, name: str) -> np.ndarray:
    try:
        found = group[name]
    except (KeyError, ValueError) as error:  # a ValueError where the group is a dataset itself
        raise UserError(
            f"{path}: {group.name} has no {name}, expected a group with the datasets {IMAGE} and "
            f"{MASK}; make the file again."
        ) from error
    shape = getattr(found, "shape", None)
    if shape != SHAPE or found.dtype.kind not in "biuf":
        what = "a group" if shape is None else f"{shape} {found.dtype}"
        raise UserError(f"{path}: {found.name} is {what}, expected {SHAPE} numbers.")
    return found[()]


def _hu(path, group) -> np.ndarray:
    scaled = _dataset(path, group, IMAGE)
    advice = (
        "expected the authors' (x + 3055) / 8866 of HU in [-160, 240] as float16; take the NIfTI "
        "scans where the slices were scaled otherwise"
    )
    if scaled.dtype != np.float16:
        raise UserError(f"{path}: {group.name}/{IMAGE} is {scaled.dtype}, {advice}.")
    try:
        return paper.unscale(scaled)
    except ValueError as error:
        raise UserError(
            f"{path}: {group.name}/{IMAGE} holds values that no HU gives (from {scaled.min():.4g} "
            f"to {scaled.max():.4g}), {advice}."
        ) from error


def _mask(path, group) -> np.ndarray:
    labels = _dataset(path, group, MASK)
    if not (known := np.isin(labels, (0, 1, 2))).all():
        raise UserError(
            f"{path}: {group.name}/{MASK} holds {np.unique(labels[~known])[:5].tolist()}, expected "
            "0, 1 (the organ) and 2 (a lesion in it); relabel the masks."
        )
    mask = labels > 0
    if mask.any() and not _image_label(path, group):
        raise UserError(
            f"{path}: {group.name} has {IMAGE_LABEL} 0 and a mask of {mask.sum()} pixels, expected "
            "1 wherever the mask shows the organ; one of them belongs to another slice."
        )
    return mask


def _image_label(path, group) -> bool:
    holders = [group, *(group[name] for name in (IMAGE, MASK) if name in group)]
    attributes = [holder.attrs for holder in holders]
    stated = [np.ravel(a[IMAGE_LABEL]).tolist() for a in attributes if IMAGE_LABEL in a]
    if stated not in ([[0]] * len(stated), [[1]] * len(stated)) or not stated:
        found = f"states {IMAGE_LABEL} {stated}" if stated else f"has no attribute {IMAGE_LABEL}"
        raise UserError(
            f"{path}: {group.name} {found}, expected 0 or 1 on the group or on its datasets."
        )
    return stated[0] == [1]
