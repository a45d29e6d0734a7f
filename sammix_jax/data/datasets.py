"""Finds scans and their masks in the folder layouts that people already have.

- LiTS: `volume-N.nii[.gz]` with `segmentation-N.nii[.gz]`, in one folder or in folders below it.
- Medical Segmentation Decathlon, nnU-Net: `imagesTr/`, `labelsTr/` (and `imagesTs/`, unlabelled).
- TotalSegmentator: `sNNNN/ct.nii.gz` with `sNNNN/segmentations/ORGAN.nii.gz`.
- The authors' preprocessed slices: `NAME.h5` or `NAME.hdf5`, scan and mask in one file (`hdf5.py`).

Files pair by the number or name they carry, never by directory order. A scan without a mask is an
unlabelled scan; a mask without a scan is an error.
"""

import dataclasses
import logging
import re

from sammix_jax.data import hdf5
from sammix_jax.data.files import read_json
from sammix_jax.data.nifti import is_nifti, stem
from sammix_jax.data.paths import Path, as_path, find_below, find_in
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

LITS_ORGANS = {"liver": (1, 2), "tumour": (2,)}
# A lesion drawn with a label of its own still belongs to the organ it lies in (LiTS, Task03).
LIVER_LESION = re.compile(r"(?:liver|hepatic)?[ _-]?(?:cancer|tumou?r|lesion)s?")
CASE_IMAGES = ("ct.nii.gz", "ct.nii")  # TotalSegmentator's, in a folder for each case
LAYOUTS = (
    "LiTS (volume-N.nii, segmentation-N.nii), Medical Segmentation Decathlon or nnU-Net "
    "(imagesTr/, labelsTr/), TotalSegmentator (sNNNN/ct.nii.gz, sNNNN/segmentations/), the "
    "authors' preprocessed slices (NAME.h5)"
)


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan on disk.

    Attributes:
      name: by which the split and the results know it.
      image, label: files; no label for an unlabelled scan.
      label_values: the values in the label file that count as the organ.
      known_values: all values that the layout allows there; () where nothing says so.
      ignore_value: of voxels that nobody annotated; None where the layout has no such value.
    """

    name: str
    image: Path
    label: Path | None
    label_values: tuple[int, ...] = (1,)
    known_values: tuple[int, ...] = ()
    ignore_value: int | None = None


def find_scans(
    root, organ: str, label_values: tuple[int, ...] = (), field: str = "data.root"
) -> list[Scan]:
    """All scans below `root`, in natural order of their names.

    Args:
      root: a folder in one of the four layouts.
      organ: the structure to segment; must be one that the layout names (HDF5 names none).
      label_values: overrides the label values that count as the organ (label files with several).
      field: the config field that named the root, for messages.

    Raises:
      UserError: no such folder, no known layout, an unknown organ, a mask without its scan, two
        files for one scan, or label values for files that say which slices show the organ.
    """
    root = as_path(root)
    if not root.is_dir():
        raise UserError(f"{field}={root}: no such folder; give the folder that holds the scans.")
    inside = find_in(root, "*")
    for find in (_find_decathlon, _find_totalsegmentator, _find_lits, _find_hdf5):
        scans = find(root, organ)
        if scans:
            break
    else:
        found = [p.name for p in inside[:5]]
        raise UserError(
            f"{field}={root}: no scans found (it holds {found or 'nothing'}), expected one of: "
            f"{LAYOUTS}."
        )
    names = [scan.name for scan in scans]
    for name in names:
        if name != name.encode(errors="ignore").decode():  # no table could hold it
            raise UserError(f"{root}: the scan {name!a}: no UTF-8 name; rename the file.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{root}: several files for the scans {repeated[:5]}; keep one of each.")
    if label_values:
        if hdf5.is_hdf5(scans[0].image):
            raise UserError(
                f"{field.replace('root', 'label_values')}={tuple(label_values)}: the HDF5 files "
                f"below {root} say themselves which slices show the organ; leave the field empty."
            )
        values = tuple(label_values)
        scans = [dataclasses.replace(s, label_values=values, known_values=()) for s in scans]
    return sorted(scans, key=lambda s: natural(s.name))


def natural(name: str) -> list:
    """A sort key in which scan-2 comes before scan-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _find_lits(root: Path, organ: str) -> list[Scan]:
    images = _by_name(find_below(root, "volume-*.nii*"), lambda s: s.removeprefix("volume-"))
    labels = _by_name(
        find_below(root, "segmentation-*.nii*"), lambda s: s.removeprefix("segmentation-")
    )
    if not images and not labels:
        return []
    if organ not in LITS_ORGANS:
        raise UserError(
            f"data.organ={organ}: LiTS labels hold {sorted(LITS_ORGANS)}; choose one of these."
        )
    _refuse_orphans(images, labels, "volume-{}.nii")
    return [
        Scan(f"volume-{key}", images[key], labels.get(key), LITS_ORGANS[organ], (0, 1, 2))
        for key in images
    ]


def _find_decathlon(root: Path, organ: str) -> list[Scan]:
    if not (root / "imagesTr").is_dir():
        return []
    labels = _by_name(find_in(root / "labelsTr", "*"), str)
    files = [p for p in find_in(root / "imagesTr", "*") if not p.name.startswith(".")]
    case_name = _case_name if _numbers_channels(files, labels) else str
    images = _by_name(files, case_name)
    if files and not images:
        raise UserError(
            f"{files[0]}: expected NIfTI files (.nii or .nii.gz) in imagesTr; convert what is "
            "there (SimpleITK reads and writes most formats)."
        )
    unlabelled = _by_name(find_in(root / "imagesTs", "*"), case_name)
    values, known, ignore = _decathlon_values(root, organ.lower()) if labels else ((1,), (), None)
    _refuse_orphans(images, labels, "imagesTr/{}.nii.gz")
    repeated = sorted(set(images) & set(unlabelled))
    if repeated:
        raise UserError(
            f"{root}: {repeated[:5]} stand in imagesTr and in imagesTs; keep each scan once, or a "
            "test scan trains the model."
        )
    scans = [Scan(key, images[key], labels.get(key), values, known, ignore) for key in images]
    return scans + [Scan(key, path, None, values) for key, path in unlabelled.items()]


def _numbers_channels(files: list[Path], labels: dict) -> bool:
    """Whether images are CASE_0000 as nnU-Net has them; elsewhere cases may be numbered so."""
    first = [stem(path) for path in files if stem(path).endswith("_0000")]
    if not labels:
        return bool(first)
    return any(name not in labels and name.removesuffix("_0000") in labels for name in first)


def _case_name(name: str) -> str:
    """Without nnU-Net's number of a channel; CT has the one, _0000."""
    if re.search(r"_000[1-9]$", name):
        raise UserError(
            f"{name}: a second channel, expected CT with _0000 alone; move it out of the folder."
        )
    return name.removesuffix("_0000")


def _decathlon_values(
    root: Path, organ: str
) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """By dataset.json in either form: the organ's label values, all values but that of voxels to
    ignore, and the latter."""
    path = root / "dataset.json"
    if not path.exists():
        raise UserError(
            f"{path}: no such file, so the label value of data.organ={organ} is unknown; add it, "
            'as {"labels": {"background": 0, "' + organ + '": 1}}.'
        )
    fields = read_json(path)
    values: dict[str, tuple[int, ...]] = {}
    try:
        for key, value in fields["labels"].items():
            name, number = (value, key) if str(key).isdigit() else (key, value)
            numbers = number if isinstance(number, list) else [number]
            values[str(name).lower()] = tuple(int(n) for n in numbers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its 'labels' cannot be read ({error!r}), expected names with whole numbers, "
            f'as {{"background": 0, "{organ}": 1}}.'
        ) from error
    if organ not in values:
        known = sorted(set(values) - {"background", "ignore"})
        raise UserError(f"data.organ={organ}: {path} names {known}; choose one of these.")
    # What nobody annotated is neither the organ nor its absence.
    ignore = values.pop("ignore", (None,))
    if len(ignore) != 1:
        raise UserError(f"{path}: its 'ignore' is {list(ignore)}, expected one whole number.")
    others = sorted(set(values) - {"background", organ})
    counted = [organ]
    # Where other organs are named too, nobody knows in which of them a lesion lies.
    if organ == "liver" and all(LIVER_LESION.fullmatch(name) for name in others):
        counted += others
    elif others:
        more = ", …" if len(others) > 8 else ""
        _LOG.warning(
            "%s: labels that do not count as data.organ=%s: %s%s. Where one of them is a part of "
            "it, such as its tumours, name the values of all in data.label_values.",
            path,
            organ,
            ", ".join(others[:8]),
            more,
        )
    wanted = tuple(sorted({n for name in counted for n in values[name]}))
    known = tuple(sorted({0, *(n for numbers in values.values() for n in numbers)}))
    return wanted, known, ignore[0]


def _find_totalsegmentator(root: Path, organ: str) -> list[Scan]:
    inside = find_in(root, "*/*")
    images = [path for path in inside if path.name in CASE_IMAGES]
    for folder in (path for path in inside if path.name == "segmentations"):
        if not any(image.parent == folder.parent for image in images):
            raise UserError(
                f"{folder}: masks without their scan, expected {folder.parent / 'ct.nii.gz'}; "
                "copy the scan there or remove the folder."
            )
    scans, organs = [], set()
    for image in images:
        folder = image.parent / "segmentations"
        masks = _by_name(find_in(folder, "*.nii*"), str)
        organs |= set(masks)
        scans.append(Scan(image.parent.name, image, masks.get(organ), known_values=(0, 1)))
    if organs and not any(scan.label for scan in scans):
        raise UserError(
            f"data.organ={organ}: no scan below {root} has segmentations/{organ}.nii.gz; there are "
            f"{sorted(organs)}; choose one of these."
        )
    return scans


def _find_hdf5(root: Path, organ: str) -> list[Scan]:
    files = [p for p in root.iterdir() if hdf5.is_hdf5(p) and not p.name.startswith(".")]
    if files:
        hdf5.import_h5py(files[0])  # told once, not for every scan
    return [Scan(path.stem, path, path, (1, 2), (0, 1, 2)) for path in files]


def _by_name(paths, key) -> dict[str, Path]:
    """NIfTI files by the key of their names; the same key twice is an error."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        # Hidden files are what macOS archives and interrupted writes leave behind.
        if not is_nifti(path) or path.name.startswith("."):
            continue
        name = key(stem(path))
        if name in found:
            raise UserError(f"{path} and {found[name]} are both scan {name}; keep one of them.")
        found[name] = path
    return found


def _refuse_orphans(images: dict, labels: dict, expected: str) -> None:
    orphans = sorted(set(labels) - set(images), key=natural)
    if orphans:
        raise UserError(
            f"{labels[orphans[0]]}: a mask without its scan, expected {expected.format(orphans[0])}"
            f" ({len(orphans)} such masks); copy the scan there or remove the mask."
        )
