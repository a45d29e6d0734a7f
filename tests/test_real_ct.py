"""Real files run through the whole chain: a check that it learns, no claim of accuracy.

One patient trains and is scored on its own labelled slices; another one is predicted.
"""

import nibabel as nib
import numpy as np
import pytest

from configs import quickstart
from sammix_jax.evaluate import evaluate
from sammix_jax.predict import predict
from sammix_jax.prepare import prepare
from sammix_jax.train import train


@pytest.mark.parametrize(
    ("start", "steps", "least_dice"),
    [
        pytest.param("pretrained", 30, 0.60, id="short"),
        pytest.param("random", 400, 0.80, id="whole", marks=pytest.mark.slow),
    ],
)
def test_learns_the_right_kidney(sample, tmp_path, start, steps, least_dice):
    config = quickstart.get_config(start)
    config.data.root = str(sample)
    config.data.organ = "kidney_right"
    config.data.split = (1, 0, 0)
    config.data.labelled_slices = 0  # every slice of s0001 that shows it
    config.train.steps = steps
    config.train.batch_labelled = 4
    config.train.batch_unlabelled = 4
    config.train.augment = False
    config.evaluate.part = "train"
    config.evaluate.protocols = ("cam",)
    store = prepare(config, tmp_path)
    assert [r.has_label for r in store.records.values()] == [True, False]
    train(config, tmp_path, store)

    summary = evaluate(config, tmp_path).summary["cam"]
    assert summary["slice_dice"]["mean"] >= least_dice

    scan = sample / "s0002" / "ct.nii.gz"
    (made,) = predict(config, tmp_path, scan, tmp_path / "s0002.nii.gz")
    mask, source = nib.load(made.mask), nib.load(scan)
    assert mask.shape == source.shape
    np.testing.assert_array_equal(mask.affine, source.affine)
