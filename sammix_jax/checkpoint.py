"""Checkpoints by Orbax: the newest ones to resume from, the best one to predict with.

Below WORKDIR/checkpoints:
    latest/STEP  everything that changes in training
    best/STEP    the trained parameters and batch statistics of the best validation score
    frozen       the frozen parameters, written once
    preprocessing.json  how a slice becomes the network's input; travels with the weights
"""

import contextlib
import pathlib

import jax
import orbax.checkpoint as ocp

from sammix_jax.config import differing_fields, preprocessing
from sammix_jax.data.files import read_json, write_json
from sammix_jax.errors import UserError
from sammix_jax.train_step import TrainState


class Checkpoints:
    """A run's checkpoints; a context manager, so that the last save ends before the process."""

    def __init__(self, workdir, every_steps: int = 1, keep: int = 2):
        self._root = pathlib.Path(workdir).resolve() / "checkpoints"
        self._latest = ocp.CheckpointManager(
            self._root / "latest",
            options=ocp.CheckpointManagerOptions(save_interval_steps=every_steps, max_to_keep=keep),
        )
        self._best = ocp.CheckpointManager(
            self._root / "best",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, best_fn=lambda metrics: metrics["score"], best_mode="max"
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._latest.close()
        self._best.close()

    @property
    def latest_step(self) -> int | None:
        return self._latest.latest_step()

    def save_frozen(self, state: TrainState) -> None:
        """Writes the frozen parameters, once for the whole run."""
        if state.frozen and not (self._root / "frozen").exists():
            with contextlib.closing(ocp.StandardCheckpointer()) as frozen:
                frozen.save(self._root / "frozen", state.frozen)

    def save_preprocessing(self, config) -> None:
        """Keeps the fields by which scans become the network's input."""
        write_json(self._preprocessing, preprocessing(config))

    def check_preprocessing(self, config) -> None:
        """Checks that a config feeds the network what it was trained on.

        Raises:
          UserError: it does not, or nothing is known; names the differing fields.
        """
        if not self._preprocessing.exists():
            raise UserError(
                f"{self._preprocessing}: no such file, so it is unknown which window and scaling "
                "these weights were trained with; copy the whole checkpoints folder."
            )
        kept, given = read_json(self._preprocessing), preprocessing(config)
        if differing := differing_fields({field: kept.get(field) for field in given}, given):
            raise UserError(
                f"{self._preprocessing}: these weights were trained with {', '.join(differing)}; "
                "leave these fields out to take the checkpoint's."
            )

    @property
    def _preprocessing(self) -> pathlib.Path:
        return self._root / "preprocessing.json"

    def save(self, state: TrainState, step: int, last: bool = False) -> None:
        """Saves at the interval, and always where `last`; returns before the files are written."""
        if step == self.latest_step:
            return
        self._latest.save(step, args=ocp.args.StandardSave(_changing(state)), force=last)

    def save_best(self, state: TrainState, step: int, score: float) -> bool:
        """Keeps this state where its score beats every earlier one. Returns whether it did."""
        self._best.wait_until_finished()  # a save under way has no score yet
        best = self._best.best_step()
        if best is not None and score <= self._best.metrics(best)["score"]:
            return False
        return self._best.save(
            step, args=ocp.args.StandardSave(_inferring(state)), metrics={"score": score}
        )

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, or None in a fresh workdir.

        Args:
          like: shapes, dtypes and shardings to restore to; another number of devices than the
            checkpoint's is fine.
        """
        if self.latest_step is None:
            return None
        restored = self._latest.restore(
            self.latest_step, args=ocp.args.StandardRestore(_changing(like))
        )
        return like.replace(frozen=self._restore_frozen(like), **restored)

    def restore_best(self, like: TrainState) -> TrainState:
        """The best state by validation, else the newest; `opt_state` is left as in `like`.

        Raises:
          UserError: the workdir has no checkpoint.
        """
        step = self._best.best_step()
        if step is None:
            state = self.restore(like)
            if state is None:
                raise UserError(f"{self._root}: no checkpoint there; train the workdir first.")
            return state
        restored = self._best.restore(step, args=ocp.args.StandardRestore(_inferring(like)))
        return like.replace(frozen=self._restore_frozen(like), **restored)

    def _restore_frozen(self, like: TrainState) -> dict:
        with contextlib.closing(ocp.StandardCheckpointer()) as frozen:
            return frozen.restore(self._root / "frozen", like.frozen) if like.frozen else {}


def _inferring(state: TrainState) -> dict:
    return {"step": state.step, "trainable": state.trainable, "batch_stats": state.batch_stats}


def _changing(state: TrainState) -> dict:
    changing = {**_inferring(state), "opt_state": state.opt_state}
    return changing | ({"teacher": state.teacher} if state.teacher else {})


def abstract(state, sharding):
    """Shapes and dtypes of a state, placed by `sharding`: what `restore` takes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
