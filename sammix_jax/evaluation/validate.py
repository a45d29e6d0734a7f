"""What a run measures of itself while it trains, to choose its best checkpoint."""

from collections.abc import Callable

import numpy as np

from sammix_jax.data.slices import SliceStore
from sammix_jax.evaluation.metrics import dice
from sammix_jax.hosts import Terminated
from sammix_jax.inference import predict_slices
from sammix_jax.systems.system import ORACLES


def validate(
    predict,
    variables: dict,
    store: SliceStore,
    scans: tuple[str, ...],
    batch: int,
    stop: Callable[[], bool],
    protocol: str,
) -> dict[str, float]:
    """Scores scans on the store's grid under one protocol.

    Args:
      predict: from `inference.make_predict`, of the protocol.
      variables: the model's parameters and batch statistics.
      store: the prepared slices.
      scans: which of its scans.
      batch: slices at a time.
      stop: asked before each scan.
      protocol: the system's headline.

    Returns:
      `dice`, the mean over volumes, where any has something to score; and `accuracy` over slices,
      where there is a classifier.

    Raises:
      Terminated: `stop` said so.
    """
    volume_dice, correct = [], []
    for scan in scans:
        if stop():
            raise Terminated("stopped in validation")
        slices = store.slices(scan)
        hu = np.stack([store.hu(s) for s in slices])
        truth = np.stack([store.mask(s) for s in slices]) > 0
        prompted = truth if protocol in ORACLES else None
        predicted = predict_slices(predict, variables, hu, prompted, batch)
        present = np.array([store.image_label(s) == 1 for s in slices])
        mask = predicted.logits[protocol] > 0
        if truth.any() or mask.any():  # else there is nothing to score
            volume_dice.append(dice(truth, mask))
        if predicted.organ_probability is not None:
            correct.extend((predicted.organ_probability >= 0.5) == present)
    scores = {"accuracy": float(np.mean(correct))} if correct else {}
    return scores | ({"dice": float(np.mean(volume_dice))} if volume_dice else {})
