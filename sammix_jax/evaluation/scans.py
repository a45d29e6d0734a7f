"""Which scans an evaluation scores, and how it reads them."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from sammix_jax import hosts
from sammix_jax.data import datasets, volumes
from sammix_jax.data.digests import image_digest, label_digest
from sammix_jax.data.geometry import kept_slices
from sammix_jax.data.masks import count_organ_pixels, read_annotation
from sammix_jax.data.paths import as_path
from sammix_jax.data.slices import ScanRecord, SliceStore
from sammix_jax.data.split_files import changed_scans, kept_split
from sammix_jax.data.splits import Split
from sammix_jax.data.volumes import Volume
from sammix_jax.errors import UserError, listed
from sammix_jax.prepare import store_folder

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LabelledScan:
    """A scan and what is known of it.

    Attributes:
      name: by which results know it.
      volume: the scan, D slices of (H, W).
      truth: (D, H, W) bool.
      organ_pixels: (D,) int, organ pixels of each slice on the scan's own grid; the image-level
        label is whether there are any.
      kept: the slices that preparing keeps for training: those that slice columns are about.
    """

    name: str
    volume: Volume
    truth: np.ndarray
    organ_pixels: np.ndarray
    kept: range


def scans_to_score(config, workdir) -> tuple[list[datasets.Scan], list[str]]:
    """The labelled scans to score, and what is wrong with those that were drawn and cannot be read.

    Args:
      config: the run's; `evaluate` names a part of the split or another folder.
      workdir: a workdir that keeps its split.

    Raises:
      UserError: no such scans.
    """
    if config.evaluate.root:
        return _other_scans(config)
    names = scored_scans(config.evaluate, kept_split(workdir))
    store = SliceStore.open(store_folder(config, workdir))
    records = store.records
    missing = sorted(set(names) - set(records))
    if missing:
        raise UserError(
            f"{store.root}: lacks the scans {missing[:5]} of the workdir's split; prepare the "
            "workdir's data again with --mode=prepare."
        )
    if changed := changed_scans(store, workdir, names):
        raise UserError(
            f"{store.root}: the scans {changed[:5]} of the workdir's split have other voxels or "
            f"masks there than when {workdir} was trained; bring them back as they were, or name "
            "them as other scans with --config.evaluate.root=DIR."
        )
    moved = [records[name].image for name in names if not as_path(records[name].image).exists()]
    if len(moved) == len(names):
        raise UserError(
            f"{moved[0]}: no such file, as of all scans of evaluate.part={config.evaluate.part}. "
            "Where the data was moved, tell the store: --mode=prepare --config=… "
            f"--config.data.root=DIR --workdir={workdir}, with the config of the run."
        )
    partly = partly_annotated(config.evaluate, names, records)
    faults = [
        f"{records[name].label}: annotated in part, so it cannot be scored; annotate it throughout."
        for name in partly
    ]
    scans = [
        datasets.Scan(
            name,
            as_path(records[name].image),
            as_path(records[name].label),
            records[name].label_values,
            ignore_value=records[name].ignore_value,
        )
        for name in names
        if name not in partly
    ]
    return scans, faults


def _other_scans(config) -> tuple[list[datasets.Scan], list[str]]:
    settings = config.evaluate
    found = datasets.find_scans(
        settings.root,
        config.data.organ,
        tuple(settings.label_values),
        settings.ignore_value,
        field="evaluate.root",
    )
    scans = [scan for scan in found if scan.label]
    if not scans:
        raise UserError(f"evaluate.root={settings.root}: no scan there has a mask.")
    if without := [scan.name for scan in found if not scan.label]:
        _LOG.warning(
            "evaluate.root=%s: %d of %d scans have no mask and are not scored, such as %s.",
            settings.root,
            len(without),
            len(found),
            ", ".join(without[:5]),
        )
    return draw_scans(scans, config) if settings.scans else (scans, [])


def draw_scans(scans: Sequence[datasets.Scan], config) -> tuple[list[datasets.Scan], list[str]]:
    """`evaluate.scans` of the scans that show the organ, by `evaluate.seed`, in natural order.

    The draw depends on the scans' names and masks alone. A scan that cannot be read is not drawn,
    and told.
    """
    wanted = config.evaluate.scans
    ordered = sorted(scans, key=lambda scan: (datasets.natural(scan.name), scan.name))
    drawn, faults = [], []
    for i in np.random.default_rng(config.evaluate.seed).permutation(len(ordered)):
        if len(drawn) == wanted:
            break
        # All processes draw a scan, or none.
        read = functools.partial(read_labelled, ordered[i], config)
        found, fault = hosts.for_all(read, ordered[i].image)
        if fault:
            faults.append(fault)
        elif found.organ_pixels.any():
            drawn.append(ordered[i])
    if len(drawn) < wanted:
        unread = f" {len(faults)} cannot be read:{listed(faults)}" if faults else ""
        raise UserError(
            f"evaluate.scans={wanted}: only {len(drawn)} of the {len(scans)} labelled scans below "
            f"{config.evaluate.root} show data.organ={config.data.organ}; ask for fewer, or 0 for "
            f"all.{unread}"
        )
    return sorted(drawn, key=ordered.index), faults


def scored_scans(settings, split: Split) -> tuple[str, ...]:
    """The scans of a split that an evaluation scores, where it names no other folder.

    Args:
      settings: the config's `evaluate`.
      split: of the run.

    Raises:
      UserError: it draws from another folder, or the part that it names is empty.
    """
    if settings.scans:
        raise UserError(
            f"evaluate.scans={settings.scans}: draws from another folder; name it with "
            "--config.evaluate.root=DIR, or set 0 to score the split's whole part."
        )
    names = split.part(settings.part)
    if not names:
        raise UserError(
            f"evaluate.part={settings.part}: that part of the split is empty, so the model could "
            "not be scored; choose another, as in --config.evaluate.part=train."
        )
    return names


def partly_annotated(
    settings, names: Sequence[str], records: Mapping[str, ScanRecord]
) -> list[str]:
    """Of the scans of the evaluated part those that are annotated in part, which cannot be scored.

    Raises:
      UserError: all of them are.
    """
    partly = [name for name in names if records[name].unannotated]
    if len(partly) == len(names):
        labels = ", ".join(records[name].label for name in partly[:5])
        raise UserError(
            f"evaluate.part={settings.part}: every scan is annotated in part, so none can be "
            f"scored; annotate some throughout, or choose another part: {labels}."
        )
    return partly


def read_labelled(scan: datasets.Scan, config) -> LabelledScan:
    """Reads a scan and its mask, in canonical orientation.

    Raises:
      UserError: as `volumes.read_volume` and `masks.read_annotation`; a mask that leaves voxels
        open.
    """
    volume = volumes.read_volume(scan.image, config.data.default_orientation)
    truth, annotated = read_annotation(
        scan.label, volume, scan.label_values, scan.known_values, scan.ignore_value
    )
    if not annotated.all():
        raise UserError(
            f"{scan.label}: annotated in part ({np.count_nonzero(annotated)} of {len(annotated)} "
            "slices throughout), so it cannot be scored; annotate it throughout."
        )
    depth, data = len(truth), config.data
    whole = range(depth)
    kept = kept_slices(depth, data.central_fraction, tuple(data.slice_range))
    slices = whole if volume.already_cut else kept
    return LabelledScan(scan.name, volume, truth, count_organ_pixels(scan.label, truth), slices)


def scan_digests(scan: LabelledScan) -> tuple[str, str]:
    """Of its mask, and of its image; as preparing and training know the scan."""
    throughout = np.ones(len(scan.truth), bool)
    return (
        label_digest(scan.volume.affine, scan.truth, scan.organ_pixels, throughout),
        image_digest(scan.volume.hu),
    )
