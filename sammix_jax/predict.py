"""A scan in, a mask on the same grid out."""

import dataclasses
import logging
import pathlib

import numpy as np

from sammix_jax import figures
from sammix_jax.data import volumes
from sammix_jax.errors import UserError
from sammix_jax.inference import load_model, make_predict, predict_volume

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one predicted scan left behind; no volume where the scan has lost its spacing."""

    mask: pathlib.Path
    overlay: pathlib.Path
    organ_ml: float | None


def predict(config, workdir, source, target) -> list[Prediction]:
    """Segments one scan, or every scan of a folder.

    Args:
      config: the run's config.
      workdir: a trained workdir; its normalisation and slice size are used.
      source: a NIfTI scan, or a folder of them.
      target: the mask's file for a scan; a folder for a folder, where masks take the scans' names.

    Returns:
      One prediction a scan. Beside each mask lies an overlay, `NAME_overlay.png`.

    Raises:
      UserError: a bad scan, nothing to predict, or a target that would overwrite a scan.
    """
    pairs = _pairs(pathlib.Path(source), pathlib.Path(target))
    model, variables = load_model(config, workdir)
    step = make_predict(model, config, ("cam",))
    predictions = []
    for scan, mask_path in pairs:
        volume = volumes.read_volume(scan)
        mask = predict_volume(step, variables, volume, None, config).masks["cam"]
        volumes.write_mask(mask_path, mask, volume)
        overlay = mask_path.with_name(f"{volumes.stem(mask_path)}_overlay.png")
        figures.save(figures.overlay(volume, mask, config.input.window), overlay)
        known = volume.has_spacing
        organ_ml = float(np.count_nonzero(mask) * volume.voxel_ml) if known else None
        _LOG.info("%s → %s", scan, mask_path)
        predictions.append(Prediction(mask_path, overlay, organ_ml))
    return predictions


def _pairs(source: pathlib.Path, target: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    if source.is_dir():
        if volumes.is_nifti(target):
            raise UserError(f"--output={target}: for a folder of scans give a folder.")
        scans = sorted(p for p in source.iterdir() if volumes.is_nifti(p) and p.name[0] != ".")
        if not scans:
            raise UserError(f"--input={source}: no .nii or .nii.gz file in that folder.")
        pairs = [(scan, target / scan.name) for scan in scans]
    elif volumes.is_nifti(target):
        pairs = [(source, target)]
    else:
        raise UserError(f"--output={target}: for one scan give a name ending in .nii or .nii.gz.")
    for scan, mask in pairs:
        if mask.resolve() == scan.resolve():
            raise UserError(f"--output={mask}: that is the scan itself; give another place.")
    return pairs
