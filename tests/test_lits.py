"""The paper's own configuration builds and takes steps: ViT-B at 1024, ResNet-38, random weights."""

import math

import numpy as np
import pytest

from configs import lits
from sammix_jax.config import claim_workdir
from sammix_jax.data import phantom
from sammix_jax.prepare import prepare
from sammix_jax.train import train
from sammix_jax.train_log import read_log


@pytest.mark.slow
def test_two_steps_of_the_papers_run(tmp_path):
    phantom.write_lits(tmp_path / "scans", 3, seed=0)
    config = lits.get_config()
    config.data.root = str(tmp_path / "scans")
    config.data.labelled_slices = 5
    config.data.split = (3, 0, 0)
    config.train.steps = 2
    config.log.every_steps = 1
    claim_workdir(config, tmp_path / "run")
    store = prepare(config, tmp_path / "run")
    assert store.hu(store.slices("volume-0")[0]).shape == (256, 256)
    assert train(config, tmp_path / "run", store) is True

    log = read_log(tmp_path / "run")
    losses = [value for _, name, value in log if name == "train/loss"]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert np.ptp(losses) > 0
