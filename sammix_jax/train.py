"""Trains SAM-Mix, or a system that it is compared with; read from top to bottom."""

import logging
import math
from collections.abc import Iterable

import jax

from sammix_jax import hosts
from sammix_jax.config_files import check_workdir, claim_workdir
from sammix_jax.data.batches import Batches
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.paths import as_path
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.data.split_files import BEGUN_FROM, keep, load_or_draw
from sammix_jax.data.splits import Split, taught_scans
from sammix_jax.errors import UserError
from sammix_jax.evaluation.scans import partly_annotated, scored_scans
from sammix_jax.evaluation.validate import validate
from sammix_jax.inference import make_predict
from sammix_jax.sharding import abstract_state, batch_layout, make_mesh, place_batch, shardings
from sammix_jax.systems.named import make_system
from sammix_jax.training.checkpoint import Checkpoints, best_step
from sammix_jax.training.lock import sole_writer
from sammix_jax.training.loop import Validation, owes_validation, run_steps
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.start import begun_from, load_pretrained
from sammix_jax.training.step import TrainState, jit_train_step, make_init

_LOG = logging.getLogger(__name__)


def train(config, workdir, store: SliceStore, scored: bool = True) -> bool:
    """Trains until `config.train.steps` or `.epochs`, from the newest checkpoint if there is one.

    Args:
      config: the run's config.
      workdir: receives config.json, split.json, labels.json, scans.json, images.json,
        weights.json, checkpoints, metrics.csv and tensorboard.
      store: the prepared slices.
      scored: whether an evaluation follows, so that what would fail then is refused now.

    Returns:
      Whether any step was left to take or to validate.

    Raises:
      UserError: a config or data set that cannot train; a number that is not finite.
      hosts.Terminated: SIGTERM, once the state is saved; at Ctrl-C KeyboardInterrupt.
    """
    check_workdir(config, workdir)

    # ---- Mesh
    mesh = make_mesh(config.mesh.fsdp)
    layout = batch_layout(config.train, mesh)

    # ---- Data
    split, labelled = load_or_draw(config, store, workdir)
    if scored:
        _check_scoring(config.evaluate, split, store)
    others = slices_without_masks(config, store, split, labelled)
    sizes = (layout.labelled, layout.unlabelled)
    if layout.unlabelled:
        _tell_of_one_class(store, others)
    batches = Batches(store, tuple(labelled), others, sizes, config.seed)
    steps = config.train.steps or math.ceil(config.train.epochs * batches.steps_per_epoch)
    if 0 < steps <= config.train.classifier_warmup_steps:
        raise UserError(
            f"train.classifier_warmup_steps={config.train.classifier_warmup_steps}: expected fewer "
            f"than the run's {steps} steps, or nothing but the classifier would learn."
        )
    for field, begins in (
        ("train.warmup_steps", config.train.warmup_steps),
        ("consistency.start_step", config.consistency.start_step * (config.consistency.weight > 0)),
    ):
        if 0 < steps <= begins:
            _LOG.warning("%s=%d: not over when the run's %d steps are", field, begins, steps)

    # ---- System and optimiser
    system = make_system(config)
    optimiser = make_optimiser(config.train, steps)

    # ---- State: abstract first, then restored or initialised straight onto the mesh
    init = make_init(system, optimiser, config)
    like = abstract_state(init, mesh, config.mesh.shard_frozen)
    if steps and not like.trainable:
        raise UserError(
            f"train.trainable={tuple(config.train.trainable)}: matches no parameter that there is "
            "to train, so nothing would learn; expected some that do."
        )
    sharding = shardings(like)
    with sole_writer(workdir), Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        checkpoints.check_config(config)
        state = checkpoints.restore(like)
        begins = state is None
        if begins:
            state, model_step = load_pretrained(jax.jit(init, out_shardings=sharding)(), config)
            begun = hosts.on_first(lambda: _begun_from(config, model_step, workdir))
        # Data, model and weights are sound: from here on the workdir belongs to this run.
        claim_workdir(config, workdir)
        keep(split, labelled, store, workdir)
        if begins:
            _tell_of_frozen_noise(state.frozen, config.model.sam_weights or config.model.start_from)
            _tell_of_moving_statistics(state, config.model.freeze_batch_norm)
            if hosts.is_first():  # the files may be others later
                write_json(as_path(workdir) / BEGUN_FROM, begun)
        checkpoints.save_config(config)
        checkpoints.save_frozen(state)
        start = int(state.step)
        owes = bool(split.val) and owes_validation(config, workdir, start, steps)
        if start >= steps and not owes:
            if not steps:  # the weights as they are loaded are what is to be scored
                checkpoints.save(state, 0)
                checkpoints.wait()
            return False
        _LOG.info(
            "training from step %d to %d: %d slices lend masks (%s), %d others do not; %s trained "
            "of %s parameters, on %d %s device(s)",
            start,
            steps,
            len(labelled),
            config.data.labels_file
            or f"data.labelled_slices={config.data.labelled_slices}; 0: all",
            len(others),
            f"{_count(like.trainable):,}",
            f"{_count(like.trainable) + _count(like.frozen):,}",
            mesh.size,
            mesh.devices.flat[0].platform,
        )

        # ---- Step
        train_step = jit_train_step(system, optimiser, config, layout, mesh, sharding)
        # Gated whatever is reported, and by as many points, so that all scores of a run compare.
        alike = config.copy_and_resolve_references()
        alike.evaluate.points = config.train.points
        predict = make_predict(make_system(alike), alike, (system.headline,), mesh, gate=True)

        # ---- Loop
        validation = Validation(
            lambda state, stop: validate(
                predict,
                state.variables,
                store,
                split.val,
                config.evaluate.batch,
                stop,
                system.headline,
            ),
            best="dice",
        )
        run_steps(
            state,
            train_step,
            lambda step: place_batch(batches, step, layout, mesh),
            steps,
            config=config,
            workdir=workdir,
            checkpoints=checkpoints,
            images=sum(sizes),
            validation=validation if split.val else None,
            owes=owes,
        )
    return True


def slices_without_masks(
    config, store: SliceStore, split: Split, labelled: list[SliceId]
) -> tuple[SliceId, ...]:
    """All other slices of the training patients of which it is known whether they show the organ;
    where there is a teacher, whose lessons need no label of any kind, also those of which it is
    not, and those of unlabelled scans, but for scans of patients who validate or test."""
    scans, taught = split.train, config.consistency.weight > 0
    if taught:
        unlabelled = [name for name, record in store.records.items() if not record.has_label]
        scans += (may_teach := taught_scans(unlabelled, split, config.data.patient))
        if left_out := set(unlabelled) - set(may_teach):
            _LOG.info(
                "%d scans without masks are of patients who validate or test, and left out of "
                "training: %s",
                len(left_out),
                ", ".join(sorted(left_out)[:8]),
            )
    taken = set(labelled)
    return tuple(
        s
        for scan in scans
        for s in store.slices(scan)
        if s not in taken and (taught or store.image_label(s) >= 0)
    )


def _check_scoring(evaluate, split: Split, store: SliceStore) -> None:
    """Refuses before the training what would only be found after it."""
    try:
        if not evaluate.root:
            partly_annotated(evaluate, scored_scans(evaluate, split), store.records)
        elif not as_path(evaluate.root).exists():
            raise UserError(
                f"evaluate.root={evaluate.root}: no such folder, so the model could not be scored; "
                "name one, or leave it out to score the split's scans."
            )
    except UserError as error:
        raise UserError(f"{error} Or train alone, with --noevaluate.") from error


def _begun_from(config, model_step: int | None, workdir) -> dict:
    """`begun_from`; refuses another start than of a best state that was kept before the run was cut
    off, which goes with the frozen parameters of that start."""
    begun = begun_from(config, model_step)
    kept, best = as_path(workdir) / BEGUN_FROM, best_step(workdir)
    if best is not None and kept.exists() and read_json(kept) != begun:
        raise UserError(
            f"{workdir}/checkpoints/best/{best}: of a start from other weights, which {kept} "
            "tells; bring these back, or give another --workdir."
        )
    return begun


def _tell_of_one_class(store: SliceStore, others: Iterable[SliceId]) -> None:
    if not any(store.image_label(s) == 0 for s in others):
        _LOG.warning(
            "no slice of the training patients is known not to show data.organ=%s, so nothing "
            "teaches the model where it is not: annotate some above and below it throughout.",
            store.params["organ"],
        )


def _tell_of_frozen_noise(frozen: dict, started_from: str) -> None:
    if not started_from and "sam/image_encoder/patch_embed/kernel" in frozen:
        _LOG.warning(
            "SAM's image encoder is frozen at random values, which makes a SAM of no use: give "
            "--config.model.sam_weights=FILE (docs/weights.md tells how to make it), or train it."
        )


def _tell_of_moving_statistics(state: TrainState, freeze_batch_norm: bool) -> None:
    for part in {} if freeze_batch_norm else state.batch_stats:
        if not any(path.startswith(f"{part}/") for path in state.trainable):
            _LOG.warning(
                "no parameter of the %s is trained, but its BatchNorm goes on learning the "
                "statistics of the batches; --config.model.freeze_batch_norm=True leaves the %s "
                "as it was loaded.",
                part,
                part,
            )


def _count(parameters: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))
