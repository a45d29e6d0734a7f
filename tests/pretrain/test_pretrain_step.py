"""The step of promptable pretraining, on a SAM small enough to be compiled in a moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import TWO_BLOCKS, draw_rectangles

from configs.pretrain_mini import get_config
from sammix_jax.models.sam.sam import Sam
from sammix_jax.pretrain import step as step_module
from sammix_jax.pretrain.scenes import SHAPES, Scenes
from sammix_jax.pretrain.step import (
    affinity_loss,
    choose_shapes,
    make_init,
    make_pretrain_step,
    promptable_loss,
)
from sammix_jax.sharding import make_mesh
from sammix_jax.training.optim import make_optimiser


@pytest.fixture(scope="module")
def tiny():
    """A compiled step, a new state and the config."""
    config = get_config()
    config.model.image_size = 32
    config.pretrain.images = 3
    config.pretrain.prompts = 2
    config.train.warmup_steps = 0
    config.train.steps = 10
    optimiser = make_optimiser(config.train, config.train.steps)
    sam = Sam(variant=TWO_BLOCKS)
    state = jax.jit(make_init(sam, optimiser, config))()
    mesh = make_mesh(1, jax.devices()[:1])
    step = jax.jit(make_pretrain_step(sam, optimiser, config, mesh, side=32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "draw_scenes", draw_rectangles)
        # What it does for the encoder must not hide what prompts fail to teach.
        patch.setattr(step_module, "AFFINITY", 0.0)
        step(state, jnp.arange(3))  # compiled here, with these scenes
    return step, state


def test_every_trained_leaf_learns_and_the_constant_stays(tiny):
    step, state = tiny
    after, metrics = step(state, jnp.arange(3))
    gradients = dict(
        zip(sorted(state.trainable), np.asarray(metrics["leaf_norms"][0]), strict=True)
    )
    # Softmax takes no notice of what is added to all keys alike: their biases have no gradient.
    idle = {path for path, norm in gradients.items() if norm < 1e-7}
    # Of the three masks only the best one learns, and it may be the same one for all prompts.
    assert all("k_proj/bias" in p or "/hypernetwork_" in p for p in idle), sorted(idle)
    assert not any("/hypernetwork_0/" in path for path in idle)
    assert len({path.split("/")[2] for path in idle if "/hypernetwork_" in path}) < 3
    constant = "sam/prompt_encoder/position_encoding/gaussian_matrix"
    assert list(state.frozen) == [constant]
    np.testing.assert_array_equal(state.frozen[constant], after.frozen[constant])
    assert int(after.step) == 1 and np.isfinite(float(metrics["loss"]))
    for name in ("iou_box", "iou_box_corrected", "iou_point", "iou_point_corrected"):
        assert 0 <= float(metrics[name]) <= 1


def test_random_weights_look_where_they_are_asked(tiny):
    _, state = tiny
    kernels = {path: x for path, x in state.trainable.items() if path.endswith("k_proj/kernel")}
    alike = {
        path: np.array_equal(x, state.trainable[path.replace("k_proj", "q_proj")])
        for path, x in kernels.items()
    }
    assert alike == {path: "self_attn" not in path for path in kernels} and len(kernels) == 7
    bias = state.trainable["sam/image_encoder/patch_embed/bias"]
    assert 0.5 < np.std(bias) < 1.5


def test_a_step_is_a_function_of_seed_and_step_not_of_where_an_image_lies(tiny):
    step, state = tiny
    first, _ = step(state, jnp.arange(3))
    again, _ = step(state, jnp.arange(3))
    _, turned_metrics = step(state, jnp.array([2, 0, 1]))
    _, other_metrics = step(state.replace(step=state.step + 1), jnp.arange(3))
    for path in first.trainable:
        np.testing.assert_array_equal(first.trainable[path], again.trainable[path])
    _, metrics = step(state, jnp.arange(3))
    np.testing.assert_allclose(turned_metrics["loss"], metrics["loss"], rtol=1e-5)
    assert abs(float(other_metrics["loss"] - metrics["loss"])) > 1e-3


@pytest.mark.parametrize(("prompts", "rounds"), [(2, 1), (6, 3)])
def test_prompts_and_rounds_say_how_often_a_scene_is_asked(prompts, rounds, monkeypatch):
    config = get_config()
    config.pretrain.prompts, config.pretrain.rounds = prompts, rounds
    asked, decode = [], Sam.decode

    def spy(self, embeddings, **prompt):
        arrays = {name: x for name, x in prompt.items() if hasattr(x, "shape")}
        asked.append({name: x.shape[1:3] for name, x in arrays.items()})
        return decode(self, embeddings, **prompt)

    monkeypatch.setattr(Sam, "decode", spy)
    sam, keys = Sam(variant=TWO_BLOCKS), jax.random.split(jax.random.key(0), 2)

    def loss():
        masks = jnp.zeros((2, SHAPES, 32, 32), bool)
        scenes = Scenes(jnp.zeros((2, 32, 32)), masks, jnp.zeros((2, 32, 32), jnp.int32))
        variables = sam.init(keys[0], jnp.zeros((1, 32, 32, 3)))
        asked.clear()
        return promptable_loss(sam, variables, scenes, keys, config.pretrain, "unit")

    jax.eval_shape(loss)
    assert len(asked) == 2 * rounds
    boxes, points = asked[:rounds], asked[rounds:]
    half = prompts // 2
    for number, kinds in enumerate(boxes):
        assert kinds["boxes"][0] == half
        assert kinds.get("points", (half, 0)) == (half, number)
        assert ("masks" in kinds) == (number > 0)
    for number, kinds in enumerate(points):
        assert "boxes" not in kinds and kinds["points"] == (half, number + 1)


def test_shapes_to_prompt_are_neither_specks_nor_the_whole_image():
    masks = np.zeros((2, SHAPES, 32, 32), bool)
    masks[:, 0] = True  # the whole image
    masks[:, 1, :2, :2] = True  # a speck
    masks[:, 2, :16, :16] = True
    masks[:, 3, 8:24, 8:16] = True
    keys = jax.random.split(jax.random.key(0), 2)
    chosen, there = choose_shapes(keys, jnp.asarray(masks), 3, cell=2)
    assert chosen.shape == (2, 3, 16, 16)
    for mine, shown in zip(np.asarray(chosen), np.asarray(there), strict=True):
        assert sorted(mine[shown].sum(axis=(1, 2)).tolist()) == [8 * 4, 8 * 8]
    # A patch of 16 pixels, as in ViT-B, answers at a quarter of the side.
    coarser, there = choose_shapes(keys, jnp.asarray(masks), 3, cell=4)
    assert coarser.shape == (2, 3, 8, 8)
    assert sorted(np.asarray(coarser[0])[there[0]].sum(axis=(1, 2)).tolist()) == [4 * 2, 4 * 4]


def test_boxes_and_points_get_shapes_alike():
    """The halves of what is drawn have like sizes, and as many places without a shape."""
    masks = np.zeros((4096, 8, 32, 32), bool)
    for k, side in enumerate((6, 8, 10, 14, 18, 22)):
        masks[:, k, :side, :side] = True
    keys = jax.random.split(jax.random.key(0), 4096)
    chosen, there = choose_shapes(keys, jnp.asarray(masks), 6, cell=2)
    assert there.all()
    areas = np.asarray(chosen).sum(axis=(2, 3))
    assert areas[:, :3].mean() == pytest.approx(areas[:, 3:].mean(), rel=0.05)
    fewer = jnp.asarray(masks).at[:, 3:].set(False)
    _, there = choose_shapes(keys, fewer, 6, cell=2)
    halves = np.asarray(there)[:, :3].mean(), np.asarray(there)[:, 3:].mean()
    assert halves == pytest.approx((0.5, 0.5), abs=0.05)


def test_the_loss_is_that_of_the_best_of_three_masks():
    rng = np.random.default_rng(0)
    truth = jnp.asarray(rng.random((2, 1, 8, 8)) > 0.6)
    logits = rng.normal(size=(2, 1, 4, 8, 8)).astype(np.float32)
    logits[0, 0, 2] = np.where(truth[0, 0], 9, -9)  # right, but thought the worst
    iou = np.array([[[0.9, 0.8, 0.1, 0.3]], [[0.5, 0.2, 0.6, 0.4]]], np.float32)

    def cost(mask, target):
        """Focal and Dice of one mask, in float64."""
        p = 1 / (1 + np.exp(-mask.astype(np.float64)))
        right = np.where(target, p, 1 - p)
        balance = np.where(target, 0.25, 0.75)
        focal = np.mean(-balance * (1 - right) ** 2 * np.log(right))
        dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
        return 20 * focal + dice

    def true_iou(mask, target):
        return ((mask > 0) & target).sum() / ((mask > 0) | target).sum()

    expected = {True: 0.0, False: 0.0}
    for b in range(2):
        target = np.asarray(truth[b, 0])
        costs = [cost(mask, target) for mask in logits[b, 0]]
        ious = [true_iou(mask, target) for mask in logits[b, 0]]
        errors = [(iou[b, 0, m] - ious[m]) ** 2 for m in range(4)]
        for single in expected:
            error = np.mean(errors if single else errors[1:])
            expected[single] += (min(costs[1:]) + single * costs[0] + error) / 2
    for single, value in expected.items():
        loss, mask, _ = step_module._round_loss(
            jnp.asarray(logits), jnp.asarray(iou), truth, jnp.ones((2, 1)), single
        )
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        # What goes on is what the model thinks best, not what is best.
        np.testing.assert_array_equal(mask[0, 0], logits[0, 0, 1])
        np.testing.assert_array_equal(mask[1, 0], logits[1, 0, 2])


def scene_of(owners) -> Scenes:
    """One in which no shape is part of another."""
    masks = owners[:, None] == jnp.arange(SHAPES)[None, :, None, None]
    return Scenes(jnp.zeros(owners.shape), masks, owners)


def test_affinity_wants_cells_of_one_shape_alike_and_others_unlike():
    owners = jnp.full((1, 8, 8), -1).at[:, :, 4:].set(3)  # left and right half; cells of 2 pixels
    halves = scene_of(owners)
    right = (jnp.arange(4) >= 2)[None, None, :, None]  # (1, 1, w, 1)
    apart = jnp.where(right, jnp.array([2.0, 1.0]), jnp.array([-1.0, 1.0]))
    apart = jnp.broadcast_to(apart, (1, 4, 4, 2))
    cost = float(affinity_loss(apart, halves))
    # Opposite once their mean is taken off: a logit of 5 for each pair, and the right one.
    np.testing.assert_allclose(cost, np.log1p(np.exp(-5)), rtol=1e-5)
    swapped = jnp.swapaxes(apart, 1, 2)  # top and bottom alike: half of all pairs are wrong
    wrong = (np.log1p(np.exp(-5)) + np.log1p(np.exp(5))) / 2
    np.testing.assert_allclose(float(affinity_loss(swapped, halves)), wrong, rtol=1e-5)
    # Pairs within a shape weigh as much as pairs across, however few they are.
    small = scene_of(jnp.full((1, 8, 8), -1).at[:, :2, :2].set(0))
    noise = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    zero = jnp.zeros((1, 4, 4, 3))
    np.testing.assert_allclose(float(affinity_loss(zero, small)), np.log(2), rtol=1e-5)
    assert float(affinity_loss(noise, small)) != pytest.approx(np.log(2))


def test_affinity_has_a_gradient_where_all_cells_are_alike():
    masks = jnp.zeros((1, 1, 4, 4), bool).at[:, :, :2].set(True)
    scene = Scenes(jnp.zeros((1, 4, 4)), masks, jnp.where(masks[:, 0], 0, -1))
    alike = jnp.ones((1, 2, 2, 3))
    assert np.isfinite(jax.grad(affinity_loss)(alike, scene)).all()
    # Two cells, two directions: on one line through their mean, cells could only be longer.
    unlike = alike.at[0, 0, 0, 0].set(2.0).at[0, 1, 1, 1].set(2.0)
    assert np.abs(jax.grad(affinity_loss)(unlike, scene)).max() > 1e-3


def test_affinity_does_not_tell_a_part_from_its_whole():
    owners = jnp.zeros((1, 8, 8), jnp.int32).at[:, :, 4:].set(1)  # 1 covers the right half of 0
    scene = scene_of(owners)
    part = scene._replace(masks=scene.masks.at[:, 0].set(True))  # and belongs to it
    right = (jnp.arange(4) >= 2)[None, None, :, None]
    alike = jnp.broadcast_to(jnp.where(right, 1.0, -1.0) * jnp.array([1.0, 0.5]), (1, 4, 4, 2))
    turned = alike * jnp.array([1.0, -1.0])  # other embeddings, as alike within each half
    for embeddings in (alike, turned):
        # Only pairs within a half count, and are right; those across would cost as little again.
        cost = float(affinity_loss(embeddings, part))
        np.testing.assert_allclose(cost, np.log1p(np.exp(-5)) / 2, rtol=1e-5)
    with_pairs = float(affinity_loss(alike, scene))
    np.testing.assert_allclose(with_pairs, np.log1p(np.exp(-5)), rtol=1e-5)


def test_larger_shapes_are_asked_more_often():
    masks = jnp.zeros((4000, SHAPES, 32, 32), bool)
    masks = masks.at[:, 0, :8, :8].set(True).at[:, 1, 8:24, 8:24].set(True)
    chosen, _ = choose_shapes(jax.random.split(jax.random.key(0), 4000), masks, 1, cell=2)
    large = (np.asarray(chosen).sum(axis=(1, 2, 3)) == 64).mean()
    np.testing.assert_allclose(large, 2 / 3, atol=0.03)


def test_prompts_for_shapes_that_are_not_there_cost_nothing():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 4, 8, 8)), jnp.float32)
    truth = jnp.zeros((1, 2, 8, 8), bool).at[0, 0, :4].set(True)
    weights = jnp.array([[1.0, 0.0]])
    both, _, _ = step_module._round_loss(logits, jnp.zeros((1, 2, 4)), truth, weights, True)
    one, _, _ = step_module._round_loss(
        logits[:, :1], jnp.zeros((1, 1, 4)), truth[:, :1], weights[:, :1], True
    )
    np.testing.assert_allclose(both, one, rtol=1e-6)
