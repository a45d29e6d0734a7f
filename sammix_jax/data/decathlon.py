"""The folders of the Medical Segmentation Decathlon and of nnU-Net, and their dataset.json."""

import logging
import re
from collections.abc import Callable

from sammix_jax.data.files import read_json
from sammix_jax.data.nifti import stem
from sammix_jax.data.paths import Path, find_in
from sammix_jax.data.scan_files import Scan, by_name, refuse_orphans, tell_of_other_formats
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# By which nnU-Net lets a channel's name choose how it is normalised; they tell of no modality.
SCHEMES = ("nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")
# A lesion drawn with a label of its own still belongs to the organ it lies in (LiTS, Task03).
LIVER_LESION = re.compile(r"(?:liver|hepatic)?[ _-]?(?:cancer|tumou?r|lesion)s?")


def find_decathlon(root: Path, organ: str, given: tuple[int, ...]) -> list[Scan]:
    """The scans of a folder with imagesTr, or of its imagesTs; none where `root` is neither.

    Args:
      root: a folder.
      organ: a name in dataset.json, unless label values are given.
      given: label values that count as the organ; () takes those of dataset.json.

    Raises:
      UserError: as `datasets.find_scans`.
    """
    if root.name == "imagesTs":
        if not (root.parent / "labelsTs").is_dir():
            raise UserError(f"{root}: no labelsTs beside it, which its masks are expected in.")
        return _find_decathlon_tests(root.parent, organ, given)
    if not (root / "imagesTr").is_dir():
        return []
    images, labels, case_name = _pairs(root, "Tr")
    tests = find_in(root / "imagesTs", "*")
    tell_of_other_formats(tests)
    unlabelled = by_name(tests, case_name)
    values, known, ignore = (
        _decathlon_values(root, organ.lower(), given) if labels else ((1,), (), None)
    )
    refuse_orphans(images, labels, f"imagesTr/{_file_name(case_name)}")
    repeated = sorted(set(images) & set(unlabelled))
    if repeated:
        raise UserError(
            f"{root}: {repeated[:5]} stand in imagesTr and in imagesTs; keep each scan once, or a "
            "test scan trains the model."
        )
    scans = [Scan(key, images[key], labels.get(key), values, known, ignore) for key in images]
    return scans + [Scan(key, path, None, values) for key, path in unlabelled.items()]


def _find_decathlon_tests(root: Path, organ: str, given: tuple[int, ...]) -> list[Scan]:
    """The scans of imagesTs with their masks in labelsTs; as unlabelled ones they have none."""
    images, labels, case_name = _pairs(root, "Ts")
    refuse_orphans(images, labels, f"imagesTs/{_file_name(case_name)}")
    values = _decathlon_values(root, organ.lower(), given)
    return [Scan(key, path, labels.get(key), *values) for key, path in images.items()]


def _pairs(root: Path, part: str) -> tuple[dict[str, Path], dict[str, Path], Callable[[str], str]]:
    """Images and masks of a part, Tr or Ts, by case; and how a file's name tells its case."""
    masks = find_in(root / f"labels{part}", "*")
    labels = by_name(masks, str)
    files = [p for p in find_in(root / f"images{part}", "*") if not p.name.startswith(".")]
    case_name = _case_name if _numbers_channels(files, labels) else str
    images = by_name(files, case_name)
    tell_of_other_formats([*files, *masks])
    if files and not images:
        raise UserError(
            f"{files[0]}: expected NIfTI files (.nii or .nii.gz) in images{part}; convert what is "
            "there (SimpleITK reads and writes most formats)."
        )
    return images, labels, case_name


def _file_name(case_name: Callable[[str], str]) -> str:
    """The name of a case's image, for messages."""
    return "{}_0000.nii.gz" if case_name is _case_name else "{}.nii.gz"


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
    root: Path, organ: str, given: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """By dataset.json in either form: the organ's label values unless they are `given`, all values
    but that of voxels to ignore, and the latter."""
    path = root / "dataset.json"
    if not path.exists():
        if given:
            return given, (), None
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
    _tell_of_other_modalities(path, fields)
    if organ not in values and not given:
        known = sorted(set(values) - {"background", "ignore"})
        raise UserError(
            f"data.organ={organ}: {path} names {known}; choose one of these, or say by "
            "label_values which values are the organ."
        )
    # What nobody annotated is neither the organ nor its absence.
    ignore = values.pop("ignore", (None,))
    if len(ignore) != 1:
        raise UserError(f"{path}: its 'ignore' is {list(ignore)}, expected one whole number.")
    if given:
        return given, (), ignore[0]
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


def _tell_of_other_modalities(path: Path, fields: dict) -> None:
    channels = fields.get("channel_names", fields.get("modality", {}))
    names = channels.values() if isinstance(channels, dict) else [channels]
    others = sorted(str(name) for name in names if str(name).lower() not in ("ct", *SCHEMES))
    if others:
        _LOG.warning(
            "%s: scans of %s, not CT. Their values are taken for Hounsfield units, and all beyond "
            "input.window is cut off: set it to the range of these scans.",
            path,
            ", ".join(others),
        )
