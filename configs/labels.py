"""How few labels suffice on the phantom, and what each part of the method adds.

Command   make bench-labels     (all rows; stop it and run it again, it goes on)
          python -m sammix_jax.main --config=configs/labels.py:VARIANT \
              --config.data.labelled_slices=K --config.seed=S --config.data.labels_seed=S \
              --workdir=DIR     (one row)
Data      phantom abdomens, portal phase: 15 patients train, 3 validate, 6 test, the same for every
          row; S draws the K labelled slices and the initial weights
Model     mini SAM at 64 with a small ResNet, trained whole from random weights
Hardware  2 CPU cores: 2 to 4 minutes a row
Expected  docs/results.md
"""

from configs import quickstart

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
    config = quickstart.get_config()
    config.data.size = 64
    config.model.image_size = 64
    config.train.batch_labelled = 4
    config.train.batch_unlabelled = 4
    config.train.steps = 300
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
