"""SAM-PP: Segment Anything prompted with a point of the true mask, an oracle.

Command   python -m sammix_jax.main --config=configs/baselines/sam_pp.py --workdir=DIR
          python -m sammix_jax.main --config=configs/baselines/sam_pp.py:lits \
              --config.data.root=DIR --config.model.sam_weights=FILE --workdir=DIR
Data      the phantom of configs/quickstart.py; with :lits LiTS as configs/lits.py prepares it
Model     SAM with its encoder frozen; prompt encoder and mask decoder learn from the labelled
          slices, on LiTS for 100 epochs of these: 5,000 steps at 50 slices, where the others take
          1.2 million (--config.train.steps says otherwise). SAM-PP-0 trains nothing:
          --config.train.epochs=0 --config.train.steps=0, which wants model.sam_weights. On the
          phantom that run is configs/paper.py:sam_pp_0; this config's is mini SAM from random
          weights, trained whole
Hardware  phantom: 2 CPU cores; LiTS: an accelerator; time not measured yet
Expected  docs/results.md, as configs/paper.py has it on the phantom;
          the paper states Dice 0.726 with 50 masks on LiTS, 0.441 with none
"""

from configs.baselines.data import base_config


def get_config(data="phantom"):
    config = base_config(data)
    config.model.system = "prompted_sam"
    config.model.prompt = "points"
    config.model.lora_rank = 0
    config.evaluate.protocols = ("gt_points", "gt_box")
    config.train.batch_unlabelled = 0
    config.train.trainable = (r"sam/prompt_encoder/.*", r"sam/mask_decoder/.*")
    if data == "lits":
        config.log.validate_every_steps = 50  # an epoch of 50 slices, ten of 5
    if data == "phantom":
        config.train.trainable = (r"sam/.*",)
    return config
