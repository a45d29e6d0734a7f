"""The paper's comparison in small: few labels on a pretrained SAM against the best baseline.

Command   make bench-paper     (all rows; stop it and run it again, it goes on)
          make bench-paper ARGS="--systems SYSTEM --counts K --seeds S"     (one row)
          python -m sammix_jax.main --config=configs/paper.py:SYSTEM \
              --config.data.labelled_slices=K --config.seed=S --config.data.labels_seed=S \
              --workdir=DIR     (its model alone, scored in its own domain)
Data      phantom abdomens, as configs/quickstart.py; S draws the K labelled slices and the weights
Labels    K counts the training masks alone: all slices of the 15 patients that train give their
          image-level label to the systems that can use it, and the 3 that validate have masks on
          every slice, which choose the best checkpoint of every system
Model     slices of 128 pixels; SAM is the mini of weights/, pretrained on drawn shapes, which takes
          them at 256, as SAM takes CT at twice its side
Budget    SAM-Mix a tenth of the steps of the baselines, as in the paper; --share of
          benchmarks/accuracy/paper.py gives the baselines less
Expected  docs/results.md

benchmarks/accuracy/paper_tuning.py chooses learning rate and augmentation on validation patients
(docs/results.md has what it found) of U-Net, TransU-Net and MultiMix; SAM-Mix's rate was chosen by
runs of this file, SAMed's LoRA form has that of SAM-Mix's, the others have their configs' own.
"""

from configs import labels, quickstart
from configs.baselines import (
    multimix,
    nnunet,
    sam_mix_labelled_only,
    sam_pp,
    samed,
    transunet,
    unet,
)
from sammix_jax.errors import check_name

STEPS, BASELINE_STEPS = 300, 3000
# A token of the mini is 8 pixels wide: of a slice, 4. Averaged to cells of 8 pixels, the phantom's
# true masks keep a Dice of 0.94, to cells of 4 they keep 0.98.
SAM_SIDE = 256
PROMPTS, DECODER = r"sam/prompt_encoder/.*", r"sam/mask_decoder/.*"
NO_MASK = r"sam/prompt_encoder/no_mask_embed"
LORA = r"sam/image_encoder/.*/lora_.*"
# Images are normalised as they were in pretraining.
PRETRAINED = quickstart.STARTS["pretrained"]
# What each learns on a pretrained SAM whose encoder is frozen, as on LiTS. SAM-Mix itself learns
# whole: validation prefers it, of a SAM that has seen drawn shapes alone. So does SAMed's form, of
# one mask and the longer budget; each has a row in LoRA's form besides. What the prompt gives is
# the difference of sam_mix and sam_mix_unprompted, which never had one.
TRAINED = {
    "sam_pp": {"train.trainable": (PROMPTS, DECODER)},
    "samed_lora": {"train.trainable": (LORA, NO_MASK, DECODER), "train.learning_rate": 3e-3},
    "sam_mix_lora": {
        "train.trainable": (LORA, PROMPTS, DECODER, r"(classifier|fusion)/.*"),
        "train.learning_rate": 3e-3,
    },
}
BASELINE = {"train.steps": BASELINE_STEPS, "log.validate_every_steps": 300}
# How SAM-Mix and its part without other slices learn.
SAM_MIX = {"train.steps": STEPS, "log.validate_every_steps": 30}

SYSTEMS = {
    "unet": (unet.get_config, BASELINE | {"train.learning_rate": 3e-3}),
    "nnunet": (nnunet.get_config, BASELINE),
    "transunet": (transunet.get_config, BASELINE),
    "multimix": (multimix.get_config, BASELINE | {"train.learning_rate": 1e-2}),
    "sam_pp_0": (sam_pp.get_config, PRETRAINED | {"train.epochs": 0.0, "train.steps": 0}),
    "sam_pp": (sam_pp.get_config, PRETRAINED | TRAINED["sam_pp"] | BASELINE),
    "samed_lora": (samed.get_config, PRETRAINED | TRAINED["samed_lora"] | BASELINE),
    "samed": (samed.get_config, PRETRAINED | BASELINE),
    "labelled_only": (sam_mix_labelled_only.get_config, PRETRAINED | SAM_MIX),
    "sam_mix_lora": (quickstart.get_config, PRETRAINED | TRAINED["sam_mix_lora"] | SAM_MIX),
    "sam_mix": (quickstart.get_config, PRETRAINED | SAM_MIX),
    "sam_mix_teacher": (
        quickstart.get_config,
        PRETRAINED | SAM_MIX | labels.VARIANTS["teacher"],
    ),
    "sam_mix_unprompted": (
        quickstart.get_config,
        PRETRAINED | SAM_MIX | {"cam.box": False, "cam.fusion": "none"},
    ),
    "sam_mix_random": (quickstart.get_config, quickstart.STARTS["random"] | SAM_MIX),
}
# Those with the long budget.
BASELINES = tuple(
    name for name, (_, fields) in SYSTEMS.items() if BASELINE.items() <= fields.items()
)


def get_config(system: str = "sam_mix"):
    """The config of a system.

    Raises:
      UserError: no such system.
    """
    check_name("system", system, SYSTEMS)
    make, fields = SYSTEMS[system]
    config = make()
    config.update_from_flattened_dict(fields)
    config.model.image_size = SAM_SIDE
    return config
