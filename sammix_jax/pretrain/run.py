"""Pretrains a promptable SAM on procedural scenes; read from top to bottom."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sammix_jax.config_files import check_workdir, claim_workdir
from sammix_jax.data.paths import Path, as_path
from sammix_jax.errors import UserError
from sammix_jax.hosts import to_host
from sammix_jax.models.sam.sam import Sam
from sammix_jax.pretrain.scenes import SHAPES
from sammix_jax.pretrain.score import VALIDATION, held_out_scenes, make_answer, prompt_ious
from sammix_jax.pretrain.step import jit_pretrain_step, make_init
from sammix_jax.sharding import abstract_state, along_batch, make_mesh, shardings
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.lock import sole_writer
from sammix_jax.training.loop import Validation, owes_validation, run_steps
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.start import load_pretrained
from sammix_jax.weights import write_weights

_LOG = logging.getLogger(__name__)


def pretrain(config, workdir) -> Path:
    """Trains until `config.train.steps`: from the newest checkpoint, else from
    `model.sam_weights`, else from random values.

    Args:
      config: the run's config; reads `pretrain`, `model`, `input.normalise`, `train`, `mesh`,
        `checkpoint` and `log`.
      workdir: receives config.json, checkpoints, metrics.csv and tensorboard.

    Returns:
      The weight file, WORKDIR/sam_VARIANT.safetensors in float16: the best state by validation.

    Raises:
      UserError: a config that cannot train; a number that is not finite.
      hosts.Terminated: SIGTERM, once the state is saved; at Ctrl-C KeyboardInterrupt.
    """
    check_workdir(config, workdir)
    prompts = config.pretrain.prompts
    if prompts % 2 or prompts > SHAPES:
        raise UserError(
            f"pretrain.prompts={prompts}: expected an even number, half for boxes and half for "
            f"points, of {SHAPES} at most, the shapes of a scene."
        )
    for field, found, expected in (
        ("train.accumulate", config.train.accumulate, 1),
        ("train.classifier_warmup_steps", config.train.classifier_warmup_steps, 0),
        ("consistency.weight", config.consistency.weight, 0),
        ("model.start_from", config.model.start_from, ""),
    ):
        if found != expected:
            raise UserError(f"{field}={found}: expected {expected!r}; pretraining has none.")
    if not 0 < config.train.steps >= config.pretrain.coarse_steps:
        raise UserError(
            f"train.steps={config.train.steps}: expected above 0, and "
            f"pretrain.coarse_steps={config.pretrain.coarse_steps} at least, the first of them."
        )

    # ---- Mesh, model and optimiser
    mesh = make_mesh(config.mesh.fsdp)
    steps, images = config.train.steps, config.pretrain.images
    sam = Sam(
        variant=config.model.sam,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        query_chunk=config.model.query_chunk,
    )
    optimiser = make_optimiser(config.train, steps)

    # ---- State: abstract first, then restored or initialised straight onto the mesh
    init = make_init(sam, optimiser, config)
    like = abstract_state(init, mesh, config.mesh.shard_frozen)
    sharding = shardings(like)
    with sole_writer(workdir), Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        checkpoints.check_config(config)
        state = checkpoints.restore(like)
        if state is None:
            state, _ = load_pretrained(jax.jit(init, out_shardings=sharding)(), config)
        claim_workdir(config, workdir)
        checkpoints.save_config(config)
        checkpoints.save_frozen(state)
        _LOG.info(
            "pretraining from step %d to %d on %d %s device(s)",
            int(state.step),
            steps,
            mesh.size,
            mesh.devices.flat[0].platform,
        )
        owes = owes_validation(config, workdir, int(state.step), steps)
        if int(state.step) < steps or owes:
            # ---- Loop: a batch is the images' numbers; the step draws the rest on the device
            if images % mesh.size:
                _LOG.warning(
                    "pretrain.images=%d cannot be divided over %d devices, so each computes all of "
                    "them; make it a multiple of %d to use them all.",
                    *(images, mesh.size, mesh.size),
                )
            numbers = jax.device_put(np.arange(images, dtype=np.int32), along_batch(mesh, images))
            side = config.model.image_size
            examples = held_out_scenes(config.pretrain.held_out, side, VALIDATION)
            answer = make_answer(sam, config.input.normalise, mesh)
            coarse, fine = (
                jit_pretrain_step(sam, optimiser, config, mesh, drawn, sharding)
                for drawn in (side // 2, side)
            )
            state = run_steps(
                state,
                lambda state, batch: batch.take(state, batch.numbers),
                lambda step: _Batch(
                    coarse if step < config.pretrain.coarse_steps else fine, numbers
                ),
                steps,
                config=config,
                workdir=workdir,
                checkpoints=checkpoints,
                images=images,
                validation=Validation(
                    lambda state, stop: _measure(answer, state, examples), best="iou"
                ),
                owes=owes,
            )
        checkpoints.wait()
        best = checkpoints.restore_best(like)
    return _write(config, workdir, best)


class _Batch(NamedTuple):
    """The images of a step, by number, and what takes it: the first steps see coarse ones."""

    take: Callable
    numbers: jax.Array


def _measure(answer, state, examples) -> dict[str, float]:
    found = prompt_ious(answer, {"params": state.variables["params"]["sam"]}, examples)
    scores = {f"iou_{name}": float(iou.mean()) for name, iou in found.items()}
    return scores | {"iou": float(np.mean(list(scores.values())))}


def _write(config, workdir, state) -> Path:
    arrays = {
        path.removeprefix("sam/"): np.asarray(to_host(leaf), np.float16)
        for path, leaf in (state.trainable | state.frozen).items()
    }
    path = as_path(workdir) / f"sam_{config.model.sam}.safetensors"
    start = as_path(config.model.sam_weights or "random").name
    source = f"pretrain from {start}, seed {config.seed}, step {int(state.step)}"
    metadata = {
        "kind": "sam",
        "model": config.model.sam,
        "source": source,
        "sha256": "",
        "normalise": config.input.normalise,
        "image_size": str(config.model.image_size),
    }
    write_weights(path, arrays, metadata)
    _LOG.info("weights → %s", path)
    return path
