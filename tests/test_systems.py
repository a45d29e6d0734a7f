"""Every system trains, predicts and is scored in one harness; and says what it cannot do."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_config
from flax import traverse_util
from sam_cases import TINY

from sammix_jax import report
from sammix_jax.augment import nnunet_distort, nnunet_moves
from sammix_jax.config_rules import check_config
from sammix_jax.data.slices import SliceStore
from sammix_jax.errors import UserError
from sammix_jax.evaluate import Evaluation, Example, evaluate
from sammix_jax.inference import load_model, make_predict
from sammix_jax.losses import bce_loss, cross_entropy, dice_loss
from sammix_jax.models.baselines.prompted_sam import points_inside
from sammix_jax.models.baselines.unet import UNet
from sammix_jax.models.sam.variants import VARIANTS
from sammix_jax.predict import predict
from sammix_jax.prepare import prepare
from sammix_jax.preprocess import move
from sammix_jax.results import collect, over_seeds, write_over_seeds
from sammix_jax.scores import Case, Guidance
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.masked import view_masked
from sammix_jax.systems.named import SYSTEMS, make_system
from sammix_jax.systems.segmenter import UNetSystem
from sammix_jax.systems.system import ORACLES, OUTSIDE, PROTOCOLS, Microbatch, scored_protocols
from sammix_jax.tables import result_table
from sammix_jax.train import train
from sammix_jax.train_log import read_log
from sammix_jax.train_step import make_init, make_train_step
from sammix_jax.weights import write_weights

CONFIGS = ("unet", "nnunet", "multimix", "transunet", "sam_pp", "samed", "sam_mix_labelled_only")
SIDE = 32
SETTINGS = {
    "unet": {"model.widths": (4, 6, 8)},
    "nnunet": {"model.widths": (4, 4, 6, 8), "train.optimiser": "sgd"},
    "multimix": {"model.widths": (4, 6, 8), "multimix.kl_form": "bernoulli"},
    "transunet": {"model.transunet": "mini"},
    "prompted_sam": {"model.mask_choice": "single"},
    "prompted_sam_points": {
        "model.prompt": "points",
        "model.mask_choice": "single",
        "loss.negatives": False,
    },
}


def tiny_config(name: str, **settings):
    config = small_config()
    config.data.size = config.model.image_size = SIDE
    config.model.system = name.removesuffix("_points")
    config.train.trainable = (".*",)
    config.train.batch_labelled = config.train.batch_unlabelled = 2
    config.train.augment = False
    config.train.schedule, config.train.warmup_steps = "constant", 0
    config.loss.negatives, config.loss.bce, config.loss.segmentation = True, 1.0, 1.0
    config.evaluate.protocols = PROTOCOLS
    config.update_from_flattened_dict(SETTINGS[name] | settings)
    check_config(config)
    return config


def tiny_system(config):
    system = make_system(config)
    if config.model.system == "prompted_sam":
        return type(system)(system.model.clone(sam_variant=TINY), config)
    return system


def batch_of(labelled: int = 2, others: int = 2) -> dict[str, np.ndarray]:
    """Bright squares on noise; the first of the others is empty, the second's label unknown."""
    rng = np.random.default_rng(0)
    masks = np.zeros((labelled, SIDE, SIDE), np.uint8)
    masks[:, 8:20, 10:26] = 1
    hu = rng.normal(0, 40, (labelled + others, SIDE, SIDE))
    hu[:labelled] += 100 * masks
    label = np.array([1] * labelled + [0, -1] * (others // 2), np.int32)
    return {"hu": hu.astype(np.int16), "mask": masks, "image_label": label}


@functools.cache
def trained(name: str):
    """A system, its first state, and the state and metrics after each of three steps."""
    config = tiny_config(name)
    system, optimiser = tiny_system(config), optax.adam(1e-3)
    state = jax.jit(make_init(system, optimiser, config))()
    step = jax.jit(make_train_step(system, optimiser, config))
    states, found = [state], []
    for _ in range(3):
        state, metrics = step(state, batch_of())
        states.append(state)
        found.append(metrics)
    return system, states, found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_trains_every_leaf(name):
    """Its gradient is finite, and none is zero but where a network cannot have one."""
    _, states, found = trained(name)
    assert all(np.isfinite(value).all() for metrics in found for value in metrics.values())
    assert float(found[2]["loss"]) < float(found[0]["loss"])
    gradients = dict(zip(states[0].trainable, found[1]["leaf_norms"][0], strict=True))
    still = {path for path, norm in gradients.items() if norm == 0}
    # Neither prompts that nobody gives, nor the heads of masks that were not chosen.
    assert all(path.startswith("sam/") for path in still), still
    assert not [p for p in still if "image_encoder" in p and "lora" not in p]


@pytest.mark.parametrize("name", SETTINGS)
def test_predictions_under_each_protocol(name):
    system, states, _ = trained(name)
    batch = batch_of()
    truth = np.zeros(batch["hu"].shape, bool)
    truth[:2] = batch["mask"] > 0
    found, open_ = (
        make_predict(system, system.config, system.protocols, gate)(
            states[-1].variables, batch["hu"], truth
        )
        for gate in (True, False)
    )
    assert set(found.logits) == set(system.protocols)
    for protocol, logits in found.logits.items():
        assert logits.shape == (4, SIDE, SIDE) and logits.dtype == jnp.float32
        if protocol in ORACLES:  # where there is no truth nothing prompts
            assert (logits[2:] == OUTSIDE).all() and not (logits[:2] == OUTSIDE).any()
    assert found.cam is None and found.box is None and found.empty is None
    if name == "multimix":
        assert found.organ_probability.shape == (4,)
    else:  # and nothing to gate by
        assert found.organ_probability is None
        jax.tree.map(np.testing.assert_array_equal, found, open_)
    with pytest.raises(ValueError, match=r"protocols \['cam'\]: expected some of"):
        make_predict(system, system.config, ("cam",))


def test_multimix_is_gated_by_its_classifier():
    system, states, _ = trained("multimix")
    variables = jax.tree.map(lambda leaf: leaf, states[-1].variables)
    head = variables["params"]["class_head"]
    head["kernel"] = jnp.zeros_like(head["kernel"])
    head["bias"] = jnp.array([1.0, 0.0])  # never the organ
    for gate in (True, False):
        gated = make_predict(system, system.config, ("none",), gate)
        logits = gated(variables, batch_of()["hu"], None).logits["none"]
        assert bool((logits == OUTSIDE).all()) == gate


@pytest.mark.parametrize("name", ["unet", "nnunet", "multimix", "transunet"])
def test_widths_and_variant_shape_the_networks(name):
    def parameters(**settings) -> int:
        config = tiny_config(name, **settings)
        images = jnp.zeros((1, SIDE, SIDE))
        shapes = jax.eval_shape(make_system(config).init, jax.random.key(0), images)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    if name == "transunet":
        mini, published = (parameters(**{"model.transunet": v}) for v in ("mini", "r50_vit_b16"))
        assert mini < 4e6 and published > 1e8
    else:
        small, published = (parameters(**{"model.widths": w}) for w in ((4, 6, 8), ()))
        assert small < 1e4 < 1e6 < published


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


# ---- What is learned from


def microbatch(layout: BatchLayout, batch: dict, labels=None) -> Microbatch:
    keys = jax.random.split(jax.random.key(1), layout.size)
    labels = batch["image_label"][None] if labels is None else labels
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    return Microbatch(
        **arrays, key=keys, labels=jnp.asarray(labels), step=jnp.array(0), layout=layout
    )


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
    system = UNetSystem(UNet((4, 4, 6, 8), dropout=0.0, deep_supervision=True), config)
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
    assert float(metrics["dice_loss"]) == pytest.approx(
        mean(lambda i: dice_loss(output.logits[i], masks[i])), rel=1e-4
    )
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


# ---- Points


def test_points_lie_in_their_masks_and_follow_from_them():
    masks = np.zeros((3, 12, 20), bool)
    masks[0, 3:6, 10:18], masks[1, 11, 0] = True, True
    keys = jnp.broadcast_to(jax.random.key(0), 3)
    points, labels = points_inside(jnp.asarray(masks), keys, 4)
    assert points.shape == (3, 4, 2)
    for i in range(2):
        assert all(masks[i, int(y), int(x)] for x, y in points[i])
    np.testing.assert_array_equal(labels, [[1] * 4, [1] * 4, [-1] * 4])
    assert len({tuple(p) for p in np.asarray(points[0])}) > 1
    again, _ = points_inside(jnp.asarray(masks[::-1]), keys, 4)
    np.testing.assert_array_equal(again[::-1], points)
    other, _ = points_inside(jnp.asarray(masks), jax.random.split(jax.random.key(1), 3), 4)
    assert not np.array_equal(other[0], points[0])


def test_points_prompt_training_and_scoring(monkeypatch):
    """As many as the config says, in SAM's frame: twice the slice's side here."""
    name = "prompted_sam_points"
    config = tiny_config(name, **{"train.points": 2, "evaluate.points": 3})
    assert config.model.prompt == "points"
    config.model.image_size = 2 * SIDE
    seen = []

    class Spy:
        def apply(self, variables, images, size, points=None, labels=None):
            seen.append((images.shape, size, points, labels))
            raise StopIteration

        def bind(self, variables):
            return self

        def encode(self, images):
            return images

        def segment(self, embeddings, side, size, points, labels):
            seen.append((embeddings.shape, size, points, labels))
            raise StopIteration

    system = type(make_system(config))(Spy(), config)
    batch = batch_of()
    with pytest.raises(StopIteration):
        system.loss({}, microbatch(BatchLayout(2, 2), batch))
    truth = jnp.asarray(batch["mask"] > 0)
    with pytest.raises(StopIteration):
        system.predict({}, jnp.zeros(truth.shape), truth, ("gt_points",), True)
    for (shape, size, points, labels), count in zip(seen, (2, 3), strict=True):
        assert shape == (2, 2 * SIDE, 2 * SIDE, 3) and size == (SIDE, SIDE)
        assert points.shape == (2, count, 2) and (labels == 1).all()
    x, y = np.asarray(seen[1][2]).reshape(-1, 2).T
    assert (x >= 10).all() and (x < 26).all() and (y >= 8).all() and (y < 20).all()
    np.testing.assert_array_equal(seen[1][2][0], seen[1][2][1])  # one mask, one choice of points


# ---- Protocols and reports


def test_headlines_and_what_may_be_scored():
    headlines = {name: tiny_system(tiny_config(name)).headline for name in SETTINGS}
    assert headlines == dict.fromkeys(SETTINGS, "none") | {"prompted_sam_points": "gt_points"}
    pointed = tiny_system(tiny_config("prompted_sam_points"))
    assert scored_protocols(pointed, PROTOCOLS) == ("gt_points", "gt_box", "none")
    with pytest.raises(UserError, match=r"expected some of none for model\.system=unet"):
        scored_protocols(tiny_system(tiny_config("unet")), ("cam", "gt_box"))


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("unet", "evaluate.protocols", ("cam", "gt_box"), "some of none for model.system=unet"),
        ("unet", "consistency.weight", 1.0, "0 for"),
        ("unet", "data.size", 34, "a multiple of 4 for"),
        ("multimix", "data.size", 36, "a multiple of 8 for"),
        ("transunet", "data.size", 40, "a multiple of 16 for"),
        ("nnunet", "model.sam_weights", "sam.safetensors", "none for"),
        ("multimix", "train.batch_unlabelled", 4, "train.batch_labelled=2"),
        ("prompted_sam_points", "loss.negatives", True, "there is no point"),
        ("prompted_sam", "train.box", "gt", "cam"),
        ("unet", "model.prompt", "points", "none"),
        ("unet", "input.normalise", "sam", "minmax or unit"),
    ],
)
def test_what_does_not_go_with_a_system(name, field, value, expected):
    config = tiny_config(name)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"{field}=.*: expected .*{expected}"):
        check_config(config)


@pytest.mark.parametrize("data", ["phantom", "lits"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_baseline_has_its_config(name, data):
    module = importlib.import_module(f"configs.baselines.{name}")
    config = module.get_config(data)
    check_config(config)
    system = make_system(config)
    assert system.headline in scored_protocols(system, config.evaluate.protocols)
    assert "Command" in module.__doc__ and "not measured yet" in module.__doc__
    with pytest.raises(UserError, match="no variant 'lit': expected one of phantom, lits"):
        module.get_config("lit")


def test_every_system_has_a_config_and_a_name():
    configs = [importlib.import_module(f"configs.baselines.{n}").get_config() for n in CONFIGS]
    assert {config.model.system for config in configs} == set(SYSTEMS) == set(report.SYSTEM_NAMES)
    assert set(report.PROTOCOL_NOTES) == set(PROTOCOLS)
    assert {p for p, note in report.PROTOCOL_NOTES.items() if note.startswith("oracle")} == set(
        ORACLES
    )


def evaluation(config, folder, protocol, probability=None) -> Evaluation:
    """One scan, scored under one protocol, of a system that has no CAM."""
    for name, content in (("split", '{"train": [], "val": [], "test": ["a"]}'), ("labels", "[]")):
        (folder / f"{name}.json").write_text(content)
    case = Case("a", protocol, "scored", 0.8, 0.7, 8.0, 1.0, -0.1, 0.8, 7.0, 0.5, 1500, 1400)
    guidance = Guidance(np.array([True, False]), probability, None, None)
    results = collect(config, folder, [case], [guidance], [], [], {"a": "digest"})
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:12] = True
    hu = np.where(mask, 60, -900).astype(np.int16)
    return Evaluation([case], results, [Example(case, 3, hu, mask, mask, None, None, None)])


def test_a_report_without_classifier_and_cam(tmp_path):
    config = tiny_config("unet")
    found = evaluation(config, tmp_path, "none")
    assert found.results["classifier"] is None and found.results["prompt"] is None
    page = report.write_report(tmp_path / "out", found, config, tmp_path).read_text()
    assert "U-Net: liver" in page and "there is no classifier" in page
    for absent in ("classifier accuracy", "empty CAMs", "activation map", 'class="warning"'):
        assert absent not in page, absent
    table = result_table(found.results)
    assert "AUROC" not in table and "box IoU" not in table and "false positives" in table
    means = over_seeds([found.results])
    assert means["classifier"] is None and result_table(means)
    write_over_seeds(tmp_path / "means", means)


def test_a_report_with_a_classifier_and_no_cam(tmp_path):
    config = tiny_config("multimix")
    found = evaluation(config, tmp_path, "none", np.array([0.9, 0.2]))
    assert found.results["classifier"]["accuracy"] == 1 and found.results["prompt"] is None
    page = report.write_report(tmp_path / "out", found, config, tmp_path).read_text()
    assert "classifier accuracy" in page and "empty CAMs" not in page


def test_an_oracle_is_called_one(tmp_path):
    config = tiny_config("prompted_sam_points")
    found = evaluation(config, tmp_path, "gt_points")
    page = report.write_report(tmp_path / "out", found, config, tmp_path).read_text()
    assert "no measure of automatic segmentation" in page
    assert "oracle: prompted with points inside the true mask" in page


# ---- Whole runs


def run_config(name: str, **settings):
    """`tiny_config` on slices that can be prepared, with few of everything."""
    config = tiny_config(name, **{"evaluate.batch": 8, "train.steps": 2} | settings)
    config.log.validate_every_steps = 2
    return config


def test_a_segmenter_runs_from_scans_to_a_mask(tmp_path):
    """Nothing is frozen, and there are no batch statistics and no classifier."""
    config = run_config("unet")
    train(config, tmp_path, prepare(config, tmp_path))
    logged = {name for _, name, _ in read_log(tmp_path)}
    assert "train/dice_loss" in logged and "val/accuracy" not in logged
    found = evaluate(config, tmp_path)
    assert {case.protocol for case in found.cases} == {"none"}
    page = report.write_report(tmp_path / "out", found, config, tmp_path)
    assert page.exists() and len(list((tmp_path / "out").glob("*.png"))) == len(found.examples)
    store = SliceStore.open(tmp_path / "store")
    scan = next(iter(store.records.values())).image
    (made,) = predict(config, tmp_path, scan, tmp_path / "mask.nii.gz")
    assert made.mask.exists()


@pytest.mark.slow
def test_weights_are_scored_as_they_are_loaded(tmp_path, monkeypatch):
    """No epochs and no steps: SAM-PP-0. What a model would be prompted with is not predicted."""
    monkeypatch.setitem(VARIANTS, "mini", TINY)
    name = "prompted_sam_points"
    config = run_config(name, **{"model.lora_rank": 0})
    optimiser = optax.identity()
    state = jax.jit(make_init(make_system(config), optimiser, config))()
    weights = {path.removeprefix("sam/"): np.asarray(x) for path, x in state.trainable.items()}
    about = {"kind": "sam", "model": "mini", "source": "none", "sha256": ""}
    write_weights(tmp_path / "sam.safetensors", weights, about)
    config.train.steps, config.train.epochs = 0, 0.0
    with pytest.raises(UserError, match=r"train\.epochs=0.0: expected .*wants model.sam_weights"):
        check_config(config)
    config.model.sam_weights = str(tmp_path / "sam.safetensors")
    config.seed = 5  # other random values, which the file's replace
    check_config(config)
    run = tmp_path / "run"
    store = prepare(config, run)
    for _ in range(2):
        assert train(config, run, store) is False
    _, variables = load_model(config, run)
    kept = traverse_util.flatten_dict(variables["params"]["sam"], sep="/")
    for path, leaf in weights.items():
        np.testing.assert_array_equal(kept[path], leaf)
    config.evaluate.protocols = ("gt_points",)
    assert {case.protocol for case in evaluate(config, run).cases} == {"gt_points"}
    scan = next(iter(store.records.values())).image
    with pytest.raises(UserError, match=r"model\.prompt=points: .*cannot segment a scan"):
        predict(config, run, scan, run / "mask.nii.gz")


# ---- nnU-Net's augmentation


def test_nnunets_moves_mirror_turn_and_scale():
    """Of four slices about one is neither turned nor scaled, and these are mirrored by whole
    pixels."""
    image = np.random.default_rng(0).random((1, 15, 21)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    moves = nnunet_moves(keys, (15, 21))
    images = np.asarray(move(jnp.repeat(jnp.asarray(image), 64, axis=0), moves))
    mirrors = [image[0, ::a, ::b] for a in (1, -1) for b in (1, -1)]
    counts = [sum(np.allclose(one, mirror, atol=1e-5) for one in images) for mirror in mirrors]
    assert all(3 <= count <= 20 for count in counts)
    assert 25 <= sum(counts) <= 55  # 0.8 x 0.8 of 64 are 41
    assert np.abs(np.asarray(moves[0] - moves[1])).max() > 1


def test_nnunets_distortions_are_each_slices_own():
    rng = np.random.default_rng(0)
    image = np.clip(0.5 + 0.2 * rng.normal(size=(24, 24)), 0, 1).astype(np.float32)
    images = jnp.repeat(jnp.asarray(image)[None], 40, axis=0)
    keys = jax.random.split(jax.random.key(3), 40)
    found = np.asarray(nnunet_distort(images, keys))
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1
    assert np.isfinite(found).all()
    same = np.array([np.array_equal(one, image) for one in found])
    assert 2 <= same.sum() <= 20  # 0.9 0.8 0.85 0.85 0.75 0.9 0.7 of 40 are 10
    alone = np.asarray(nnunet_distort(images[:7], keys[33:]))
    np.testing.assert_allclose(alone, found[33:], atol=1e-6)
    flat = nnunet_distort(jnp.full((4, 8, 8), 0.5), keys[:4])
    assert np.isfinite(np.asarray(flat)).all()
