"""In the manner of SAMed: LoRA SAM without prompts (Zhang and Liu 2023, arXiv 2304.13785).

Command   python -m sammix_jax.main --config=configs/baselines/samed.py --workdir=DIR
          python -m sammix_jax.main --config=configs/baselines/samed.py:lits \
              --config.data.root=DIR --config.model.sam_weights=FILE --workdir=DIR
Data      the phantom of configs/quickstart.py; with :lits LiTS as configs/lits.py prepares it
Model     LoRA in the encoder; the mask decoder and the embedding of no mask learn whole. On the
          phantom mini SAM from random weights, trained whole
Hardware  phantom: 2 CPU cores; LiTS: an accelerator; time not measured yet
Expected  docs/results.md, as configs/paper.py has it on the phantom;
          not in the paper
"""

from configs.baselines.data import base_config


def get_config(data="phantom"):
    config = base_config(data)
    config.model.system = "prompted_sam"
    config.model.mask_choice = "single"  # nothing is ambiguous where nothing prompts
    config.loss.negatives = True
    config.train.trainable = (
        r"sam/image_encoder/.*/lora_.*",
        r"sam/prompt_encoder/no_mask_embed",
        r"sam/mask_decoder/.*",
    )
    if data == "phantom":
        config.train.trainable = (r"sam/.*",)
    return config
