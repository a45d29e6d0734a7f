"""Draws the README's pictures of the phantom: `python docs/pictures.py`."""

import pathlib
import tempfile

import numpy as np
from matplotlib.figure import Figure

from sammix_jax.data import phantom
from sammix_jax.data.masks import read_mask
from sammix_jax.data.volumes import read_volume

FOLDER = pathlib.Path(__file__).parent / "images"
WINDOW = (-160, 240)


def phantom_domains(path: pathlib.Path) -> None:
    """One slice of each domain, with the liver's contour beside it."""
    figure = Figure(figsize=(9.6, 2.3), layout="constrained", facecolor="black")
    axes = figure.subplots(1, 4)
    for pair, domain in zip((axes[:2], axes[2:]), phantom.DOMAINS.values(), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            scan = read_volume(phantom.write_lits(folder, 1, seed=21, domain=domain)[0])
            label = pathlib.Path(folder) / "segmentation-0.nii.gz"
            liver = read_mask(label, scan, (phantom.LIVER, phantom.TUMOUR))
        z = int(liver.sum(axis=(1, 2)).argmax()) - 3
        aspect = scan.spacing[1] / scan.spacing[2]
        for axis in pair:
            axis.imshow(scan.hu[z], cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], aspect=aspect)
            axis.axis("off")
        pair[0].set_title(domain.name, color="white")
        pair[1].contour(liver[z].astype(np.float32), levels=[0.5], colors="#4cc38a")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    phantom_domains(FOLDER / "phantom.png")
