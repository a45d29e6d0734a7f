"""A promptable SAM of 3.7 M parameters, pretrained on drawn shapes: that of weights/.

Command   python -m sammix_jax.main --mode=pretrain --config=configs/pretrain_mini.py --workdir=DIR
Data      procedural scenes (sammix_jax/pretrain/scenes.py), drawn as they are needed and never
          twice; no anatomy
Model     mini SAM at 128, without LoRA, trained whole
Hardware  2 CPU cores, 2.9 GB: 80 minutes
Recipe    Segment Anything's: box or point, corrections, the answer as a mask prompt, focal and
          Dice; image embeddings learn besides to be alike within a shape (pretrain/step.py)
Writes    DIR/sam_mini.safetensors, for --config.model.sam_weights
"""

from sammix_jax.config import default_config


def get_config():
    config = default_config()
    config.model.sam = "mini"
    config.model.image_size = 128
    config.model.lora_rank = 0
    config.input.normalise = "sam"

    config.train.trainable = (
        r"sam/(image_encoder|mask_decoder)/.*",
        r"sam/prompt_encoder/(?!position_encoding).*",
    )
    config.train.steps = 6000
    config.pretrain.coarse_steps = 4500
    config.train.learning_rate = 1.5e-3
    config.train.adam_b2 = 0.95
    config.train.schedule = "cosine"
    config.train.warmup_steps = 200
    config.train.weight_decay = 0.05
    config.train.clip_norm = 1.0

    config.log.every_steps = 20
    config.log.validate_every_steps = 500
    config.checkpoint.every_steps = 200
    return config
