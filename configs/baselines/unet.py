"""U-Net, as in the code of SAM-Mix's authors.

Command   python -m sammix_jax.main --config=configs/baselines/unet.py --workdir=DIR
          python -m sammix_jax.main --config=configs/baselines/unet.py:lits \
              --config.data.root=DIR --workdir=DIR
Data      the phantom of configs/quickstart.py; with :lits LiTS as configs/lits.py prepares it
Model     2 million parameters, dropout 0.25; Dice and cross-entropy on the labelled slices, and on
          those whose image-level label says that they are empty
Hardware  phantom: 2 CPU cores; LiTS: an accelerator; time not measured yet
Expected  docs/results.md, as configs/paper.py has it on the phantom;
          the paper states Dice 0.897 ± 0.010 on LiTS
"""

from configs.baselines.data import base_config


def get_config(data="phantom"):
    config = base_config(data)
    config.model.system = "unet"
    config.loss.negatives = True
    return config
