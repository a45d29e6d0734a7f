"""How slices are prepared, by name; a config file takes one with `--config=configs/NAME.py:PRESET`.

paper     the authors' arithmetic to the bit (`data/paper.py`): the central 30% of the slices, HU
          clipped to [-160, 240] before they are resized to 256, float16. It fits no augmentation
          and no `input.normalise="sam"`: the values span a twentieth of [0, 1].
standard  every slice keeps its int16 HU and its proportions; the window is applied on the device,
          so that it can change without another store. Any `data.size`.

What a preset does not name is left as it is.
"""

from sammix_jax.data import paper
from sammix_jax.errors import check_name

PRESETS = {
    "paper": {
        "data.resize": "paper",
        "data.size": paper.SIZE,
        "data.central_fraction": paper.CENTRAL_FRACTION,
        "data.slice_range": (0.0, 1.0),
        "data.split": (91, 13, 27),
        "input.scaling": "paper",
        "input.window": tuple(map(float, paper.WINDOW)),
        "input.normalise": "minmax",
    },
    "standard": {
        "data.resize": "fit",
        "data.central_fraction": 1.0,
        "data.slice_range": (0.0, 1.0),
        "input.scaling": "window",
    },
}


def apply_preset(config, name: str) -> None:
    """Sets the fields of a preset in `config`.

    Raises:
      UserError: no such preset.
    """
    check_name("preset", name, PRESETS)
    config.update_from_flattened_dict(PRESETS[name])
