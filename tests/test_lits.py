"""The paper's own configuration takes steps: ViT-B at 1024, ResNet-38, random weights."""

import math

import jax
import numpy as np
import pytest

from configs import lits
from sammix_jax.data import phantom
from sammix_jax.prepare import prepare
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.train import train
from sammix_jax.training.log import read_log
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import make_init, make_train_step


def test_the_papers_step_is_sound_in_shape():
    """Traced, not run: what is trained, and that the step maps a state to one of the same shape."""
    config = lits.get_config()
    system, optimiser = SamMixSystem.of(config), make_optimiser(config.train, 10)
    state = jax.eval_shape(make_init(system, optimiser, config))
    size = config.data.size
    batch = {
        "hu": jax.ShapeDtypeStruct((2, size, size), np.int16),
        "mask": jax.ShapeDtypeStruct((1, size, size), np.uint8),
        "image_label": jax.ShapeDtypeStruct((2,), np.int32),
    }
    step = make_train_step(system, optimiser, config, BatchLayout(1, 1))
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()

    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    lora = 12 * 2 * 2 * 768 * 8  # blocks, q and v, A and B
    prompts_and_decoder, head = 6_220 + 4_058_340, 4096 * 2 + 2
    assert count(state.trainable) == lora + prompts_and_decoder + 105_070_912 + head
    assert count(state.frozen) == 89_670_912 + 2 * 128  # the encoder, the Gaussian matrix


@pytest.mark.slow
def test_two_steps_of_the_papers_run(tmp_path):
    phantom.write_lits(tmp_path / "scans", 3, seed=0)
    config = lits.get_config()
    config.data.root = str(tmp_path / "scans")
    config.data.labelled_slices = 5
    config.data.split = (3, 0, 0)
    config.evaluate.part = "train"
    config.train.steps = 2
    config.log.every_steps = 1
    store = prepare(config, tmp_path / "run")
    assert store.hu(store.slices("volume-0")[0]).shape == (256, 256)
    assert train(config, tmp_path / "run", store) is True

    log = read_log(tmp_path / "run")
    losses = [value for _, name, value in log if name == "train/loss"]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
