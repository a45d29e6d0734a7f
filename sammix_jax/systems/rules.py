"""What of a config goes with each system; for `config_rules`."""

from collections.abc import Iterator

from sammix_jax.models.baselines.multimix import MultiMix
from sammix_jax.models.baselines.unet import UNet, nnunet_widths
from sammix_jax.systems.named import HOLD_SAM, SYSTEMS

GREY = ("unet", "nnunet", "multimix")  # whose input has one channel


def system_rules(config) -> Iterator[tuple[str, bool, str]]:
    """Yields fields with whether they are sound for `model.system`, and what is expected."""
    system, model = config.model.system, config.model
    if system != "sam_mix":
        yield "model.freeze_batch_norm", not model.freeze_batch_norm, "False"
        yield "consistency.weight", config.consistency.weight == 0, "0"
        yield "train.box", config.train.box == "cam", "cam, its default,"
        warmup = config.train.classifier_warmup_steps
        yield "train.classifier_warmup_steps", warmup == 0, "0"
        yield "model.classifier_weights", not model.classifier_weights, "none"
    if system not in HOLD_SAM:
        yield "model.sam_weights", not model.sam_weights, "none"
        yield "model.remat", model.remat == "none", "none"
        yield "loss.iou", config.loss.iou == 0, "0"
    if system not in GREY:
        yield "model.widths", not model.widths, "(), for it has its own sizes,"
    if system != "prompted_sam":
        yield "model.prompt", model.prompt == "none", "none"
    if system == "sam_mix":
        least = model.classifier_stride + 1
        expected = f"{least} at least, or the classifier's map, and so the CAM, is a single cell"
        yield "data.size", config.data.size >= least, expected
        expected = "False (its classifier learns them; consistency.weight gives them to a teacher)"
        yield "loss.negatives", not config.loss.negatives, expected
    if model.prompt == "points":
        expected = "False where model.prompt=points, for there is no point without the organ,"
        yield "loss.negatives", not config.loss.negatives, expected
    if system in GREY:
        grey = config.input.normalise != "sam"
        yield "input.normalise", grey, "minmax or unit, of one channel,"
        found = tuple(model.widths)
        sound = not found or (len(found) >= 3 and all(w > 0 for w in found))
        yield "model.widths", sound, "() or three widths at least, above 0"
    if system in (*GREY, "transunet"):
        least = _multiple(config)
        yield "data.size", config.data.size % least == 0, f"a multiple of {least}"
    if system == "nnunet" and not model.widths:
        halved = least > 1  # once at least by the planner
        yield "data.size", halved, "an even number, from 8 on, that maps can be halved by,"
    if system == "multimix":
        sizes = config.train.batch_labelled, config.train.batch_unlabelled
        yield (
            "train.batch_unlabelled",
            sizes[0] == sizes[1],
            (f"train.batch_labelled={sizes[0]}, for its divergence takes slices pair by pair,"),
        )
        # Its strong views would drown the authors' values, which span a twentieth of [0, 1].
        yield "input.scaling", config.input.scaling == "window", "window"
        yield "multimix.confidence", config.multimix.confidence <= 1, "0 to 1"
    allowed = SYSTEMS[system].protocols
    scored = set(config.evaluate.protocols) & set(allowed)
    yield "evaluate.protocols", bool(scored), f"some of {', '.join(allowed)}"


def _multiple(config) -> int:
    """Of which a slice's side must be a multiple."""
    system, side = config.model.system, config.data.size
    if system == "transunet":
        return 16
    published = {
        "unet": UNet.widths,
        "multimix": MultiMix.widths,
        "nnunet": nnunet_widths(side, side),
    }
    levels = len(tuple(config.model.widths) or published[system])
    return 2 ** (levels if system == "multimix" else levels - 1)
