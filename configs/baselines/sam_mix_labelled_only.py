"""SAM-Mix without the slices that have no mask: what their image-level labels add.

Command   python -m sammix_jax.main --config=configs/baselines/sam_mix_labelled_only.py \
              --workdir=DIR
          python -m sammix_jax.main --config=configs/baselines/sam_mix_labelled_only.py:lits \
              --config.data.root=DIR --config.model.sam_weights=FILE --workdir=DIR
Data      the phantom of configs/quickstart.py; with :lits LiTS as configs/lits.py prepares it
Model     SAM-Mix as in configs/quickstart.py or configs/lits.py. All slices that it sees show the
          organ, so its classifier says so of any
Hardware  phantom: 2 CPU cores; LiTS: an accelerator; time not measured yet
Expected  docs/results.md, as configs/paper.py has it on the phantom;
          not in the paper
"""

from configs.baselines.data import sam_mix_config


def get_config(data="phantom"):
    config = sam_mix_config(data)
    config.train.batch_unlabelled = 0
    if data == "lits":
        config.train.steps = 120_000  # about those of configs/lits.py; an epoch is 50 steps here
    return config
