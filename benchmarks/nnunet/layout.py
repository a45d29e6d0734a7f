"""Where an export keeps its files, and scans as nnU-Net reads them.

The raw layout is that of nnU-Net's documentation, documentation/reference/dataset-format.md, the
splits file that of documentation/manual_data_splits.md (MIC-DKFZ/nnUNet, read for version 2.8.1).

    OUTPUT/config.json, split.json, labels.json, scans.json, images.json   as in a workdir
    OUTPUT/cases.json                   which slice or scan each nnU-Net case is; written last
    OUTPUT/nnUNet_raw/DatasetNNN_ORGAN/dataset.json, imagesTr/, labelsTr/, imagesTs/
    OUTPUT/nnUNet_preprocessed/DatasetNNN_ORGAN/splits_final.json
    OUTPUT/nnUNet_results/              what training leaves
    OUTPUT/predictions/                 masks of the scans in imagesTs
    OUTPUT/evaluation/PART/             results.json, cases.csv
"""

from __future__ import annotations

import dataclasses
import pathlib

import nibabel as nib
import numpy as np

from sammix_jax.data.files import read_json, whole_file
from sammix_jax.data.nifti import canonical_transform
from sammix_jax.data.volumes import Volume
from sammix_jax.errors import UserError

CASES = "cases.json"
ENDING = ".nii.gz"
# nnU-Net plans along the axis of the coarsest spacing, and gives this to flat images itself.
FLAT_MM = 999.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folders of one export.

    Attributes:
      output: the export's folder.
      dataset: nnU-Net's name of the data set, such as `Dataset501_liver`.
    """

    output: pathlib.Path
    dataset: str

    @property
    def raw(self) -> pathlib.Path:
        return self.output / "nnUNet_raw" / self.dataset

    @property
    def splits(self) -> pathlib.Path:
        return self.output / "nnUNet_preprocessed" / self.dataset / "splits_final.json"

    @property
    def predictions(self) -> pathlib.Path:
        return self.output / "predictions"

    def image(self, folder: str, case: str) -> pathlib.Path:
        """The image of a case in `imagesTr` or `imagesTs`; CT is channel 0."""
        return self.raw / folder / f"{case}_0000{ENDING}"

    def label(self, case: str) -> pathlib.Path:
        return self.raw / "labelsTr" / f"{case}{ENDING}"

    def prediction(self, case: str) -> pathlib.Path:
        return self.predictions / f"{case}{ENDING}"


def read_cases(output: pathlib.Path) -> tuple[Layout, dict]:
    """The layout of a whole export and the content of its cases.json.

    Raises:
      UserError: no export there.
    """
    path = output / CASES
    if not path.exists():
        raise UserError(f"{path}: no such file; run `export` with --output={output} first.")
    cases = read_json(path)
    return Layout(output, cases["dataset"]), cases


def canonical_affine(volume: Volume) -> np.ndarray:
    """(4, 4) float64: voxel (w, h, d) of the canonical volume → RAS+ mm."""
    turn = canonical_transform(volume.orientation)
    return volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.file_shape)


def slice_affine(volume: Volume, z: int) -> np.ndarray:
    """(4, 4) float64 of slice z alone: its place and spacing in the plane, `FLAT_MM` thick.

    In 2D nnU-Net uses no thickness, but plans with it: it would slice thin scans along another
    axis, and take slices of unequal thickness for volumes.
    """
    affine = canonical_affine(volume)
    affine[:3, 3] += z * affine[:3, 2]
    affine[:3, 2] *= FLAT_MM / np.linalg.norm(affine[:3, 2])
    return affine


def write_nifti(path: pathlib.Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Writes canonical (D, H, W) voxels, whose type they keep, in the file order (W, H, D)."""
    image = nib.Nifti1Image(np.ascontiguousarray(voxels.transpose(2, 1, 0)), affine)
    image.header.set_xyzt_units("mm")
    with whole_file(path) as partial:
        nib.save(image, partial)
