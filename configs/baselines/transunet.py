"""TransU-Net: ResNet-50, ViT-B and a U-Net's decoder (Chen et al. 2021).

Command   python -m sammix_jax.main --config=configs/baselines/transunet.py --workdir=DIR
          python -m sammix_jax.main --config=configs/baselines/transunet.py:lits \
              --config.data.root=DIR --workdir=DIR
Data      the phantom of configs/quickstart.py; with :lits LiTS as configs/lits.py prepares it
Model     R50-ViT-B/16 from random weights, where its authors have ImageNet's; on the phantom mini
Hardware  phantom: 2 CPU cores; LiTS: an accelerator; time not measured yet
Expected  docs/results.md, as configs/paper.py has it on the phantom;
          the paper states Dice 0.889 ± 0.005 on LiTS
"""

from configs.baselines.data import base_config


def get_config(data="phantom"):
    config = base_config(data)
    config.model.system = "transunet"
    config.loss.negatives = True
    if data == "phantom":
        config.model.transunet = "mini"
    return config
