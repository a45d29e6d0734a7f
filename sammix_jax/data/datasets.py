"""Finds scans and their masks in the folder layouts that people already have.

- LiTS: `volume-N.nii[.gz]` with `segmentation-N.nii[.gz]`, in one folder or in folders below it
  (and `test-volume-N.nii[.gz]`, unlabelled).
- Medical Segmentation Decathlon, nnU-Net: `imagesTr/`, `labelsTr/` (and `imagesTs/`, unlabelled);
  or the folder `imagesTs/` itself, with `labelsTs/` beside it.
- TotalSegmentator: `sNNNN/ct.nii.gz` with `sNNNN/segmentations/ORGAN.nii.gz`.
- The authors' preprocessed slices: `NAME.h5` or `NAME.hdf5`, scan and mask in one file (`hdf5.py`).

Files pair by the number or name they carry, never by directory order. A scan without a mask is an
unlabelled scan; a mask without a scan is an error.
"""

import dataclasses
import logging
import re

from sammix_jax.data import hdf5
from sammix_jax.data.decathlon import find_decathlon
from sammix_jax.data.paths import Path, as_path, find_below, find_in
from sammix_jax.data.scan_files import (
    IMAGE_FILE,
    Scan,
    by_name,
    natural,
    refuse_orphans,
    tell_of_other_formats,
)
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

LITS_ORGANS = {"liver": (1, 2), "tumour": (2,)}
_LITS_FILES = re.compile(rf"(volume|segmentation|test-volume)-{IMAGE_FILE}")
CASE_IMAGES = ("ct.nii.gz", "ct.nii")  # TotalSegmentator's, in a folder for each case
LAYOUTS = (
    "LiTS (volume-N.nii, segmentation-N.nii), Medical Segmentation Decathlon or nnU-Net "
    "(imagesTr/, labelsTr/), TotalSegmentator (sNNNN/ct.nii.gz, sNNNN/segmentations/), the "
    "authors' preprocessed slices (NAME.h5)"
)


def find_scans(
    root,
    organ: str,
    label_values: tuple[int, ...] = (),
    ignore_value: int | None = None,
    field: str = "data.root",
) -> list[Scan]:
    """All scans below `root`, in natural order of their names.

    Args:
      root: a folder in one of the four layouts.
      organ: the structure to segment; must be one that the layout names (HDF5 names none), unless
        `label_values` say it; TotalSegmentator's are files, and must be there.
      label_values: overrides the label values that count as the organ (label files with several).
      ignore_value: overrides that of voxels that nobody annotated.
      field: the config field that named the root, for messages.

    Raises:
      UserError: no such folder, no known layout, an unknown organ, a mask without its scan, two
        files for one scan, or label values for files that say which slices show the organ.
    """
    root = as_path(root)
    if not root.is_dir():
        raise UserError(f"{field}={root}: no such folder; give the folder that holds the scans.")
    inside = find_in(root, "*")
    values = tuple(label_values)
    for layout, find in _LAYOUTS.items():
        scans = find(root, organ, values)
        if scans:
            _LOG.info("%s: %d scans, in the layout of %s", root, len(scans), layout)
            break
    else:
        found = [p.name for p in inside[:5]]
        raise UserError(
            f"{field}={root}: no scans found (it holds {found or 'nothing'}), expected one of: "
            f"{LAYOUTS}. For others put scans and masks of the same names into imagesTr/ and "
            "labelsTr/, and beside them a dataset.json such as "
            f'{{"labels": {{"background": 0, "{organ}": 1}}}}; convert DICOM with dcm2niix.'
        )
    names = [scan.name for scan in scans]
    for name in names:
        if name != name.encode(errors="ignore").decode():  # no table could hold it
            raise UserError(f"{root}: the scan {name!a}: no UTF-8 name; rename the file.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{root}: several files for the scans {repeated[:5]}; keep one of each.")
    if values:
        if hdf5.is_hdf5(scans[0].image):
            raise UserError(
                f"{field.replace('root', 'label_values')}={values}: the HDF5 files "
                f"below {root} say themselves which slices show the organ; leave the field empty."
            )
        scans = [dataclasses.replace(s, label_values=values, known_values=()) for s in scans]
    if ignore_value is not None:
        scans = [_ignoring(scan, ignore_value, field) for scan in scans]
    return sorted(scans, key=lambda s: natural(s.name))


def _ignoring(scan: Scan, value: int, field: str) -> Scan:
    named = f"{field.replace('root', 'ignore_value')}={value}"
    if hdf5.is_hdf5(scan.image):
        raise UserError(f"{named}: HDF5 files are annotated throughout; leave the field empty.")
    if value in scan.label_values:
        raise UserError(
            f"{named}: is among the values of the organ, {scan.label_values}; name the others with "
            f"{field.replace('root', 'label_values')}."
        )
    return dataclasses.replace(scan, ignore_value=value)


def _find_lits(root: Path, organ: str, given: tuple[int, ...]) -> list[Scan]:
    files = list(find_below(root, _LITS_FILES))
    tell_of_other_formats(files)
    volumes, masks, tests = (
        [path for path in files if path.name.startswith(prefix)]
        for prefix in ("volume-", "segmentation-", "test-volume-")
    )
    images = by_name(volumes, lambda s: s.removeprefix("volume-"))
    labels = by_name(masks, lambda s: s.removeprefix("segmentation-"))
    if not images and not labels:
        return []  # test volumes alone are no data set
    values = given or LITS_ORGANS.get(organ)
    if not values:
        raise UserError(
            f"data.organ={organ}: LiTS labels hold {sorted(LITS_ORGANS)}; choose one of these, or "
            "say by label_values which values are the organ."
        )
    refuse_orphans(images, labels, "volume-{}.nii")
    unlabelled = by_name(tests, str)
    return [
        *(Scan(f"volume-{key}", images[key], labels.get(key), values, (0, 1, 2)) for key in images),
        *(Scan(name, path, None, values, (0, 1, 2)) for name, path in unlabelled.items()),
    ]


def _find_totalsegmentator(root: Path, organ: str, given: tuple[int, ...]) -> list[Scan]:
    inside = find_in(root, "*/*")
    images = [path for path in inside if path.name in CASE_IMAGES]
    for folder in (path for path in inside if path.name == "segmentations"):
        if not any(image.parent == folder.parent for image in images):
            raise UserError(
                f"{folder}: masks without their scan, expected {folder.parent / 'ct.nii.gz'}; "
                "copy the scan there or remove the folder."
            )
    scans, organs, files = [], set(), []
    for image in images:
        inside = find_in(image.parent / "segmentations", "*")
        files += inside
        masks = by_name(inside, str.lower)
        organs |= set(masks)
        scans.append(Scan(image.parent.name, image, masks.get(organ.lower()), known_values=(0, 1)))
    tell_of_other_formats(files)
    if images:
        cases = {image.parent for image in images}
        others = [p for p in root.iterdir() if p not in cases and p.is_dir() and p.name[0] != "."]
        if others:
            _LOG.warning(
                "%d folders are left out, for they have no %s, such as %s.",
                len(others),
                CASE_IMAGES[0],
                min(others),
            )
    if organs and not any(scan.label for scan in scans):
        raise UserError(
            f"data.organ={organ}: no scan below {root} has segmentations/{organ}.nii.gz; there are "
            f"{sorted(organs)}; choose one of these."
        )
    return scans


def _find_hdf5(root: Path, organ: str, given: tuple[int, ...]) -> list[Scan]:
    files = [p for p in root.iterdir() if hdf5.is_hdf5(p) and not p.name.startswith(".")]
    if files:
        hdf5.import_h5py(files[0])  # told once, not for every scan
    return [Scan(path.stem, path, path, (1, 2), (0, 1, 2)) for path in files]


# In this order: what lies about in the folders of one may be named as another's.
_LAYOUTS = {
    "the Decathlon and nnU-Net": find_decathlon,
    "TotalSegmentator": _find_totalsegmentator,
    "LiTS": _find_lits,
    "the authors' HDF5": _find_hdf5,
}
