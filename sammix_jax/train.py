"""Trains SAM-Mix; read from top to bottom."""

import logging
import math
import time

import jax
import numpy as np
from tqdm import tqdm

from sammix_jax.checkpoint import Checkpoints, abstract
from sammix_jax.config import check_workdir, claim_workdir
from sammix_jax.data.batches import Batches, prefetch
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.data.splits import Split, keep, load_or_draw
from sammix_jax.errors import UserError
from sammix_jax.inference import make_predict, predict_slices
from sammix_jax.metrics import dice
from sammix_jax.optim import make_optimiser
from sammix_jax.sam_mix import sam_mix
from sammix_jax.sharding import make_mesh, place_batch, replicated
from sammix_jax.train_log import TrainLog
from sammix_jax.train_step import TrainState, load_pretrained, make_init, make_train_step

_LOG = logging.getLogger(__name__)

# Finite before a state is kept: loss and gradients of the step, and the parameters it made.
SOUND = ("loss", "gradient_norm", "parameter_norm")


def train(config, workdir, store: SliceStore) -> bool:
    """Trains until `config.train.steps` or `.epochs`, from the newest checkpoint if there is one.

    Args:
      config: the run's config.
      workdir: receives config.json, split.json, labels.json, checkpoints, metrics.csv and
        tensorboard.
      store: the prepared slices.

    Returns:
      Whether any step was left to take.

    Raises:
      UserError: a config or data set that cannot train; a loss that is no number.
    """
    check_workdir(config, workdir)

    # ---- Data
    split, labelled = load_or_draw(config, store, workdir)
    if not config.evaluate.root and not split.part(config.evaluate.part):
        raise UserError(
            f"evaluate.part={config.evaluate.part}: that part of the split is empty, so the model "
            "could not be scored; choose another, as in --config.evaluate.part=train."
        )
    others = slices_without_masks(config, store, split, labelled)
    sizes = (config.train.batch_labelled, config.train.batch_unlabelled)
    batches = Batches(store, tuple(labelled), others, sizes, config.seed)
    steps = config.train.steps or math.ceil(config.train.epochs * batches.steps_per_epoch)

    # ---- Mesh
    mesh = make_mesh()
    sharding = replicated(mesh)

    # ---- Model and optimiser
    model = sam_mix(config)
    optimiser = make_optimiser(config.train, steps)

    # ---- State: abstract first, then restored or initialised straight onto the mesh
    init = make_init(model, optimiser, config)
    like = abstract(jax.eval_shape(init), sharding)
    with Checkpoints(workdir, config.checkpoint.every_steps, config.checkpoint.keep) as checkpoints:
        state = checkpoints.restore(like)
        if state is None:
            state = load_pretrained(jax.jit(init, out_shardings=sharding)(), config)
        # Data, model and weights are sound: from here on the workdir belongs to this run.
        claim_workdir(config, workdir)
        keep(split, labelled, store, workdir)
        checkpoints.save_preprocessing(config)
        checkpoints.save_frozen(state)
        start = int(state.step)
        _LOG.info(
            "training from step %d to %d: %d labelled slices, %d without a mask, "
            "%s trained of %s parameters, on %d %s device(s)",
            start,
            steps,
            len(labelled),
            len(others),
            f"{_count(like.trainable):,}",
            f"{_count(like.trainable) + _count(like.frozen):,}",
            mesh.size,
            jax.devices()[0].platform,
        )
        if start >= steps:
            return False

        # ---- Step
        train_step = jax.jit(
            make_train_step(model, optimiser, config),
            out_shardings=(sharding, sharding),
            donate_argnums=0,
        )
        # Gated whatever is reported, so that all scores of a run compare.
        predict = make_predict(model, config, ("cam",), gate=True)

        # ---- Loop
        with (
            TrainLog(workdir, start) as log,
            tqdm(initial=start, total=steps, desc="train", unit="step", disable=None) as bar,
        ):
            begin, begin_step = time.monotonic(), start
            for step, batch in prefetch(batches, start, steps, lambda b: place_batch(b, mesh)):
                state, metrics = train_step(state, batch)
                done = step + 1
                bar.update()
                if done % config.log.every_steps == 0 or done == steps:
                    metrics = {name: float(value) for name, value in metrics.items()}
                    _refuse_nan(metrics, done)
                    seconds = time.monotonic() - begin
                    metrics["slices_per_second"] = (done - begin_step) * sum(sizes) / seconds
                    log.write(done, {f"train/{name}": v for name, v in metrics.items()})
                    bar.set_postfix(loss=f"{metrics['loss']:.3f}")
                    begin, begin_step = time.monotonic(), done
                if split.val and (done % config.log.validate_every_steps == 0 or done == steps):
                    scores = validate(predict, state, store, split, config)
                    log.write(done, {f"val/{name}": v for name, v in scores.items()})
                    listed = ", ".join(f"{name} {v:.3f}" for name, v in scores.items())
                    _LOG.info("step %d of %d: validation %s", done, steps, listed)
                    if "dice" in scores:
                        checkpoints.save_best(state, done, scores["dice"])
                # After validation: a run stopped in it validates again.
                if done % config.checkpoint.every_steps == 0 or done == steps:
                    _refuse_nan({name: float(metrics[name]) for name in SOUND}, done)
                    checkpoints.save(state, done, last=done == steps)
                    begin, begin_step = time.monotonic(), done
    return True


def slices_without_masks(
    config, store: SliceStore, split: Split, labelled: list[SliceId]
) -> tuple[SliceId, ...]:
    """All other slices of the training patients; where there is a teacher, whose lessons need no
    label of any kind, those of unlabelled scans too."""
    scans = split.train
    if config.consistency.weight > 0:
        scans += tuple(name for name, record in store.records.items() if not record.has_label)
    taken = set(labelled)
    return tuple(s for scan in scans for s in store.slices(scan) if s not in taken)


def validate(predict, state: TrainState, store: SliceStore, split: Split, config) -> dict:
    """Per-volume Dice on the store's grid under `cam`, and the classifier's accuracy."""
    volume_dice, correct = [], []
    for scan in split.val:
        slices = store.slices(scan)
        hu = np.stack([store.hu(s) for s in slices])
        predicted = predict_slices(predict, state.variables, hu, None, config.evaluate.batch)
        truth = np.stack([store.mask(s) for s in slices]) > 0
        present = np.array([store.image_label(s) == 1 for s in slices])
        mask = predicted.logits["cam"] > 0
        if truth.any() or mask.any():  # else there is nothing to score
            volume_dice.append(dice(truth, mask))
        correct.extend((predicted.organ_probability >= 0.5) == present)
    scores = {"accuracy": float(np.mean(correct))}
    return scores | ({"dice": float(np.mean(volume_dice))} if volume_dice else {})


def _refuse_nan(metrics: dict[str, float], step: int) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"step {step}: {', '.join(bad)} is not finite; the last checkpoint is sound. Lower "
            "train.learning_rate, or set train.clip_norm, in a new workdir."
        )


def _count(parameters: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))
