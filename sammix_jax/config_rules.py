"""What each config field may be. Checked before any work, so that a typing error costs nothing."""

import math
import re
from collections.abc import Iterable, Iterator

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
from sammix_jax.method.sam_mix import BOX_SOURCES, FUSIONS
from sammix_jax.models.baselines.transunet import VARIANTS as TRANSUNETS
from sammix_jax.models.blocks import COMPUTE_DTYPES, POLICIES
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

# A field, whether it is sound, and what is expected of it.
Rule = tuple[str, bool, str]

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
    "model.dtype": COMPUTE_DTYPES,
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
    _refuse(config, _form_rules(config))
    rules = [_value_rules, _input_rules, _data_rules, _model_rules, _training_rules]
    if config.model.system in SYSTEMS:
        rules.append(_system_rules)
    _refuse(config, (rule for rules_of in rules for rule in rules_of(config)))


def _refuse(config, rules: Iterable[Rule]) -> None:
    faults = [
        f"{field}={_get(config, field)!r}: expected {expected}"
        for field, sound, expected in rules
        if not sound
    ]
    if faults:
        raise UserError("config: " + "; ".join(faults) + ".")


def _form_rules(config) -> Iterator[Rule]:
    """How values look; the other rules rely on it."""
    for field, form in TUPLES.items():
        values = _get(config, field)
        numbers = all(isinstance(value, int | float) for value in values)
        yield field, numbers and len(values) == form.count(",") + 1, f"{form}, numbers"
    for field in WHOLE_NUMBERS:
        yield field, all(isinstance(v, int) for v in _get(config, field)), "whole numbers"


def _value_rules(config) -> Iterator[Rule]:
    """What each value may be on its own."""
    for field, options in CHOICES.items():
        yield field, _get(config, field) in options, f"one of {', '.join(map(str, options))}"
    for field, options in SUBSETS.items():
        values = tuple(_get(config, field))
        sound = bool(values) and set(values) <= set(options)
        yield field, sound, f"some of {', '.join(options)}, as a tuple"
    for field, least in AT_LEAST.items():
        yield field, _get(config, field) >= least, f"at least {least}"
    for field in SEEDS:
        yield field, 0 <= _get(config, field) < 2**32, "at least 0 and below 2**32"
    patterns = [("train.trainable", pattern) for pattern in config.train.trainable]
    for field, pattern in [("data.patient", config.data.patient), *patterns]:
        try:
            re.compile(pattern)
        except re.error as error:
            yield field, False, f"regular expressions; of {pattern!r}: {error}"
    teacher, (begin, end) = config.consistency, config.log.profile
    yield "train.trainable", len(config.train.trainable) > 0, "one pattern at least"
    yield "train.adam_b2", 0 <= config.train.adam_b2 < 1, "0 to below 1"
    yield "model.mask_index", config.model.mask_index < 3, "0, 1 or 2"
    yield "cam.threshold", 0 < config.cam.threshold <= 1, "a share of the peak, above 0 to 1"
    yield "consistency.ema", 0 <= teacher.ema < 1, "0 to below 1"
    yield "consistency.confidence", 0.5 <= teacher.confidence < 1, "0.5 to below 1"
    yield "log.profile", 0 <= begin <= end, "(start, stop) with 0 <= start <= stop"


def _input_rules(config) -> Iterator[Rule]:
    low, high = config.input.window
    yield "input.window", low < high, "(low, high) in HU with low < high"
    if config.data.resize == "paper":
        inside = paper.WINDOW[0] <= low and high <= paper.WINDOW[1]
        yield "input.window", inside, f"within {paper.WINDOW}, to which data.resize=paper clips"
    if config.input.scaling != "paper":
        return
    # Its values span [0.327, 0.372].
    where = "where input.scaling=paper, as configs/lits.py has it unless :standard is added"
    yield "data.resize", config.data.resize == "paper", f"paper {where}"
    yield "input.window", (low, high) == paper.WINDOW, f"{paper.WINDOW} {where}"
    if config.model.dtype == "bfloat16":  # which has 24 values in that span, of 186 greys
        fits, fitting = ("minmax",), f"minmax with model.dtype=bfloat16 {where}"
    else:
        fits, fitting = ("minmax", "unit"), f"minmax or unit {where}"
    yield "input.normalise", config.input.normalise in fits, fitting
    yield "train.augment", not config.train.augment, f"False {where}"
    yield "consistency.weight", config.consistency.weight == 0, f"0 {where}"


def _data_rules(config) -> Iterator[Rule]:
    data = config.data
    yield "data.central_fraction", 0 < data.central_fraction <= 1, "above 0 to 1"
    sound = min(data.split) >= 0 < data.split[0]
    yield "data.split", sound, "parts of 0 or more, and training's above"
    axes = "".join(sorted(data.default_orientation.translate(str.maketrans("RPI", "LAS"))))
    expected = '"" or the ends of three axes, such as LAS: one of L and R, of A and P, of S and I'
    yield "data.default_orientation", axes in ("", "ALS"), expected
    start, stop = data.slice_range
    yield "data.slice_range", 0 <= start < stop <= 1, "(start, stop) with 0 <= start < stop <= 1"
    yield (
        "data.slice_range",
        (start, stop) == (0, 1) or data.central_fraction == 1,
        "(0, 1) where data.central_fraction says which slices are kept",
    )


def _model_rules(config) -> Iterator[Rule]:
    model, layer = config.model, config.cam.layer
    gradient = config.cam.method == "grad_cam" or layer == "last"
    yield "cam.method", gradient, "grad_cam where cam.layer is not last"
    where = f"for model.classifier={model.classifier}"
    if model.classifier in STAGES:
        layers = ("last", *STAGES[model.classifier])
        yield "cam.layer", layer in layers, f"one of {', '.join(layers)} {where}"
    if model.classifier in OUTPUT_STRIDES:
        strides = OUTPUT_STRIDES[model.classifier]
        expected = f"one of {', '.join(map(str, strides))} {where}"
        yield "model.classifier_stride", model.classifier_stride in strides, expected
    if model.sam in VARIANTS:
        patch = VARIANTS[model.sam].patch_size
        of_which = f"{patch}, the patch of model.sam={model.sam}"
        yield "model.image_size", model.image_size % patch == 0, f"a multiple of {of_which}"
        yield (
            "pretrain.coarse_steps",
            config.pretrain.coarse_steps == 0 or model.image_size % (2 * patch) == 0,
            f"0, as half of model.image_size={model.image_size} is no multiple of {of_which}",
        )


def _training_rules(config) -> Iterator[Rule]:
    settings, taught = config.train, config.consistency.weight > 0
    yield "train.epochs", math.isfinite(settings.epochs), "a number"
    yield (
        "train.epochs",
        settings.epochs > 0
        or settings.steps > 0
        or bool(config.model.sam_weights or config.model.start_from),
        "above 0; with train.steps=0 too nothing is trained, and that wants model.sam_weights or "
        "model.start_from",
    )
    yield "train.box", settings.box == "cam" or config.cam.box, "cam where cam.box says no box"
    yield (
        "train.batch_unlabelled",
        settings.batch_unlabelled > 0 or not taught,
        "above 0, for a teacher (consistency.weight) teaches on these slices",
    )
    yield (
        "loss.dice_smooth",
        config.loss.dice_smooth > 0 or not (taught or config.loss.negatives or settings.augment),
        "above 0 where a mask may be empty: with a teacher (consistency.weight), loss.negatives or "
        "train.augment",
    )
    sizes = (settings.batch_labelled, settings.batch_unlabelled)
    parts = max(1, settings.accumulate)
    yield (
        "train.accumulate",
        not any(size % parts for size in sizes),
        f"a divisor of train.batch_labelled={sizes[0]} and of train.batch_unlabelled={sizes[1]}, "
        "so that every part of a batch has both kinds",
    )


def _system_rules(config) -> Iterator[Rule]:
    for field, sound, expected in system_rules(config):
        yield field, sound, f"{expected} for model.system={config.model.system}"


def check_files(config) -> None:
    """Refuses files that are not there, before any work. Only the start of a run reads them.

    Raises:
      UserError: names the field and the file.
    """
    start = config.model.start_from
    if start and not (as_path(start) / "checkpoints").is_dir():
        raise UserError(f"model.start_from={start}: no checkpoints there; give a trained workdir.")
    weights = () if start else ("model.sam_weights", "model.classifier_weights")
    for field in (*weights, "data.split_file", "data.labels_file"):
        file = _get(config, field)
        if file and not as_path(file).is_file():
            found = "a folder, expected a file" if as_path(file).is_dir() else "no such file"
            made = "docs/weights.md tells" if field in weights else "README.md (Splits) tells"
            raise UserError(f"{field}={file}: {found}; {made} how to make it.")


def _get(config, field: str):
    for part in field.split("."):
        config = config[part]
    return config
