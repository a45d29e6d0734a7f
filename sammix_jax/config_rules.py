"""What each config field may be. Checked before any work, so that a typing error costs nothing."""

import math
import re

from sammix_jax.data import paper
from sammix_jax.data.geometry import RESIZES
from sammix_jax.data.paths import as_path
from sammix_jax.data.phantom import DOMAINS
from sammix_jax.data.splits import PARTS
from sammix_jax.errors import UserError
from sammix_jax.method import cam, postprocess
from sammix_jax.method.augment import AUGMENTATIONS
from sammix_jax.method.objective import CLASSIFICATION_LOSSES
from sammix_jax.method.preprocess import NORMALISATIONS, SCALINGS
from sammix_jax.method.prompted_sam import PROMPTS
from sammix_jax.method.sam_mix import BOX_SOURCES, DTYPES, FUSIONS
from sammix_jax.models.baselines.transunet import VARIANTS as TRANSUNETS
from sammix_jax.models.blocks import POLICIES
from sammix_jax.models.lora import THIRDS
from sammix_jax.models.resnet import OUTPUT_STRIDES, STAGES
from sammix_jax.models.sam.choice import MASK_CHOICES
from sammix_jax.models.sam.variants import VARIANTS
from sammix_jax.systems.multimix import IMAGE_LABELS
from sammix_jax.systems.multimix_loss import KL_FORMS
from sammix_jax.systems.named import SYSTEMS
from sammix_jax.systems.rules import system_rules
from sammix_jax.systems.system import PROTOCOLS
from sammix_jax.training.optim import OPTIMISERS, SCHEDULES

CHOICES = {
    "data.resize": RESIZES,
    "data.phantom.domain": tuple(DOMAINS),
    "input.scaling": SCALINGS,
    "input.normalise": NORMALISATIONS,
    "model.system": tuple(SYSTEMS),
    "model.prompt": PROMPTS,
    "model.transunet": tuple(TRANSUNETS),
    "model.sam": tuple(VARIANTS),
    "model.classifier": tuple(OUTPUT_STRIDES),
    "model.mask_choice": MASK_CHOICES,
    "model.dtype": DTYPES,
    "model.remat": POLICIES,
    "cam.method": cam.METHODS,
    "cam.component": cam.COMPONENTS,
    "cam.fusion": FUSIONS,
    "loss.classifier": tuple(CLASSIFICATION_LOSSES),
    "train.box": BOX_SOURCES,
    "train.optimiser": OPTIMISERS,
    "train.schedule": SCHEDULES,
    "train.augmentation": tuple(AUGMENTATIONS),
    "multimix.image_labels": IMAGE_LABELS,
    "multimix.kl_form": KL_FORMS,
    "evaluate.part": PARTS,
    "evaluate.component": postprocess.COMPONENTS,
}
SUBSETS = {"model.lora_targets": tuple(THIRDS), "evaluate.protocols": PROTOCOLS}
TUPLES = {
    "data.split": "(train, val, test)",
    "data.slice_range": "(start, stop)",
    "input.window": "(low, high)",
    "log.profile": "(start, stop)",
}
WHOLE_NUMBERS = ("data.label_values", "evaluate.label_values", "model.widths")
SEEDS = ("seed", "data.seed", "data.labels_seed", "evaluate.seed")
AT_LEAST = {
    "data.size": 16,
    "data.labelled_slices": 0,
    "data.workers": 0,
    "data.phantom.scans": 0,
    "data.phantom.unlabelled": 0,
    "model.image_size": 1,
    "model.mask_index": 0,
    "model.lora_rank": 0,
    "model.query_chunk": 1,
    "train.steps": 0,
    "train.warmup_steps": 0,
    "train.classifier_warmup_steps": 0,
    "train.batch_labelled": 1,
    "train.batch_unlabelled": 0,
    "train.accumulate": 1,
    "train.learning_rate": 0,
    "train.epochs": 0,
    "train.points": 1,
    "train.weight_decay": 0,
    "train.clip_norm": 0,
    "loss.classification": 0,
    "loss.segmentation": 0,
    "loss.dice_smooth": 0,
    "loss.bce": 0,
    "loss.iou": 0,
    "consistency.weight": 0,
    "consistency.start_step": 0,
    "consistency.ramp_steps": 0,
    "pretrain.images": 1,
    "pretrain.prompts": 2,
    "pretrain.rounds": 1,
    "pretrain.coarse_steps": 0,
    "pretrain.held_out": 1,
    "multimix.confidence": 0,
    "multimix.unsupervised": 0,
    "multimix.kl": 0,
    "evaluate.points": 1,
    "evaluate.scans": 0,
    "evaluate.nsd_tolerance": 0,
    "evaluate.batch": 1,
    "mesh.fsdp": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "log.every_steps": 1,
    "log.validate_every_steps": 1,
}


def check_config(config) -> None:
    """Refuses values that no run could use.

    Raises:
      UserError: names every such field, what it is and what it may be.
    """
    faults = []

    def expect(field: str, sound: bool, expected) -> None:
        if not sound:
            faults.append(f"{field}={_get(config, field)!r}: expected {expected}")

    for field, form in TUPLES.items():
        values = _get(config, field)
        numbers = all(isinstance(value, int | float) for value in values)
        expect(field, numbers and len(values) == form.count(",") + 1, f"{form}, numbers")
    for field in WHOLE_NUMBERS:
        expect(field, all(isinstance(v, int) for v in _get(config, field)), "whole numbers")
    if faults:
        raise UserError("config: " + "; ".join(faults) + ".")
    for field, options in CHOICES.items():
        expect(field, _get(config, field) in options, f"one of {', '.join(map(str, options))}")
    for field, options in SUBSETS.items():
        values = tuple(_get(config, field))
        sound = bool(values) and set(values) <= set(options)
        expect(field, sound, f"some of {', '.join(options)}, as a tuple")
    for field, least in AT_LEAST.items():
        expect(field, _get(config, field) >= least, f"at least {least}")

    for field in SEEDS:
        expect(field, 0 <= _get(config, field) < 2**32, "at least 0 and below 2**32")
    low, high = config.input.window
    expect("input.window", low < high, "(low, high) in HU with low < high")
    if config.data.resize == "paper":
        inside = paper.WINDOW[0] <= low and high <= paper.WINDOW[1]
        expect("input.window", inside, f"within {paper.WINDOW}, to which data.resize=paper clips")
    if config.input.scaling == "paper":  # its values span [0.327, 0.372]
        where = "where input.scaling=paper"
        expect("data.resize", config.data.resize == "paper", f"paper {where}")
        expect("input.window", (low, high) == paper.WINDOW, f"{paper.WINDOW} {where}")
        if config.model.dtype == "bfloat16":  # which has 24 values in that span, of 186 greys
            fits, fitting = ("minmax",), f"minmax {where} and model.dtype=bfloat16"
        else:
            fits, fitting = ("minmax", "unit"), f"minmax or unit {where}"
        expect("input.normalise", config.input.normalise in fits, fitting)
        expect("train.augment", not config.train.augment, f"False {where}")
        expect("consistency.weight", config.consistency.weight == 0, f"0 {where}")
    expect("cam.threshold", 0 < config.cam.threshold <= 1, "a share of the peak, above 0 to 1")
    expect("data.central_fraction", 0 < config.data.central_fraction <= 1, "above 0 to 1")
    if config.model.classifier in STAGES:
        layers = ("last", *STAGES[config.model.classifier])
        expect(
            "cam.layer",
            config.cam.layer in layers,
            f"one of {', '.join(layers)} for model.classifier={config.model.classifier}",
        )
    expect(
        "cam.method",
        config.cam.method == "grad_cam" or config.cam.layer == "last",
        "grad_cam where cam.layer is not last",
    )
    patterns = [("train.trainable", pattern) for pattern in config.train.trainable]
    for field, pattern in [("data.patient", config.data.patient), *patterns]:
        try:
            re.compile(pattern)
        except re.error as error:
            expect(field, False, f"regular expressions; of {pattern!r}: {error}")
    expect("train.trainable", len(config.train.trainable) > 0, "one pattern at least")
    sound = min(config.data.split) >= 0 < config.data.split[0]
    expect("data.split", sound, "parts of 0 or more, and training's above")
    expect("train.epochs", math.isfinite(config.train.epochs), "a number")
    axes = "".join(sorted(config.data.default_orientation.translate(str.maketrans("RPI", "LAS"))))
    expect(
        "data.default_orientation",
        axes in ("", "ALS"),
        '"" or the ends of three axes, such as LAS: one of L and R, of A and P, of S and I',
    )
    start, stop = config.data.slice_range
    expect("data.slice_range", 0 <= start < stop <= 1, "(start, stop) with 0 <= start < stop <= 1")
    expect(
        "data.slice_range",
        (start, stop) == (0, 1) or config.data.central_fraction == 1,
        "(0, 1) where data.central_fraction says which slices are kept",
    )
    expect(
        "train.box", config.train.box == "cam" or config.cam.box, "cam where cam.box says no box"
    )
    taught = config.consistency.weight > 0
    expect(
        "train.batch_unlabelled",
        config.train.batch_unlabelled > 0 or not taught,
        "above 0, for a teacher (consistency.weight) teaches on these slices",
    )
    expect(
        "loss.dice_smooth",
        config.loss.dice_smooth > 0 or not taught,
        "above 0 with a teacher (consistency.weight): a slice may have no confident pixel",
    )
    sizes = (config.train.batch_labelled, config.train.batch_unlabelled)
    parts = max(1, config.train.accumulate)
    expect(
        "train.accumulate",
        not any(size % parts for size in sizes),
        f"a divisor of train.batch_labelled={sizes[0]} and of train.batch_unlabelled={sizes[1]}, "
        "so that every part of a batch has both kinds",
    )
    begin, end = config.log.profile
    expect("log.profile", 0 <= begin <= end, "(start, stop) with 0 <= start <= stop")
    expect("train.adam_b2", 0 <= config.train.adam_b2 < 1, "0 to below 1")
    expect("model.mask_index", config.model.mask_index < 3, "0, 1 or 2")
    expect("consistency.ema", 0 <= config.consistency.ema < 1, "0 to below 1")
    expect("consistency.confidence", 0.5 <= config.consistency.confidence < 1, "0.5 to below 1")
    expect(
        "train.epochs",
        config.train.epochs > 0 or config.train.steps > 0 or bool(config.model.sam_weights),
        "above 0; with train.steps=0 too nothing is trained, and that wants model.sam_weights",
    )
    if config.model.classifier in OUTPUT_STRIDES:
        strides = OUTPUT_STRIDES[config.model.classifier]
        expect(
            "model.classifier_stride",
            config.model.classifier_stride in strides,
            f"one of {', '.join(map(str, strides))} for model.classifier={config.model.classifier}",
        )
    if config.model.sam in VARIANTS:
        patch = VARIANTS[config.model.sam].patch_size
        expect(
            "model.image_size",
            config.model.image_size % patch == 0,
            f"a multiple of {patch}, the patch of model.sam={config.model.sam}",
        )
        expect(
            "pretrain.coarse_steps",
            config.pretrain.coarse_steps == 0 or config.model.image_size % (2 * patch) == 0,
            f"0, as half of model.image_size={config.model.image_size} is no multiple of {patch}, "
            f"the patch of model.sam={config.model.sam}",
        )
    if config.model.system in SYSTEMS:
        for field, sound, expected in system_rules(config):
            expect(field, sound, f"{expected} for model.system={config.model.system}")
    if faults:
        raise UserError("config: " + "; ".join(faults) + ".")


def check_weight_files(config) -> None:
    """Refuses weights that are not there. Only the start of a run reads them.

    Raises:
      UserError: names the field and the file.
    """
    for field in ("model.sam_weights", "model.classifier_weights"):
        file = _get(config, field)
        if file and not as_path(file).is_file():
            found = "a folder, expected a file" if as_path(file).is_dir() else "no such file"
            raise UserError(f"{field}={file}: {found}; docs/weights.md tells how to make it.")


def _get(config, field: str):
    for part in field.split("."):
        config = config[part]
    return config
