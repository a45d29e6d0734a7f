"""The paper's cross-domain task: a trained workdir on 20 scans of TotalSegmentator.

Command   python -m sammix_jax.main --mode=evaluate --config=configs/totalsegmentator.py
          --config.evaluate.root=DIR --workdir=WORKDIR
Data      TotalSegmentator, sNNNN/ct.nii.gz with sNNNN/segmentations/liver.nii.gz; 20 of the scans
          that show the liver, drawn by evaluate.seed, as the paper does not name its own
Model     the workdir's, with all its settings: this file says only how to evaluate
Expected  the paper states Dice 0.923 ± 0.004, HD 11.164 ± 0.021 for training on 50 slices of LiTS,
          under an unstated prompt protocol; not measured here
"""

import ml_collections
from ml_collections import config_dict

from sammix_jax.config import default_config


def get_config():
    # Without a value: as the workdir has it, unless an option of the command line says otherwise.
    evaluate = default_config().evaluate
    fields = {name: config_dict.placeholder(evaluate.get_type(name)) for name in evaluate}
    config = ml_collections.ConfigDict({"evaluate": fields})
    config.evaluate.scans = 20
    config.evaluate.seed = 0
    return config.lock()
