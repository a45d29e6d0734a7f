"""What a training step of SAM-Mix shows its model: slices, augmented or not, and boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Toy

from sammix_jax.inference import make_predict
from sammix_jax.method.cam import mask_to_box
from sammix_jax.method.preprocess import scale_slices
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.systems.system import Microbatch
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import TrainState, make_init, make_train_step


class Seen(Exception):
    """Carries what a function was called with out of the code that called it."""


class Spy:
    """A model that shows what a training step gives it."""

    def apply(self, variables, images, *, boxes=None, **_):
        raise Seen(np.asarray(images), boxes)


def given_to_the_model(config, hu, masks, step=0):
    """The slices (B, H, W) and boxes with which a step calls the model."""
    state = TrainState(jnp.array(step), {"a/b": jnp.zeros(1)}, {}, {}, (), {})
    batch = {"hu": hu, "mask": masks, "image_label": np.ones(len(hu), np.int32)}
    with pytest.raises(Seen) as seen:
        layout = BatchLayout(len(masks), len(hu) - len(masks))
        system = SamMixSystem(Spy(), config)
        make_train_step(system, make_optimiser(config.train, 10), config, layout)(state, batch)
    return seen.value.args


def bright_organs():
    """Two slices with masks and one without; HU 100 in the organ, 0 elsewhere."""
    masks = np.zeros((3, 64, 64), np.uint8)
    masks[:, 20:44, 10:30] = 1
    return (masks * 100).astype(np.int16), masks[:2]


def test_the_true_box_prompts_in_training_where_asked_for(config):
    hu, masks = bright_organs()
    config.train.augment = False
    assert config.train.box == "cam" and given_to_the_model(config, hu, masks)[1] is None
    config.train.box = "gt"
    masks[1] = 0  # as augmentation may leave it
    _, boxes = given_to_the_model(config, hu, masks)
    np.testing.assert_array_equal(boxes, [[10, 20, 30, 44], [16, 16, 48, 48]])


def test_true_boxes_move_with_augmented_slices(config):
    hu, masks = bright_organs()
    config.train.augment, config.train.box = True, "gt"
    config.input.window = (-50.0, 150.0)  # the organ at 0.75, the rest at 0.25
    images, boxes = given_to_the_model(config, hu, masks)
    organ, empty = mask_to_box(images[:2] > 0.5)
    assert not empty.any()
    np.testing.assert_allclose(boxes, organ, atol=1.0)
    assert float(np.abs(boxes - np.array([10, 20, 30, 44])).max()) > 2


def test_augment_and_seed_decide_what_the_model_sees(config):
    hu, masks = bright_organs()
    config.train.augment = False
    plain, _ = given_to_the_model(config, hu, masks)
    np.testing.assert_array_equal(plain, scale_slices(hu, config.input))
    config.train.augment = True
    one, again, later = (given_to_the_model(config, hu, masks, step)[0] for step in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    config.seed = 1
    other, _ = given_to_the_model(config, hu, masks, 3)
    for images in (plain, later, other):
        assert float(np.abs(one - images).max()) > 0.1


class Watched(Toy):
    """Remembers what it was shown, and of how many slices it was to give masks."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def apply(self, variables, images, *, segmented, **rest):
        self.shown.append((np.asarray(images), segmented))
        return super().apply(variables, images, segmented=segmented, **rest)


def test_the_teacher_sees_plain_slices_and_the_student_distorted_ones(config):
    hu, masks = bright_organs()
    config.consistency.weight, config.train.augment = 1.0, False
    layout, model = BatchLayout(2, 1), Watched()
    labels = jnp.array([1, 1, -1])
    part = Microbatch(
        hu=jnp.asarray(hu),
        mask=jnp.asarray(masks),
        image_label=labels,
        key=jax.random.split(jax.random.key(0), 3),
        labels=labels[None],
        step=jnp.array(0),
        layout=layout,
    )
    variables = model.init(None, None, segmented=1)
    SamMixSystem(model, config).loss(variables, part, teacher=variables)
    (plain, of_teacher), (distorted, of_student) = model.shown
    images = np.asarray(scale_slices(jnp.asarray(hu), config.input))
    np.testing.assert_array_equal(plain, images[2:])
    assert (of_teacher, of_student) == (1, 3)
    assert (np.abs(distorted - images).max(axis=(1, 2)) > 0.01).all()


def test_prediction_is_prompted_by_the_cam_whatever_trained(config):
    """It cannot read `train.box`: a config without that section is all it needs."""
    hu, _ = bright_organs()
    system = SamMixSystem.of(config)
    state = jax.eval_shape(make_init(system, make_optimiser(config.train, 10), config))
    config.unlock()
    del config.train
    found = jax.eval_shape(make_predict(system, config, ("cam",)), state.variables, hu, None)
    assert found.logits["cam"].shape == found.cam.shape == (3, 64, 64)
