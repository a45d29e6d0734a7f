"""Checkpoints by Orbax: the newest ones to resume from, the best one to predict with.

Below WORKDIR/checkpoints:
    latest/STEP  everything that changes in training
    best/STEP    the trained parameters and batch statistics of the best validation score
    frozen       the frozen parameters, written once
    damaged/STEP what was found unreadable in latest, set aside
    config.json  the run's config; how a slice becomes the network's input travels with the weights
"""

import contextlib
import json
import logging
import operator

import jax
import orbax.checkpoint as ocp
from etils import epath

from sammix_jax import hosts
from sammix_jax.config_files import differing_fields, pinned, preprocessing, read_config
from sammix_jax.data.files import write_json
from sammix_jax.data.paths import as_path, resolved
from sammix_jax.errors import UserError
from sammix_jax.training.soundness import Damaged, other_shapes, sealed, unsealed
from sammix_jax.training.step import TrainState

_LOG = logging.getLogger(__name__)


# How long several processes may take for a checkpoint, and so wait for one another's part: where
# one could not write its own, all would hold accelerators, deaf to signals, for Orbax's 20 minutes.
SAVE_SECONDS = 600


def best_step(workdir) -> int | None:
    """The step that `Checkpoints.restore_best` takes: the best one, else the newest; None of none.

    A step that is still being written is none, also in a bucket, where it has its name already.
    """
    root = epath.Path(str(resolved(as_path(workdir)))) / "checkpoints"
    for kind in ("best", "latest"):
        steps = ocp.path.step.checkpoint_steps(root / kind) if (root / kind).exists() else []
        if steps:
            return max(steps)
    return None


class Checkpoints:
    """A run's checkpoints; a context manager, so that the last save ends before the process.

    Args:
      workdir: the run's folder.
      keep: how many of the newest are kept. With one alone there is none to fall back to.
      read_only: leave everything as it lies, for the run may still be training: what a writer
        clears away at its start may be what another process is saving.
    """

    def __init__(self, workdir, keep: int = 2, read_only: bool = False):
        # Orbax takes no relative path.
        self._root = epath.Path(str(resolved(as_path(workdir)))) / "checkpoints"
        self._read_only = read_only

        def manager(name: str, most: int, **options) -> ocp.CheckpointManager:
            if read_only:
                options |= {"read_only": True, "create": False, "save_interval_steps": 0}
            else:
                options |= {"cleanup_tmp_directories": True, "max_to_keep": most}
                if jax.process_count() > 1:
                    options["async_options"] = ocp.AsyncOptions(timeout_secs=SAVE_SECONDS)
            try:
                return ocp.CheckpointManager(
                    self._root / name,
                    options=ocp.CheckpointManagerOptions(**options),
                    item_handlers=ocp.StandardCheckpointHandler(),  # which can tell shapes unread
                )
            except ValueError as error:  # of JSON
                raise UserError(
                    f"{self._root / name}: the score of a checkpoint there cannot be read "
                    f"({error}); move it away, so that the newest is taken instead."
                ) from error

        # First the one that may be refused, before the other has anything open.
        score = operator.itemgetter("score")
        self._best = manager("best", 1, best_fn=score, best_mode="max")
        self._latest = manager("latest", keep)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._latest.close()
        finally:
            self._best.close()

    @property
    def latest_step(self) -> int | None:
        return self._latest.latest_step()

    def save_frozen(self, state: TrainState) -> None:
        """Writes the frozen parameters, once for the whole run.

        What lies there before the first checkpoint is of a start that came to none, perhaps from
        other weights.
        """
        folder = self._root / "frozen"
        # In a bucket a save that was cut off has its name already.
        written = folder.exists() and ocp.path.step.is_path_finalized(folder)
        hosts.wait_for_all("frozen parameters")  # all have looked before any writes
        if state.frozen and not (written and self.latest_step is not None):
            with contextlib.closing(ocp.StandardCheckpointer()) as frozen:
                frozen.save(folder, sealed({"frozen": state.frozen}), force=True)

    def save_config(self, config) -> None:
        """Keeps the config beside the weights, which may be moved without their workdir."""
        write_json(self._config, json.loads(config.to_json()))

    def check_config(self, config) -> None:
        """Checks that these checkpoints, if there are any, are of this config's run.

        Raises:
          UserError: they are not; names the differing fields.
        """
        if self.latest_step is not None:
            kept, given = (pinned(fields) for fields in self._kept_and_given(config))
            self._check(kept, given, "give the same settings, or another --workdir")

    def check_preprocessing(self, config) -> None:
        """Checks that a config feeds the network what it was trained on.

        Raises:
          UserError: it does not, or nothing is known; names the differing fields.
        """
        kept, given = (preprocessing(fields) for fields in self._kept_and_given(config))
        self._check(kept, given, "leave these fields out, or give another --workdir")

    def _check(self, kept: dict, given: dict, fix: str) -> None:
        if differing := differing_fields(kept, given):
            raise UserError(
                f"{self._config}: these weights were trained with {', '.join(differing)}; {fix}."
            )

    def _kept_and_given(self, config) -> tuple[dict, dict]:
        if not self._config.exists():
            raise UserError(
                f"{self._config}: no such file, so it is unknown with which settings these weights "
                "were trained; copy the whole checkpoints folder."
            )
        kept, given = (json.loads(c.to_json()) for c in (read_config(self._config), config))
        return kept, given

    @property
    def _config(self) -> epath.Path:
        return self._root / "config.json"

    def save(self, state: TrainState, step: int) -> None:
        """Returns before the files are written, but not before those of the last save are."""
        if step != self.latest_step:
            kept = ocp.args.StandardSave(sealed(_changing(state)))
            self._latest.save(step, args=kept, force=True)

    def wait(self) -> None:
        """Returns once the last saves, of the newest and of the best state, are whole."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def save_best(self, state: TrainState, step: int, score: float) -> bool:
        """Keeps this state where its score beats every earlier one. Returns whether it did."""
        self._best.wait_until_finished()  # a save under way has no score yet
        best, fault = self._best_step()
        if fault:
            raise UserError(f"{fault}; delete that folder, the next best state makes another.")
        # A run that was killed after this comes to the same step again.
        if best is not None and (best == step or score <= self._best.metrics(best)["score"]):
            return False
        return self._best.save(
            step,
            args=ocp.args.StandardSave(sealed(_inferring(state))),
            metrics={"score": score},
            force=True,
        )

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest sound state, or None in a fresh workdir. Damaged ones are told and set aside.

        Args:
          like: shapes, dtypes and shardings to restore to; another number of devices than the
            checkpoint's is fine.

        Raises:
          UserError: a checkpoint of another model, or none that is sound.
        """
        damaged = []
        for step in sorted(self._latest.all_steps(), reverse=True):
            try:
                restored = self._read(self._latest, step, _changing(like))
            except Damaged as error:
                _LOG.error("%s: %s", self._root / "latest" / str(step), error)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return like.replace(frozen=self._restore_frozen(like), **restored)
        if damaged:
            raise UserError(
                f"{self._root / 'latest'}: all checkpoints are damaged ({damaged}); bring one back "
                "from a copy, or delete the workdir to begin again."
            )
        return None

    def restore_best(self, like: TrainState) -> TrainState:
        """The best state by validation, else the newest; `opt_state` is left as in `like`.

        Raises:
          UserError: the workdir has no sound checkpoint.
        """
        step, fault = self._best_step()
        if fault:
            _LOG.error("%s; the newest checkpoint is taken instead", fault)
        if step is not None:
            try:
                restored = self._read(self._best, step, _inferring(like))
                return like.replace(frozen=self._restore_frozen(like), **restored)
            except Damaged as error:
                place = self._root / "best" / str(step)
                _LOG.error("%s: %s; the newest checkpoint is taken instead", place, error)
        state = self.restore(like)
        if state is None:
            raise UserError(f"{self._root}: no checkpoint there; train the workdir first.")
        return state

    def _best_step(self) -> tuple[int | None, str]:
        """The best step, None of none; and what is wrong, where it has no score."""
        best, steps = self._best.best_step(), self._best.all_steps()
        if best is None and steps:
            return None, f"{self._root / 'best' / str(max(steps))}: lacks its score"
        return best, ""

    def _read(self, manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
        folder = manager.directory / str(step)

        def read(target: dict) -> dict:
            if differing := other_shapes(manager.item_metadata(step).tree, like):
                raise UserError(
                    f"{folder}: a checkpoint of another model or optimiser: "
                    f"{', '.join(differing[:5])}; give the config it was trained with, or another "
                    "--workdir."
                )
            return manager.restore(step, args=ocp.args.StandardRestore(target))

        return unsealed(read, like, folder)

    def _set_aside(self, steps: list[int]) -> None:
        if not steps or self._read_only:
            return
        damaged = self._root / "damaged"

        def move() -> None:
            damaged.mkdir(exist_ok=True)
            # In a bucket a folder is there once something lies in it.
            (damaged / "README").write_text("Checkpoints that could not be read, set aside.\n")
            for step in steps:
                aside = damaged / str(step)
                if aside.exists():
                    aside.rmtree()
                (self._root / "latest" / str(step)).rename(aside)
                _LOG.warning("set aside as %s; an earlier checkpoint is taken", aside)

        hosts.on_first(move)
        self._latest.reload()

    def _restore_frozen(self, like: TrainState) -> dict:
        if not like.frozen:
            return {}
        folder = self._root / "frozen"

        def read(target: dict) -> dict:
            with contextlib.closing(ocp.StandardCheckpointer()) as frozen:
                return frozen.restore(folder, target)

        try:
            return unsealed(read, {"frozen": like.frozen}, folder)["frozen"]
        except Damaged as error:
            raise UserError(
                f"{folder}: {error}; bring it back from a copy, or begin again in another "
                "--workdir."
            ) from error


def _inferring(state: TrainState) -> dict:
    return {"step": state.step, "trainable": state.trainable, "batch_stats": state.batch_stats}


def _changing(state: TrainState) -> dict:
    changing = {**_inferring(state), "opt_state": state.opt_state}
    return changing | ({"teacher": state.teacher} if state.teacher else {})
