"""nnU-Net's form: its 2D network, loss, optimiser and augmentation, without its planning.

Command   python -m sammix_jax.main --config=configs/baselines/nnunet.py --workdir=DIR
          python -m sammix_jax.main --config=configs/baselines/nnunet.py:lits \
              --config.data.root=DIR --workdir=DIR
Data      the phantom of configs/quickstart.py; with :lits LiTS as configs/lits.py prepares it
Model     strided and transposed convolutions, deep supervision; SGD 0.01 with Nesterov momentum
          0.99, poly schedule, weight decay 3e-5, gradients clipped at 12; predictions are means
          over four mirrorings. On the phantom narrow, for CPUs: 1.3 million parameters, where
          nnU-Net's rule gives 20.6.
          Its Dice is of each slice, where nnU-Net's is of the whole batch
Hardware  phantom: 2 CPU cores; LiTS: an accelerator; time not measured yet
Expected  docs/results.md, as configs/paper.py has it on the phantom;
          the paper states Dice 0.863 ± 0.034 on LiTS
"""

from configs.baselines.data import base_config


def get_config(data="phantom"):
    config = base_config(data)
    config.model.system = "nnunet"
    config.loss.negatives = True
    config.train.optimiser = "sgd"
    config.train.schedule = "poly"
    config.train.learning_rate = 1e-2
    config.train.warmup_steps = 0
    config.train.weight_decay = 3e-5
    config.train.clip_norm = 12.0
    config.train.augment = True
    config.train.augmentation = "nnunet"
    if data == "phantom":
        config.model.widths = (16, 32, 64, 128, 128)
    else:
        # The same slices, windowed on the device: the authors' float16 values span a twentieth of
        # [0, 1], which augmentation does not fit.
        config.input.scaling = "window"
        # Stretching each slice to [0, 1] afterwards would undo what augmentation did to its grey.
        config.input.normalise = "unit"
    return config
