"""Every field of the config is either tested for what it changes, or known to change no result."""

import ast
import functools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from sammix_jax.config import default_config
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

TESTS = pathlib.Path(__file__).parent

# Where things lie, and how often they are written or told: no result depends on them.
PLACES = {
    "data.root",
    "data.store",
    "data.workers",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "log.every_steps",
    "log.validate_every_steps",
    "log.profile",
}

# File → test → the fields of which it tests what they change; it must name them.
TESTED = {
    "test_evaluate.py": {
        "test_scans_that_trained_the_model_are_named": ("evaluate.part",),
        "test_one_bad_scan_does_not_waste_the_others": ("evaluate.root",),
        "test_a_draw_is_of_scans_that_show_the_organ": ("evaluate.scans", "evaluate.seed"),
    },
    "test_fields.py": {
        "test_organ_and_label_values_choose_the_masks": (
            "data.organ",
            "data.label_values",
            "data.ignore_value",
            "evaluate.label_values",
            "evaluate.ignore_value",
        ),
        "test_size_resize_and_central_part_shape_the_store": (
            "data.size",
            "data.resize",
            "data.central_fraction",
        ),
        "test_seeds_and_counts_of_the_draw": (
            "data.split",
            "data.labelled_slices",
            "data.seed",
            "data.labels_seed",
        ),
        "test_the_phantom_is_made_as_configured": (
            "data.phantom.scans",
            "data.phantom.unlabelled",
            "data.phantom.domain",
            "data.phantom.seed",
        ),
        "test_the_teachers_fields_reach_the_step": (
            "consistency.weight",
            "consistency.ema",
            "consistency.confidence",
            "consistency.start_step",
            "consistency.ramp_steps",
        ),
        "test_protocols_and_their_masks": ("evaluate.protocols",),
        "test_the_gate_empties_slices_called_negative": ("evaluate.gate",),
        "test_masks_do_not_depend_on_the_batch": ("evaluate.batch",),
    },
    "training/test_optim.py": {
        "test_the_learning_rate_is_the_length_of_a_step": ("train.learning_rate",),
        "test_sgd_is_nnunets": ("train.optimiser",),
        "test_b2_says_how_soon_adam_forgets_a_large_gradient": ("train.adam_b2",),
        "test_schedules": ("train.schedule", "train.warmup_steps"),
        "test_decay_spares_biases_and_tables": ("train.weight_decay",),
        "test_clipping_bounds_the_norm_of_all_gradients_together": ("train.clip_norm",),
    },
    "test_inference.py": {
        "test_of_a_scans_mask_the_largest_component_may_be_kept": ("evaluate.component",),
    },
    "prepare/test_contents.py": {
        "test_a_part_of_the_height_is_counted_from_the_feet": ("data.slice_range",),
        "test_scans_that_seem_mirrored_are_told": ("data.default_orientation",),
    },
    "method/test_objective.py": {
        "test_the_loss_is_the_sum_of_its_weighted_parts": (
            "loss.classifier",
            "loss.classification",
            "loss.segmentation",
            "loss.dice_smooth",
            "loss.bce",
            "loss.iou",
        ),
    },
    "method/test_preprocess.py": {
        "test_the_configs_window_becomes_the_unit_range": ("input.window", "input.scaling"),
    },
    "method/test_sam_mix_fields.py": {
        "test_both_branches_see_the_normalised_slice": ("input.normalise",),
        "test_sam_and_its_input_size": ("model.sam", "model.image_size"),
        "test_lora_adds_two_factors_to_each_projection_named": (
            "model.lora_rank",
            "model.lora_targets",
        ),
        "test_the_classifier_and_its_stride": ("model.classifier", "model.classifier_stride"),
        "test_mask_choices": ("model.mask_choice", "model.mask_index"),
        "test_bfloat16_computes_and_float32_is_kept": ("model.dtype",),
        "test_remat_computes_more_and_changes_nothing": ("model.remat",),
        "test_queries_attend_in_chunks": ("model.query_chunk",),
        "test_the_plain_cam_is_the_models_where_asked_for": ("cam.method",),
        "test_a_cam_is_taken_at_the_layer_named": ("cam.layer",),
        "test_threshold_and_component_reach_the_cam_mask": ("cam.threshold", "cam.component"),
        "test_concat_starts_as_the_identity_and_learns": ("cam.fusion",),
        "test_add_fuses_the_averaged_mask_with_every_channel": ("cam.soft",),
        "test_the_cams_box_prompts_unless_it_is_switched_off": ("cam.box",),
    },
    "evaluation/test_scores.py": {
        "test_a_case_is_the_metrics_on_the_scans_own_grid": ("evaluate.nsd_tolerance",),
    },
    "test_sharding.py": {
        "test_ten_steps_are_the_same_in_every_layout": (
            "mesh.fsdp",
            "mesh.shard_frozen",
            "train.accumulate",
        ),
    },
    "systems/test_points.py": {
        "test_points_prompt_training_and_scoring": (
            "model.prompt",
            "train.points",
            "evaluate.points",
        ),
    },
    "systems/test_sam_mix_views.py": {
        "test_augment_and_seed_decide_what_the_model_sees": ("seed", "train.augment"),
        "test_the_true_box_prompts_in_training_where_asked_for": ("train.box",),
    },
    "systems/test_system_configs.py": {
        "test_every_system_has_a_config_and_a_name": ("model.system",),
    },
    "systems/test_system_steps.py": {
        "test_widths_and_variant_shape_the_networks": ("model.widths", "model.transunet"),
    },
    "systems/test_system_losses.py": {
        "test_negatives_have_empty_masks_and_unknown_labels_no_say": ("loss.negatives",),
        "test_augmentation_is_the_one_named": ("train.augmentation",),
        "test_multimix_adds_up_and_says_whose_labels_count": (
            "multimix.image_labels",
            "multimix.confidence",
            "multimix.unsupervised",
            "multimix.kl",
            "multimix.kl_form",
        ),
    },
    "test_train.py": {
        "test_given_files_are_followed_to_the_end": ("data.split_file", "data.labels_file"),
        "test_a_frozen_batch_norm_stays": ("model.freeze_batch_norm",),
        "test_the_papers_mode_trains_lora_decoder_prompts_and_classifier": ("train.trainable",),
        "test_epochs_count_slices_without_masks_and_steps_overrule": (
            "train.epochs",
            "train.steps",
            "train.batch_labelled",
            "train.batch_unlabelled",
        ),
        "test_the_classifier_warms_up_alone": ("train.classifier_warmup_steps",),
    },
    "data/test_splits.py": {"test_a_patients_scans_stay_together": ("data.patient",)},
    "pretrain/test_pretrain_step.py": {
        "test_prompts_and_rounds_say_how_often_a_scene_is_asked": (
            "pretrain.prompts",
            "pretrain.rounds",
        ),
    },
    "pretrain/test_run.py": {
        "test_images_and_held_out_say_how_many_scenes_are_drawn": (
            "pretrain.images",
            "pretrain.held_out",
        ),
        "test_the_first_steps_see_coarse_images": ("pretrain.coarse_steps",),
    },
    "training/test_start.py": {
        "test_it_has_the_trained_model_and_knows_its_scans": ("model.start_from",),
    },
    "test_weights.py": {
        "test_training_starts_from_both_files": ("model.sam_weights", "model.classifier_weights"),
    },
}
CASES = [
    (file, name, field) for file in TESTED for name in TESTED[file] for field in TESTED[file][name]
]


def fields(section, prefix="") -> set[str]:
    """Paths of all leaves, such as cam.fusion."""
    names = set()
    for key, value in section.items():
        names |= fields(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key}
    return names


@functools.cache
def functions(file: str) -> dict[str, str]:
    """Name → source, decorators included, of a test file's functions."""
    text = (TESTS / file).read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_no_field_is_forgotten():
    tested = [field for _, _, field in CASES]
    assert sorted([*PLACES, *tested]) == sorted(fields(default_config()))


@pytest.mark.parametrize(("file", "name", "field"), CASES)
def test_the_test_is_there_and_names_the_field(file, name, field):
    assert name in functions(file), f"{file} has no {name}"
    assert re.search(rf"\b{field.split('.')[-1]}\b", functions(file)[name])


# ---- Fields whose effect belongs to no one module's tests


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
            name: types.SimpleNamespace(name=name, has_label=True, unannotated=())
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
