"""A scan in, a mask on the same grid out."""

import dataclasses
import logging
import pathlib

import numpy as np

from sammix_jax import report
from sammix_jax.data import volumes
from sammix_jax.errors import UserError
from sammix_jax.inference import load_model, make_predict, predict_volume

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one predicted scan left behind."""

    mask: pathlib.Path
    overlay: pathlib.Path
    organ_ml: float


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
        _, masks = predict_volume(step, variables, volume, None, config)
        mask = masks["cam"]
        volumes.write_mask(mask_path, mask, volume)
        overlay = mask_path.with_name(f"{volumes.stem(mask_path)}_overlay.png")
        report.write_overlay(overlay, volume, mask, config)
        organ_ml = float(np.count_nonzero(mask) * volume.voxel_ml)
        _LOG.info("%s: %s %.1f mL → %s", scan, config.data.organ, organ_ml, mask_path)
        predictions.append(Prediction(mask_path, overlay, organ_ml))
    return predictions


def _pairs(source: pathlib.Path, target: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    if source.is_dir():
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
