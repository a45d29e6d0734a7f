"""How few labels suffice on the phantom, and what each part of the method adds.

Command   make bench-labels     (all rows; stop it and run it again, it goes on)
          python -m sammix_jax.main --config=configs/labels.py:VARIANT \
              --config.data.labelled_slices=K --config.seed=S --config.data.labels_seed=S \
              --workdir=DIR     (one row)
Data      phantom abdomens, portal phase: 15 patients train, 3 validate, 6 test, the same for every
          row; S draws the K labelled slices and the initial weights
Labels    K counts the training masks alone: all slices of the 15 patients give their image-level
          label, and the 3 that validate have masks on every slice, which choose the best checkpoint
Model     mini SAM at 64 with a small ResNet, trained whole from random weights
Hardware  2 CPU cores: 2 to 5 minutes a row to train, one to score
Expected  docs/results.md

Rows have as many steps, not the same cost and data: with `teacher` every slice of a batch is
segmented, and those without masks by the teacher too, so a step makes more passes; and this row
alone also sees the two scans without masks.
"""

from configs import quickstart
from sammix_jax.errors import check_name

VARIANTS = {
    "sam_mix": {},
    "no_fusion": {"cam.fusion": "none"},
    "no_box": {"cam.box": False},
    "teacher": {
        "consistency.weight": 1.0,
        "consistency.start_step": 100,
        "consistency.ramp_steps": 100,
    },
}


def get_config(variant: str = "sam_mix"):
    """The config of a variant.

    Raises:
      UserError: no such variant.
    """
    check_name("variant", variant, VARIANTS)
    config = quickstart.get_config("random")
    config.data.size = 64
    config.model.image_size = 64
    config.train.batch_labelled = 4
    config.train.batch_unlabelled = 4
    config.train.steps = 300
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
