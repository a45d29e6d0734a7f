"""How well a SAM answers one box or one point on images of a kind that it was not trained on.

    python -m benchmarks.accuracy.zero_shot --weights=weights/sam_mini.safetensors
    python -m benchmarks.accuracy.zero_shot --weights=… --side=128
    python -m benchmarks.accuracy.zero_shot --weights=… --scans=DIR --organs liver spleen

DIR holds scans as TotalSegmentator has them; without it, phantoms and held-out scenes are made.
Prompts are drawn from the true mask: its tight box, or its deepest pixel. Of the three masks the
one is taken that the model itself thinks best; "the box itself" is what the whole box has, taken
for the mask. IoU on the grid of the model's input, of every slice where the organ has
`LEAST_PIXELS` there: the mean over slices, ± the standard deviation of the scans' means.
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sammix_jax.config import default_config
from sammix_jax.data import datasets, volumes
from sammix_jax.data.masks import read_mask
from sammix_jax.data.phantom import DOMAINS, write_totalsegmentator
from sammix_jax.method.preprocess import window
from sammix_jax.models.sam.sam import Sam
from sammix_jax.models.sam.variants import get_variant
from sammix_jax.pretrain.score import (
    TEST,
    Prompted,
    held_out_scenes,
    make_answer,
    prompt_ious,
    prompted,
)
from sammix_jax.weights import read_weights

ORGANS = ("liver", "spleen", "kidney_left", "kidney_right")
LEAST_PIXELS = 16  # of a mask that is scored
PATIENTS = 6  # of a phantom domain
SEED = 77  # of phantoms that no config of this project makes


def variables_of(arrays: dict[str, np.ndarray]) -> dict:
    """What `Sam.apply` takes, in float32, from the arrays of a weight file."""
    params = {path: jnp.asarray(array, jnp.float32) for path, array in arrays.items()}
    return jax.device_put({"params": traverse_util.unflatten_dict(params, sep="/")})


def organ_slices(root, organ: str, side: int) -> list[Prompted]:
    """The slices of every scan below `root` that show the organ, prepared as for training."""
    found = []
    limits = default_config().input.window
    for scan in datasets.find_scans(root, organ):
        volume = volumes.read_volume(scan.image)
        truth = read_mask(scan.label, volume, scan.label_values, scan.known_values)
        geometry = volume.geometry(side, "fit")
        masks = np.stack([geometry.mask_to_square(mask) for mask in truth])
        shown = np.flatnonzero(masks.sum(axis=(1, 2)) >= LEAST_PIXELS)
        if len(shown):
            hu = np.stack([geometry.image_to_square(volume.hu[z]) for z in shown])
            images = np.asarray(window(jnp.asarray(hu), limits))
            found.append(prompted(images, masks[shown]))
    return found


def whole_box_ious(examples: Prompted) -> np.ndarray:
    """IoU (N,) of the boxes themselves, taken for masks: what a model has to surpass."""
    sides = examples.boxes[:, 2:] - examples.boxes[:, :2]
    return examples.masks.sum(axis=(1, 2)) / sides.prod(axis=1)


def row(name: str, answer, variables, scans: list[Prompted]) -> str:
    """A row of the table: IoU from a box, from a point, and of the box itself."""
    ious = [
        prompt_ious(answer, variables, scan) | {"whole box": whole_box_ious(scan)} for scan in scans
    ]
    cells = [name, str(len(scans)), str(sum(len(iou["box"]) for iou in ious))]
    for prompt in ("box", "point", "whole box"):
        values = np.concatenate([iou[prompt] for iou in ious])
        spread = np.std([iou[prompt].mean() for iou in ious], ddof=1) if len(scans) > 1 else None
        cells.append(f"{values.mean():.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--scans", help="a folder of scans, instead of phantoms and scenes")
    parser.add_argument("--organs", nargs="+", default=ORGANS)
    parser.add_argument("--side", type=int, help="of the input; default: that of the pretraining")
    flags = parser.parse_args()
    arrays, metadata = read_weights(flags.weights)
    sam, variables = Sam(variant=metadata["model"]), variables_of(arrays)
    # Only files that were pretrained here say it; the official SAMs have but one of both.
    native = get_variant(metadata["model"]).image_size
    side = flags.side or int(metadata.get("image_size", native))
    answer = make_answer(sam, metadata.get("normalise", "sam"))
    print("| images | scans | masks | IoU, box | IoU, point | the box itself |")
    print("|---|---|---|---|---|---|")
    if flags.scans:
        for organ in flags.organs:
            scans = organ_slices(flags.scans, organ, side)
            print(row(organ, answer, variables, scans), flush=True)
        return
    scenes = held_out_scenes(256, side, TEST)
    print(row("scenes, held out", answer, variables, [scenes]), flush=True)
    for name, domain in DOMAINS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_totalsegmentator(folder, PATIENTS, SEED, domain)
            for organ in flags.organs:
                scans = organ_slices(folder, organ, side)
                print(row(f"phantom, {name}: {organ}", answer, variables, scans), flush=True)


if __name__ == "__main__":
    main()
