"""The whole of SAM-Mix in minutes on a laptop: phantom CT, a small model, no download.

Command   make demo
          python -m sammix_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
          (configs/quickstart.py:random begins from random weights)
Data      phantom abdomens, made on first use
Model     mini SAM at 128, pretrained on drawn shapes (weights/), with a small ResNet from random
          weights; trained whole
Hardware  2 CPU cores, 2.1 GB: 7 to 8 minutes
Expected  phantom, 6 unseen patients, one seed: cam Dice 0.930 ± 0.012, HD95 11.1 ± 8.9 mm
"""

from sammix_jax.config import default_config
from sammix_jax.errors import check_name

STARTS = {
    "pretrained": {"model.sam_weights": "weights/sam_mini.safetensors", "input.normalise": "sam"},
    "random": {"model.sam_weights": "", "input.normalise": "unit"},
}


def get_config(start: str = "pretrained"):
    """The config; `start` says whence SAM begins.

    Raises:
      UserError: no such start.
    """
    check_name("start", start, STARTS)
    config = default_config()
    config.update_from_flattened_dict(STARTS[start])
    config.data.size = 128
    config.data.phantom.scans = 26
    config.data.phantom.unlabelled = 2
    config.data.split = (15, 3, 6)

    config.model.sam = "mini"
    config.model.image_size = 128
    config.model.classifier = "mini"
    config.model.classifier_stride = 8

    # The classifier is new, and SAM has seen drawn shapes alone: everything learns.
    config.train.trainable = (
        r"sam/.*",
        r"(classifier|fusion)/.*",
    )
    config.train.steps = 300
    config.train.batch_labelled = 8
    config.train.batch_unlabelled = 8
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.warmup_steps = 30
    config.train.weight_decay = 0.01
    config.train.clip_norm = 1.0
    config.train.augment = True
    config.loss.segmentation = 1.0
    config.loss.bce = 1.0
    return config
