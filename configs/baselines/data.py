"""Data, split, labels and evaluation that all baselines share with SAM-Mix's own runs."""

from configs import lits, quickstart
from sammix_jax.errors import check_name

VARIANTS = ("phantom", "lits")


def sam_mix_config(data: str):
    """SAM-Mix's own config on "phantom" or "lits".

    Raises:
      UserError: no such variant.
    """
    check_name("variant", data, VARIANTS)
    return quickstart.get_config("random") if data == "phantom" else lits.get_config()


def base_config(data: str):
    """A config of everything but the system; the caller says the rest.

    Args:
      data: "phantom", that of configs/quickstart.py; "lits", that of configs/lits.py, where the
        paper trains its baselines for 100 epochs. An epoch passes over the slices without masks
        once, about 12,000 steps, or over the labelled ones where there are no others. All
        parameters are trained.

    Raises:
      UserError: no such variant.
    """
    config = sam_mix_config(data)
    config.train.trainable = (".*",)
    config.loss.segmentation = 1.0
    config.loss.bce = 1.0
    config.evaluate.protocols = ("none",)
    if data == "lits":
        config.train.epochs = 100.0
        config.log.validate_every_steps = 12_000  # about an epoch
    return config
