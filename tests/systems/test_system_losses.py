"""What each baseline learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_systems import SIDE, batch_of, microbatch, tiny_config

from sammix_jax.method.losses import bce_loss, cross_entropy, dice_loss
from sammix_jax.models.baselines.unet import NnUnet2d
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.named import make_system
from sammix_jax.systems.segmenter import NnUnetSystem
from sammix_jax.systems.views import view_masked
from sammix_jax.training.step import make_init, make_train_step


def test_augmentation_is_the_one_named():
    part = microbatch(BatchLayout(2, 2), batch_of())
    views = {
        kind: view_masked(part, tiny_config("unet", **{"train.augment": True, **{field: kind}}))
        for field, kind in (("train.augmentation", kind) for kind in ("standard", "nnunet"))
    }
    plain = view_masked(part, tiny_config("unet"))
    assert float(jnp.abs(views["standard"].images - views["nnunet"].images).max()) > 0.1
    for view in views.values():
        assert float(jnp.abs(view.images - plain.images).max()) > 0.1
        assert view.masks[:2].any() and not view.masks[2:].any()


def test_negatives_have_empty_masks_and_unknown_labels_no_say():
    part = microbatch(BatchLayout(2, 2), batch_of())
    view = view_masked(part, tiny_config("unet"))
    np.testing.assert_array_equal(view.counted, [1, 1, 1, 0])
    assert view.masks[:2].any() and not view.masks[2:].any() and float(view.share) == 1
    without = view_masked(part, tiny_config("unet", **{"loss.negatives": False}))
    assert len(without.images) == 2 and without.counted.all() and float(without.share) == 1
    alone = view_masked(microbatch(BatchLayout(2, 0), batch_of(2, 0)), tiny_config("unet"))
    assert len(alone.images) == 2 and float(alone.share) == 1


def test_the_loss_of_a_segmenter_is_that_of_its_known_masks():
    """Computed slice by slice here; the share makes parts of a batch add up to the whole."""
    config = tiny_config("unet", **{"loss.segmentation": 0.5, "loss.bce": 0.3})
    system = NnUnetSystem(NnUnet2d((4, 4, 6, 8)), config)
    batch = batch_of()
    images = (np.clip(batch["hu"].astype(np.float32), -160, 240) + 160) / 400
    variables = jax.jit(system.init)(jax.random.key(0), images[:1])
    part = microbatch(BatchLayout(2, 2), batch)
    loss, (metrics, stats) = jax.jit(lambda v: system.loss(v, part))(variables)
    output = jax.jit(lambda v: system.model.apply(v, images[..., None], train=True))(variables)
    (deep,) = output.deep
    masks = np.zeros((4, SIDE, SIDE), np.float32)
    masks[:2] = batch["mask"]

    def mean(loss_of):
        return np.mean([loss_of(i) for i in range(3)])

    def both(logits, truth):
        return lambda i: dice_loss(logits[i], truth[i]) + 0.3 * bce_loss(logits[i], truth[i])

    fine, coarse = mean(both(output.logits, masks)), mean(both(deep, masks[:, 1::2, 1::2]))
    assert float(loss) == pytest.approx(0.5 * (2 / 3 * fine + 1 / 3 * coarse), rel=1e-4)
    for name, part_of in (("dice_loss", dice_loss), ("bce_loss", bce_loss)):
        expected = mean(lambda i, part_of=part_of: part_of(output.logits[i], masks[i]))
        assert float(metrics[name]) == pytest.approx(expected, rel=1e-4), name
    assert stats == {}


def test_multimix_adds_up_and_says_whose_labels_count():
    """Without dropout: every part of the loss computed here from the network's answers."""
    settings = {"train.augment": False, "loss.classification": 0.7, "loss.segmentation": 5.0}
    config = tiny_config("multimix", **settings)
    config.multimix.confidence, config.multimix.unsupervised, config.multimix.kl = 0.5, 0.25, 0.1
    system = make_system(config)
    system = type(system)(system.model.clone(dropout=0.0), config)
    batch = batch_of()
    part = microbatch(BatchLayout(2, 2), batch)
    variables = jax.jit(system.init)(jax.random.key(0), jnp.zeros((1, SIDE, SIDE)))
    loss, (metrics, _) = jax.jit(lambda v: system.loss(v, part))(variables)
    images = (np.clip(batch["hu"].astype(np.float32), -160, 240) + 160) / 400
    output = jax.jit(lambda v: system.model.apply(v, images[..., None]))(variables)
    labels = np.array([1, 1, 0])
    assert float(metrics["classification_loss"]) == pytest.approx(
        float(cross_entropy(output.class_logits[:3], labels)), rel=1e-4
    )
    p, q = (
        np.asarray(jax.nn.sigmoid(output.logits[i]), np.float64) for i in (slice(2), slice(2, 4))
    )
    kl = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert float(metrics["kl_loss"]) == pytest.approx(kl, abs=1e-6)
    masks = np.zeros((3, SIDE, SIDE), np.float32)
    masks[:2] = batch["mask"]
    segmentation = dice_loss(output.logits[:3], masks) + bce_loss(output.logits[:3], masks)
    assert float(metrics["pseudo_label_loss"]) > 0  # confident of either class at 0.5
    parts = 0.7 * metrics["classification_loss"] + 0.25 * metrics["pseudo_label_loss"]
    assert float(loss) == pytest.approx(float(parts + 5 * segmentation) + 0.1 * kl, rel=1e-4)
    config.multimix.confidence, config.multimix.kl_form = 1.0, "published"
    config.multimix.image_labels = "labelled"
    _, (published, _) = jax.jit(lambda v: system.loss(v, part))(variables)
    assert float(published["pseudo_label_loss"]) == float(published["kl_loss"]) == 0
    ones = published["classification_loss"]
    expected = float(cross_entropy(output.class_logits[:2], labels[:2]))
    assert float(ones) == pytest.approx(expected, rel=1e-4)


def test_a_step_is_the_same_on_one_shard_and_on_two():
    """With augmentation, dropout, negatives and unknown labels, on U-Net, which keeps slices apart;
    and the same in two parts as in one."""
    config = tiny_config("unet", **{"train.augment": True, "train.augmentation": "nnunet"})
    batch = batch_of(4, 4)
    system, optimiser = make_system(config), optax.sgd(0.1)
    state = jax.jit(make_init(system, optimiser, config))()

    def after(layout):
        order = layout.order
        rows = {8: order, 4: order[order < 4]}
        ordered = {name: array[rows[len(array)]] for name, array in batch.items()}
        return jax.jit(make_train_step(system, optimiser, config, layout))(state, ordered)

    (whole, metrics), (parts, others) = after(BatchLayout(4, 4)), after(BatchLayout(4, 4, 2, 2))
    assert system.model.dropout > 0
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
    for path, leaf in whole.trainable.items():
        np.testing.assert_allclose(leaf, parts.trainable[path], rtol=1e-4, atol=1e-6)
