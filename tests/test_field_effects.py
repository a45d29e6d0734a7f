"""What those fields of the config change that belong to no one module's tests."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from sammix_jax.data import datasets, phantom
from sammix_jax.data.phantom import DOMAINS
from sammix_jax.data.slices import SliceId
from sammix_jax.data.split_files import load_or_draw
from sammix_jax.evaluate import evaluate
from sammix_jax.inference import make_predict, predict_slices
from sammix_jax.method.consistency import follow, pseudo_masks, ramp
from sammix_jax.prepare import prepare
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems import sam_mix as sam_mix_system
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.systems.system import OUTSIDE
from sammix_jax.training import step as train_step
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import make_init, make_train_step


class Stopped(Exception):
    """Ends a call where a spy has seen enough; carries what it saw."""


def stop(*args, **kwargs):
    raise Stopped(*args, *kwargs.values())


def test_the_phantom_is_made_as_configured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "write_lits", stop)
    made = config.data.phantom
    made.scans, made.unlabelled, made.domain, made.seed = 7, 3, "unenhanced", 11
    with pytest.raises(Stopped) as stopped:
        prepare(config, tmp_path)
    folder, *about = stopped.value.args
    assert about == [7, 11, DOMAINS["unenhanced"], 3]
    made.seed = 12
    with pytest.raises(Stopped) as stopped:
        prepare(config, tmp_path)
    assert stopped.value.args[0] != folder


def test_size_resize_and_central_part_shape_the_store(config, write_scan, ct, tmp_path):
    """A scan of 20 × 16 pixels and 9 slices, all of it organ, on squares of `size` pixels."""
    ct = np.concatenate([ct, ct[..., :3]], axis=2)
    config.data.root = str(write_scan("scans/volume-0.nii", ct).parent)
    write_scan("scans/segmentation-0.nii", np.ones(ct.shape, np.uint8))

    def masks(run):
        store = prepare(config, tmp_path / run)
        return np.stack([store.mask(s) for s in store.slices("volume-0")])

    config.data.size, config.data.resize, config.data.central_fraction = 40, "fit", 1.0
    fitted = masks("fit")
    assert fitted.shape == (9, 40, 40)
    assert fitted.any((0, 2)).sum() == 32 and fitted.any((0, 1)).sum() == 40  # rows padded
    config.data.resize, config.data.size = "stretch", 24
    stretched = masks("stretch")
    assert stretched.shape == (9, 24, 24) and stretched.all()
    config.data.central_fraction = 0.5
    assert len(masks("central")) == len(range(2, 6))  # ceil(4 - 2) to floor(4 + 2)


def test_organ_and_label_values_choose_the_masks(config, tmp_path, monkeypatch):
    """For training, and for a folder that is only scored; test_datasets.py has what they choose."""
    monkeypatch.setattr(datasets, "find_scans", stop)
    config.data.root, config.data.organ, config.data.label_values = "scans", "spleen", (3, 4)
    config.data.ignore_value = 9
    with pytest.raises(Stopped) as stopped:
        prepare(config, tmp_path)
    assert stopped.value.args[1:] == ("spleen", (3, 4), 9)
    config.evaluate.root, config.evaluate.label_values = "others", (5,)
    config.evaluate.ignore_value = 6
    with pytest.raises(Stopped) as stopped:
        evaluate(config, tmp_path)
    assert stopped.value.args[:4] == ("others", "spleen", (5,), 6)


class FakeStore:
    """Eight labelled scans of ten slices, the organ on the upper five."""

    def __init__(self):
        self.records = {
            name: types.SimpleNamespace(
                name=name, has_label=True, unannotated=(), image_digest=name, label_digest=name
            )
            for name in "abcdefgh"
        }

    def slices(self, scan):
        return tuple(SliceId(scan, position) for position in range(10))

    def image_label(self, s):
        return int(s.position >= 5)

    def has_mask(self, s):
        return True

    def mask(self, s):
        return np.full((2, 2), self.image_label(s), np.uint8)


def test_seeds_and_counts_of_the_draw(config, tmp_path):
    """`seed` draws patients, `labels_seed` their slices; neither disturbs the other."""
    data = config.data
    data.split, data.labelled_slices, data.seed, data.labels_seed = (5, 1, 2), 6, 0, 0

    def draw():
        return load_or_draw(config, FakeStore(), tmp_path)

    split, labels = draw()
    assert (len(split.train), len(split.val), len(split.test)) == (5, 1, 2)
    assert len(set(labels)) == 6 and {s.scan for s in labels} <= set(split.train)
    data.labels_seed = 1
    again, others = draw()
    assert again == split and set(others) != set(labels)
    data.labels_seed, data.seed = 0, 1
    assert draw()[0] != split
    data.labelled_slices = 0
    assert len(draw()[1]) == 5 * 5


def test_the_teachers_fields_reach_the_step(config, monkeypatch):
    """Traced, not run; test_consistency.py has what the functions make of them."""
    seen = {}

    def spy(function, *args):
        seen[function.__name__] = args
        return function(*args)

    for module, function in (
        (sam_mix_system, pseudo_masks),
        (sam_mix_system, ramp),
        (train_step, follow),
    ):
        monkeypatch.setattr(module, function.__name__, functools.partial(spy, function))
    batch = {
        "hu": np.zeros((3, 64, 64), np.int16),
        "mask": np.zeros((1, 64, 64), np.uint8),
        "image_label": np.ones(3, np.int32),
    }

    def trace():
        seen.clear()
        system = SamMixSystem.of(config)
        optimiser = make_optimiser(config.train, 10)
        state = jax.eval_shape(make_init(system, optimiser, config))
        step = make_train_step(system, optimiser, config, BatchLayout(1, 2))
        return jax.eval_shape(step, state, batch)

    teacher = config.consistency
    assert teacher.weight == 0
    state, metrics = trace()
    assert not seen and not state.teacher and "consistency_loss" not in metrics
    teacher.weight, teacher.ema, teacher.confidence = 0.5, 0.75, 0.8
    teacher.start_step, teacher.ramp_steps = 4, 13
    state, metrics = trace()
    assert set(state.teacher) == set(state.trainable) and "consistency_loss" in metrics
    assert seen["pseudo_masks"][0].shape == (2, 64, 64)  # the slices without masks
    assert seen["pseudo_masks"][-1] == 0.8
    assert seen["ramp"][1:] == (4, 13)
    assert seen["follow"][-1] == 0.75


@pytest.fixture(scope="module")
def prediction():
    """`predict(probability, **evaluate)`: five slices, by a model whose classifier gives all the
    same probability; and the slices."""
    config = small_config()
    system = SamMixSystem.of(config)
    hu = np.random.default_rng(0).normal(0, 100, (5, 64, 64)).astype(np.int16)
    truth = np.zeros((5, 64, 64), bool)
    truth[:4, 10:30, 20:50] = True
    like = jax.eval_shape(make_init(system, make_optimiser(config.train, 10), config))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.1, 0.3, leaf.shape), jnp.float32), like.variables
    )

    @functools.cache
    def compiled(protocols, gate):
        config.evaluate.gate = gate
        return make_predict(system, config, protocols)

    def predict(probability, protocols=SamMixSystem.protocols, gate=True, batch=5):
        head = variables["params"]["classifier"]["head"]
        head["kernel"] = jnp.zeros_like(head["kernel"])
        head["bias"] = jnp.array([0.0, np.log(probability / (1 - probability))])
        return predict_slices(compiled(tuple(protocols), gate), variables, hu, truth, batch)

    return predict


def test_the_gate_empties_slices_called_negative(prediction):
    """Of the automatic protocols alone: a box of the truth knows that the organ is there."""
    gated, open_ = (prediction(0.1, gate=gate).logits for gate in (True, False))
    for protocol in ("cam", "none"):
        assert (gated[protocol] == OUTSIDE).all()
        assert not (open_[protocol] == OUTSIDE).any()
    np.testing.assert_array_equal(gated["gt_box"], open_["gt_box"])
    positive = (prediction(0.9, gate=gate).logits for gate in (True, False))
    jax.tree.map(np.testing.assert_array_equal, *positive)


def test_protocols_and_their_masks(prediction):
    """Only what is asked for is computed, and alike whatever else is."""
    every = prediction(0.9).logits
    assert set(every) == set(SamMixSystem.protocols)
    assert (every["gt_box"][4] == OUTSIDE).all()  # no truth, no box, no mask
    one = prediction(0.9, protocols=("none",)).logits
    assert set(one) == {"none"}
    np.testing.assert_allclose(one["none"], every["none"], rtol=1e-5, atol=1e-4)


def test_masks_do_not_depend_on_the_batch(prediction):
    whole, parts = prediction(0.9, batch=5), prediction(0.9, batch=2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)  # logits reach 60
