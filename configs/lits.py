"""SAM-Mix as in the paper: liver in LiTS from 50 labelled slices.

Command   python -m sammix_jax.main --config=configs/lits.py --config.data.root=DIR \
              --config.model.sam_weights=FILE --workdir=DIR
Weights   FILE is made by python -m convert.sam (docs/weights.md); without it SAM's encoder is noise
          that nothing but LoRA trains
Preset    paper: the authors' preprocessing to the bit; --config=configs/lits.py:standard keeps
          every slice and its proportions, and is the one for --config.input.normalise=sam
Data      LiTS or Task03_Liver, 131 labelled scans; split 91/13/27 by patient
Model     SAM ViT-B at 1024, LoRA r=8; ResNet-38 (A1); 10 epochs, Adam 1e-4
Expected  the paper states Dice 0.948 ± 0.002 under an unstated prompt protocol; not measured here
"""

from sammix_jax.config import default_config
from sammix_jax.presets import apply_preset


def get_config(preset="paper"):
    config = default_config()
    apply_preset(config, preset)
    # About 12,000 steps an epoch under the paper preset: validated twice in each.
    config.log.validate_every_steps = 6000
    config.log.every_steps = 100
    config.checkpoint.every_steps = 2000
    return config
