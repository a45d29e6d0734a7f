"""Every field of the config is either tested for what it changes, or known to change no result."""

import ast
import functools
import pathlib
import re

import pytest

from sammix_jax.config import default_config

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
        "test_scores_are_those_of_the_masks_on_the_scans_grid": ("evaluate.save_masks",),
    },
    "evaluation/test_scans.py": {
        "test_a_draw_is_of_scans_that_show_the_organ": ("evaluate.scans", "evaluate.seed"),
    },
    "test_field_effects.py": {
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
        "test_epochs_count_slices_without_masks_and_steps_overrule": (
            "train.epochs",
            "train.steps",
            "train.batch_labelled",
            "train.batch_unlabelled",
        ),
    },
    "training/test_step.py": {
        "test_a_frozen_batch_norm_stays": ("model.freeze_batch_norm",),
        "test_the_papers_mode_trains_lora_decoder_prompts_and_classifier": ("train.trainable",),
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
