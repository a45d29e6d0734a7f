"""The teacher: what it says, how it follows, and that slices without masks train the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Toy

from sammix_jax.data.slices import SliceStore
from sammix_jax.data.split_files import kept_split
from sammix_jax.data.splits import Split, taught_scans
from sammix_jax.method.consistency import follow, pseudo_masks, ramp
from sammix_jax.method.losses import bce_loss, dice_loss
from sammix_jax.sharding import BatchLayout, abstract, make_mesh, replicated
from sammix_jax.systems.sam_mix import SamMixSystem, _views
from sammix_jax.systems.system import Microbatch
from sammix_jax.train import slices_without_masks
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import TrainState, make_init, make_train_step


def test_only_confident_pixels_count():
    logits = jnp.array([[[3.0, 0.1], [-0.1, -3.0]]])
    target, valid = pseudo_masks(logits, jnp.array([1]), confidence=0.9)
    np.testing.assert_array_equal(target[0], [[1, 1], [0, 0]])
    np.testing.assert_array_equal(valid[0], [[True, False], [False, True]])


def test_an_image_level_label_overrules_the_teacher():
    logits = jnp.full((3, 2, 2), 5.0)
    target, valid = pseudo_masks(logits, jnp.array([1, 0, -1]), confidence=0.9)
    np.testing.assert_array_equal(target[:, 0, 0], [1, 0, 1])
    assert valid.all()
    _, unsure = pseudo_masks(jnp.zeros((3, 2, 2)), jnp.array([1, 0, -1]), confidence=0.9)
    np.testing.assert_array_equal(unsure[:, 0, 0], [False, True, False])


def test_the_teacher_sends_no_gradient():
    gradient = jax.grad(lambda x: pseudo_masks(x, jnp.array([1]), 0.6).target.sum())
    assert not gradient(jnp.ones((1, 2, 2))).any()


def test_the_teacher_follows_late_more_slowly():
    old, new = {"a": jnp.zeros(1)}, {"a": jnp.ones(1)}
    assert float(follow(old, new, jnp.array(0), 0.99)["a"][0]) == pytest.approx(0.9)
    assert float(follow(old, new, jnp.array(10_000), 0.99)["a"][0]) == pytest.approx(0.01)


def test_ramp():
    values = [float(ramp(jnp.array(s), 10, 4)) for s in (0, 8, 10, 11, 13, 50)]
    assert values == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert [float(ramp(jnp.array(s), 3, 0)) for s in (1, 3)] == [0.0, 1.0]


def test_pixels_that_do_not_count_change_nothing():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (2, 4, 4))
    target = (jax.random.uniform(key, (2, 4, 4)) > 0.5).astype(jnp.float32)
    valid = jnp.zeros((2, 4, 4), bool).at[:, :2].set(True)
    other = jnp.where(valid, logits, -logits + 3)
    for loss in (dice_loss, bce_loss):
        a, b = (loss(x, target, valid=valid) for x in (logits, other))
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert float(jnp.abs(loss(logits, target) - loss(other, target))) > 1e-3
        all_valid = loss(logits, target, valid=jnp.ones_like(valid))
        np.testing.assert_allclose(all_valid, loss(logits, target), rtol=1e-6)


@pytest.fixture
def taught(config):
    config.consistency.weight = 1.0
    config.consistency.ramp_steps = 0
    config.consistency.confidence = 0.5
    config.loss.classification = 0.0
    config.loss.segmentation = 0.0
    return config


def test_slices_without_masks_train_the_segmentation(taught):
    """From `start_step` on; their classification and the labelled slices are silenced here."""
    taught.consistency.start_step = 5
    taught.train.schedule, taught.train.warmup_steps = "constant", 0
    system, optimiser = SamMixSystem(Toy(), taught), make_optimiser(taught.train, 30)
    state = jax.jit(make_init(system, optimiser, taught))()
    batch = {
        "hu": np.random.default_rng(0).normal(0, 100, (4, 64, 64)).astype(np.int16),
        "mask": np.zeros((2, 64, 64), np.uint8),
        "image_label": np.array([1, 1, -1, -1], np.int32),
    }
    step = jax.jit(make_train_step(system, optimiser, taught, BatchLayout(2, 2)))
    assert set(state.teacher) == set(state.trainable)
    _, before = step(state, batch)
    assert before["consistency_loss"] > 0 and before["confident_pixels"] == 1
    assert before["loss"] == 0 and before["gradient_norm"] == 0
    state = state.replace(step=jnp.array(5))
    after, metrics = step(state, batch)
    assert metrics["loss"] == metrics["consistency_loss"] and metrics["gradient_norm"] > 0
    kept = 6 / 15  # the teacher's share in its sixth step
    expected = kept * state.teacher["sam/kernel"] + (1 - kept) * after.trainable["sam/kernel"]
    np.testing.assert_allclose(after.teacher["sam/kernel"], expected, rtol=1e-6)


def test_both_views_and_the_masks_are_in_register(taught):
    """Bright squares on dark ground stay where their masks are, in either view."""
    taught.train.augment = True
    masks = np.zeros((6, 64, 64), np.float32)
    masks[:, 20:40, 14:44] = 1
    taught.input.window = (0, 1000)
    labels = jnp.ones(6, jnp.int32)
    part = Microbatch(
        hu=jnp.asarray(300 + 400 * masks),
        mask=jnp.asarray(masks[:2]),
        image_label=labels,
        key=jax.random.split(jax.random.key(3), 6),
        labels=labels[None],
        step=jnp.array(0),
        layout=BatchLayout(2, 4),
    )
    weak, strong, moved = _views(part, taught)
    assert float(jnp.abs(moved - masks[:2]).sum()) > 100  # they were moved
    for i in range(6):
        # Beyond the slice's edge is air, at 0; the square is what lies above the middle.
        square = weak[i] > 0.5
        if i < 2:
            assert float(jnp.mean(square == (moved[i] > 0))) > 0.99
        ground = (weak[i] > 0.29) & (weak[i] < 0.31)
        assert float(strong[i][square].mean() - strong[i][ground].mean()) > 0.15
    # All slices alike: how much they are distorted must not tell which of them lend masks.
    for some in (slice(0, 2), slice(2, None)):
        assert float(jnp.abs(strong[some] - weak[some]).mean()) > 0.01
    again = _views(part, taught)
    np.testing.assert_array_equal(strong, again[1])


def test_the_teacher_is_kept_with_the_run(tmp_path):
    leaf = lambda value: {"a": jnp.full((2, 3), value)}  # noqa: E731
    state = TrainState(jnp.array(4), leaf(1.0), {}, leaf(2.0), leaf(3.0), teacher=leaf(4.0))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, 4)
    with Checkpoints(tmp_path) as checkpoints:
        kept = checkpoints.restore(abstract(jax.eval_shape(lambda: state), replicated(make_mesh())))
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_the_papers_mode_has_no_teacher(config):
    state = jax.eval_shape(
        make_init(SamMixSystem.of(config), make_optimiser(config.train, 30), config)
    )
    assert config.consistency.weight == 0 and state.teacher == {}


def test_unlabelled_scans_join_where_there_is_a_teacher(workdir, config):
    store, split = SliceStore.open(workdir / "store"), kept_split(workdir)
    (unlabelled,) = (name for name, record in store.records.items() if not record.has_label)
    labelled = store.slices(split.train[0])[:3]
    paper = slices_without_masks(config, store, split, labelled)
    assert {s.scan for s in paper} == set(split.train) and not set(labelled) & set(paper)
    config.consistency.weight = 1.0
    taught = slices_without_masks(config, store, split, labelled)
    assert set(taught) == {*paper, *store.slices(unlabelled)}
    assert store.image_label(store.slices(unlabelled)[0]) == -1


def test_the_teacher_keeps_off_patients_who_validate_or_test():
    split = Split(("p1_portal",), ("p2_portal",), ("p3_portal",))
    without = [f"p{n}_arterial" for n in range(1, 5)]
    assert taught_scans(without, split, r"^p\d") == ("p1_arterial", "p4_arterial")
    assert taught_scans(without, split, "") == tuple(without)
