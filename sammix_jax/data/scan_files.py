"""A scan on disk, and how scans and masks are paired by their names."""

import dataclasses
import logging
import re
from collections.abc import Iterable

from sammix_jax.data.nifti import is_nifti, stem
from sammix_jax.data.paths import Path
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# How files of images are named, in whatever format.
IMAGE_FILE = r".*\.(?i:nii|mha|mhd|nrrd|nhdr|hdr|img|mgz|mgh|gipl|dcm)(\.(?i:gz|bz2|zip))?"


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


def natural(name: str) -> list:
    """A sort key in which scan-2 comes before scan-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def by_name(paths, key) -> dict[str, Path]:
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


def tell_of_other_formats(paths: Iterable[Path]) -> None:
    """Warns of files that seem to be scans or masks, and are left out."""
    others = [
        path
        for path in paths
        if re.fullmatch(IMAGE_FILE, path.name) and not (is_nifti(path) or path.name.startswith("."))
    ]
    if others:
        _LOG.warning(
            "%d files are left out, for their names do not end in .nii or .nii.gz, such as %s: "
            "rename them, or convert what is no NIfTI (SimpleITK reads and writes most formats).",
            len(others),
            others[0],
        )


def refuse_orphans(images: dict, labels: dict, expected: str) -> None:
    orphans = sorted(set(labels) - set(images), key=natural)
    if orphans:
        raise UserError(
            f"{labels[orphans[0]]}: a mask without its scan, expected {expected.format(orphans[0])}"
            f" ({len(orphans)} such masks); copy the scan there or remove the mask."
        )
