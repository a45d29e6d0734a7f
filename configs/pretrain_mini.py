"""A promptable SAM of 3.7 M parameters, pretrained on drawn shapes: that of weights/.

Command   python -m sammix_jax.main --mode=pretrain --config=configs/pretrain_mini.py \
              --workdir=DIR/128
          python -m sammix_jax.main --mode=pretrain --config=configs/pretrain_mini.py:finer \
              --config.model.sam_weights=DIR/128/sam_mini.safetensors --workdir=DIR/256
Data      procedural scenes (sammix_jax/pretrain/scenes.py), drawn as they are needed and never
          twice; no anatomy
Model     mini SAM, without LoRA, trained whole: at 64 pixels, then at 128, then, as `finer`, at
          256, where a token sees half as much of the picture
Hardware  2 CPU cores: 80 minutes and 2.9 GB, then 74 minutes and 7.4 GB
Recipe    Segment Anything's: box or point, corrections, the answer as a mask prompt, focal and
          Dice; image embeddings learn besides to be alike within a shape (pretrain/step.py)
Writes    DIR/256/sam_mini.safetensors, for --config.model.sam_weights
"""

from sammix_jax.config import default_config
from sammix_jax.errors import check_name

PARTS = {
    "first": {
        "model.image_size": 128,
        "pretrain.coarse_steps": 4500,
        "train.steps": 6000,
        "train.learning_rate": 1.5e-3,
        "train.warmup_steps": 200,
        "log.validate_every_steps": 500,
        "checkpoint.every_steps": 200,
    },
    # Its step takes four times as long.
    "finer": {
        "seed": 1,  # other scenes
        "model.image_size": 256,
        "train.steps": 720,
        "train.learning_rate": 1e-3,
        "train.warmup_steps": 40,
        "log.validate_every_steps": 360,
        "checkpoint.every_steps": 120,
    },
}


def get_config(part: str = "first"):
    """The config of a part.

    Raises:
      UserError: no such part.
    """
    check_name("part", part, PARTS)
    config = default_config()
    config.model.sam = "mini"
    config.model.lora_rank = 0
    config.input.normalise = "sam"

    config.train.trainable = (
        r"sam/(image_encoder|mask_decoder)/.*",
        r"sam/prompt_encoder/.*",
    )
    config.train.adam_b2 = 0.95
    config.train.schedule = "cosine"
    config.train.weight_decay = 0.05
    config.train.clip_norm = 1.0
    config.log.every_steps = 20
    config.update_from_flattened_dict(PARTS[part])
    return config
