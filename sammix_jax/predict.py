"""A scan in, a mask on the same grid out."""

import dataclasses
import functools
import hashlib
import logging
import os

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.data import volumes
from sammix_jax.data.datasets import CASE_IMAGES
from sammix_jax.data.digests import image_digest
from sammix_jax.data.files import local_copy, read_json
from sammix_jax.data.hdf5 import is_hdf5
from sammix_jax.data.masks import file_voxels, write_mask
from sammix_jax.data.nifti import is_nifti, read_nifti, stem
from sammix_jax.data.paths import Path, as_path, find_in, is_remote, resolved
from sammix_jax.data.scan_files import tell_of_other_formats
from sammix_jax.data.split_files import IMAGES
from sammix_jax.errors import UserError, listed
from sammix_jax.evaluation import figures
from sammix_jax.inference import make_predict, mesh_of, predict_volume
from sammix_jax.systems.system import ORACLES
from sammix_jax.training.trained import load_model

_LOG = logging.getLogger(__name__)

# Hidden files, and the masks that lie beside the scans in LiTS.
NO_SCANS = (".", "segmentation-")
# By what an overlay keeps under it, its mask is known again.
MASK_DIGEST = "SAM-Mix mask"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one predicted scan left behind; no volume where the scan has lost its spacing."""

    mask: Path
    overlay: Path
    organ_ml: float | None

    @property
    def size(self) -> str:
        """The volume in words."""
        return "of unknown size" if self.organ_ml is None else f"{self.organ_ml:.1f} mL"


def predict(config, workdir, source, target, skip_existing: bool = False) -> list[Prediction]:
    """Segments one scan, or every scan of a folder.

    Args:
      config: the run's config.
      workdir: a trained workdir; its normalisation and slice size are used.
      source: a NIfTI scan, or a folder of them.
      target: the mask's file for a scan; a folder for a folder, where masks take the scans' names.
      skip_existing: leave out the scans whose masks are there, whoever made them.

    Returns:
      One prediction a segmented scan. Beside each mask lies an overlay, `NAME_overlay.png`.

    Raises:
      UserError: nothing to predict, or a target that would overwrite a scan, or a mask or picture
        that was not predicted or was changed since; a system that needs the truth to be prompted;
        bad scans, once all others are predicted.
    """
    pairs = every = _pairs(as_path(source), as_path(target))
    if not hosts.all_alike(every):
        raise UserError(
            f"--input={source}: the processes of this run find different scans there; let all "
            "machines see the same folder."
        )
    if skip_existing:
        # Masks may lie on the first process's disk alone.
        pairs = [pair for pair in every if not hosts.any_process(pair[1].exists())]
        there = len(every) - len(pairs)
        _LOG.info("%d of %d masks are there already, and stay", there, len(every))
        if not pairs:
            return []
    hosts.on_first(lambda: _check_places([mask for _, mask in pairs]))
    _tell_of_other_scans(config, workdir, [scan for scan, _ in pairs])
    system, variables, _ = load_model(config, workdir)
    if system.headline in ORACLES:
        raise UserError(
            f"model.prompt={config.model.prompt}: this model was trained to be prompted by the "
            "true mask, so it cannot segment a scan without one; score it with --mode=evaluate."
        )
    step = make_predict(system, config, (system.headline,), mesh_of(variables))
    read_volume = functools.partial(
        volumes.read_volume, default_orientation=config.data.default_orientation
    )
    predictions, faults = [], []
    hidden = True if len(pairs) == 1 else hosts.hides_progress()
    for scan, mask_path in tqdm(pairs, desc="predict", unit="scan", disable=hidden):
        # All processes predict a scan, or none.
        volume, fault = hosts.for_all(functools.partial(read_volume, scan), scan)
        if not fault and not hosts.all_alike(image_digest(volume.hu)):
            fault = f"{scan}: holds other voxels on another machine."
        if not fault:
            (mask,) = predict_volume(step, variables, volume, None, config).masks.values()
            write = functools.partial(_write, volume, mask, mask_path, config)
            made, fault = hosts.for_all(write, mask_path)
        if fault:
            _LOG.error("%s", fault)
            faults.append(fault)
            continue
        predictions.append(made)
        if len(pairs) > 1:  # of one the caller tells
            _LOG.info("%s: %s %s → %s", scan, config.data.organ, made.size, mask_path)
    if faults:
        done = f"{len(predictions)} of {len(pairs)} scans are predicted; not these:\n  "
        raise UserError((done if len(pairs) > 1 else "") + "\n  ".join(faults))
    return predictions


def _tell_of_other_scans(config, workdir, scans: list[Path]) -> None:
    data = config.data
    if all(is_hdf5(scan) for scan in scans):  # the authors' own form: cut already, and as it lies
        return
    if (data.central_fraction, tuple(data.slice_range)) != (1.0, (0.0, 1.0)):
        _LOG.warning(
            "%s was trained on a part of each scan's slices (data.central_fraction=%s, "
            "data.slice_range=%s), and all slices are segmented: look at those that are like none "
            "it has seen.",
            workdir,
            data.central_fraction,
            tuple(data.slice_range),
        )
    images = as_path(workdir) / IMAGES
    if images.exists() and any(is_hdf5(kept["file"]) for kept in read_json(images).values()):
        _LOG.warning(
            "%s was trained on HDF5 slices, which keep no orientation; where they lay otherwise "
            "than these scans, turned to patient coordinates, every mask is wrong: look at the "
            "overlays.",
            workdir,
        )


def _check_places(masks: list[Path]) -> None:
    """Before anything is computed: a mask that cannot be written is hours lost."""
    if faults := [fault for mask in masks for fault in _in_the_way(mask)]:
        raise UserError(
            "files are in the way: give another place, move them, or leave out the scans that have "
            f"masks with --skip_existing:{listed(faults)}"
        )
    for folder in {mask.parent for mask in masks if not is_remote(mask)}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output: {folder} cannot be made ({error}); give another."
            ) from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"--output: {folder} cannot be written to; give another folder.")


def _in_the_way(mask: Path) -> list[str]:
    """What a new mask here would replace that is not this program's, or was changed since."""
    faults, overlay = [], _overlay(mask)
    made = _kept_digest(overlay) if overlay.exists() else ""
    if overlay.exists() and not made:
        faults.append(
            f"--output={mask}: its overlay would replace {overlay.name}, which this program did "
            "not make"
        )
    # Else a reference, or a mask that was corrected by hand.
    if mask.exists() and not (made and made == _file_digest(mask)):
        faults.append(
            f"--output={mask}: is there already, and was changed since it was predicted, or comes "
            "from elsewhere"
        )
    return faults


def _write(volume: volumes.Volume, mask: np.ndarray, mask_path, config) -> Prediction:
    overlay = _overlay(mask_path)
    if hosts.is_first():  # which alone writes
        if faults := _in_the_way(mask_path):  # by now: hours may have passed
            raise UserError(f"{faults[0]}; it was not so at the start, and is left as it is.")
        # A mask of this program is known by its overlay. In this order one that is cut off leaves
        # no mask beside the overlay of another.
        try:
            mask_path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{mask_path}: cannot be replaced ({error}).") from error
        shown = figures.overlay(volume, mask, config.input.window)
        figures.save(shown, overlay, {MASK_DIGEST: _digest(file_voxels(mask, volume))})
        write_mask(mask_path, mask, volume)
    return Prediction(mask_path, overlay, volume.millilitres(mask))


def _overlay(mask_path: Path) -> Path:
    return mask_path.with_name(f"{stem(mask_path)}_overlay.png")


def _digest(voxels: np.ndarray) -> str:
    """Of a mask in the order of its file."""
    return hashlib.sha256(voxels.astype(np.uint8).tobytes()).hexdigest()


def _file_digest(mask: Path) -> str:
    """Of the mask in a file; "" of what is none."""
    try:
        voxels = read_nifti(mask).values()
    except UserError:
        return ""
    return _digest(voxels) if np.isin(voxels, (0, 1)).all() else ""


def _kept_digest(overlay: Path) -> str:
    """Of the mask that an overlay was made with; "" where it keeps none."""
    with local_copy(overlay) as local:
        try:
            with Image.open(local) as picture:
                return picture.info.get(MASK_DIGEST, "")
        except (UnidentifiedImageError, OSError):
            return ""


def _pairs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    if not source.exists():
        raise UserError(f"--input={source}: no such file or folder.")
    if source.is_dir():
        if is_nifti(target):
            raise UserError(f"--output={target}: for a folder of scans give a folder.")
        # TotalSegmentator's folders, where every scan is called ct.
        cases = [scan for scan in find_in(source, "*/*") if scan.name in CASE_IMAGES]
        pairs = [(scan, target / f"{scan.parent.name}.nii.gz") for scan in cases]
        inside = find_in(source, "*")
        tell_of_other_formats(inside)
        pairs += [
            (scan, target / scan.name)
            for scan in inside
            if is_nifti(scan) and not scan.name.startswith(NO_SCANS)
        ]
        if not pairs:
            raise UserError(
                f"--input={source}: no scans there, expected .nii or .nii.gz files side by side, "
                "or CASE/ct.nii.gz; convert DICOM with dcm2niix."
            )
    elif is_nifti(target):
        pairs = [(source, target)]
    else:
        raise UserError(f"--output={target}: for one scan give a name ending in .nii or .nii.gz.")
    stems = [stem(mask) for _, mask in pairs]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise UserError(f"--input={source}: several scans are called {repeated[:5]}; rename one.")
    for scan, mask in pairs:
        if resolved(mask) == resolved(scan):
            raise UserError(f"--output={mask}: that is the scan itself; give another place.")
    return pairs
