"""Real files run through the whole chain: a check that it learns, no claim of accuracy.

One patient trains and is scored on its own labelled slices; another one is predicted.
"""

import nibabel as nib
import numpy as np

from configs import quickstart
from sammix_jax.config import claim_workdir
from sammix_jax.evaluate import evaluate
from sammix_jax.predict import predict
from sammix_jax.prepare import prepare
from sammix_jax.train import train


def test_learns_the_right_kidney(sample, tmp_path):
    config = quickstart.get_config()
    config.data.root = str(sample)
    config.data.organ = "kidney_right"
    config.data.split = (1, 0, 0)
    config.data.labelled_slices = 0  # every slice of s0001 that shows it
    config.train.steps = 150
    config.train.batch_labelled = 4
    config.train.batch_unlabelled = 4
    config.train.augment = False
    config.evaluate.part = "train"
    config.evaluate.protocols = ("cam",)
    claim_workdir(config, tmp_path)
    store = prepare(config, tmp_path)
    assert [r.has_label for r in store.records.values()] == [True, False]
    train(config, tmp_path, store)

    summary = evaluate(config, tmp_path).summary["cam"]
    assert summary["slice_dice"]["mean"] >= 0.80

    scan = sample / "s0002" / "ct.nii.gz"
    (made,) = predict(config, tmp_path, scan, tmp_path / "s0002.nii.gz")
    mask, source = nib.load(made.mask), nib.load(scan)
    assert mask.shape == source.shape
    np.testing.assert_array_equal(mask.affine, source.affine)
    assert np.asarray(mask.dataobj).any()
