"""Checkpoints come back as they were saved, or say what is wrong with them."""

import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.errors import UserError
from sammix_jax.sharding import abstract, make_mesh, replicated
from sammix_jax.training import checkpoint
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.soundness import checksums, unfinished_reads_untold
from sammix_jax.training.step import TrainState


def state_at(step: int, width: int = 300) -> TrainState:
    """Values that no compression shrinks, so that files hold them as they are."""
    noise = jax.random.normal(jax.random.key(step), (width, 200))
    frozen = {"sam/b": jnp.full((3,), 7.0)}
    return TrainState(jnp.array(step), {"sam/a": noise}, frozen, {}, {"m": noise + 1}, {})


def like(state: TrainState) -> TrainState:
    return abstract(jax.eval_shape(lambda: state), replicated(make_mesh()))


@pytest.fixture
def saved(tmp_path):
    """A workdir with the states of steps 1 and 2."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_frozen(state_at(1))
        for step in (1, 2):
            checkpoints.save(state_at(step), step)
    return tmp_path


def restored(workdir, state=None) -> TrainState:
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(like(state_at(0) if state is None else state))


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    """One bit in the middle of the values: the files' own checksums do not cover them."""
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def delete_values(folder):
    largest_file(folder).unlink()


def delete_manifest(folder):
    (folder / "default" / "manifest.ocdbt").unlink()


def empty_metadata(folder):
    (folder / "default" / "_METADATA").write_text("")


DAMAGES = [truncate, flip, delete_values, delete_manifest, empty_metadata]


def test_the_newest_comes_back_bit_for_bit(saved):
    jax.tree.map(np.testing.assert_array_equal, restored(saved), state_at(2))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_newest_is_told_and_the_one_before_is_taken(saved, caplog, damage):
    """And it is set aside, not deleted; its step can be saved again."""
    damage(saved / "checkpoints" / "latest" / "2")
    jax.tree.map(np.testing.assert_array_equal, restored(saved), state_at(1))
    assert "latest/2: " in caplog.text and "set aside" in caplog.text
    assert (saved / "checkpoints" / "damaged" / "2").is_dir()
    assert (saved / "checkpoints" / "damaged" / "README").is_file()  # a bucket's folder
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(state_at(2), 2)
    jax.tree.map(np.testing.assert_array_equal, restored(saved), state_at(2))


@pytest.mark.parametrize(
    "error",
    [
        OSError("503 service unavailable"),
        PermissionError(13, "Permission denied"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_a_checkpoint_moves_nothing(saved, monkeypatch, error):
    """A bucket that does not answer for a moment, or a smaller machine: nobody is to lose steps."""

    def refuse(*_, **__):
        raise Exception("reading an array") from error

    before = sorted(saved.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "restore", refuse)
        with pytest.raises(UserError, match=r"latest/2: cannot be read now .*Nothing was moved"):
            restored(saved)
    assert sorted(saved.rglob("*")) == before
    jax.tree.map(np.testing.assert_array_equal, restored(saved), state_at(2))


def test_another_optimisers_checkpoint_is_not_damaged(saved):
    other = state_at(0).replace(opt_state={"m": jnp.zeros((300, 200)), "v": jnp.zeros(3)})
    with pytest.raises(UserError, match=r"model or optimiser: opt_state/v=None \(now \(3,\)\)"):
        restored(saved, other)
    assert (saved / "checkpoints" / "latest" / "2").is_dir()


def test_a_best_without_its_score_is_told(saved, caplog):
    with Checkpoints(saved) as checkpoints:
        checkpoints.save_best(state_at(1), 1, score=0.5)
    metrics = saved / "checkpoints" / "best" / "1" / "metrics" / "metrics"
    metrics.write_text('{"sco')
    for read_only in (True, False):
        with pytest.raises(UserError, match=r"checkpoints/best: the score .* cannot be read"):
            Checkpoints(saved, read_only=read_only)
    shutil.rmtree(metrics.parent)
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore_best(like(state_at(0)))
        with pytest.raises(UserError, match=r"best/1: .*score.*; delete that folder"):
            checkpoints.save_best(state_at(2), 2, score=0.6)
    np.testing.assert_array_equal(state.trainable["sam/a"], state_at(2).trainable["sam/a"])
    assert "best/1: " in caplog.text and "the newest checkpoint is taken instead" in caplog.text


def test_where_all_are_damaged_none_is_touched(saved):
    """A run must not begin again from nothing without a word."""
    for step in "12":
        truncate(saved / "checkpoints" / "latest" / step)
    with pytest.raises(UserError, match=r"all checkpoints are damaged \(\[2, 1\]\)"):
        restored(saved)
    assert not (saved / "checkpoints" / "damaged").exists()


def test_damaged_frozen_parameters_are_told(saved):
    (saved / "checkpoints" / "frozen" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"checkpoints/frozen: cannot be read .* bring it back"):
        restored(saved)


def test_a_flipped_bit_of_the_frozen_parameters_is_told(tmp_path):
    state = state_at(1)
    state = state.replace(frozen={"sam/b": state_at(2).trainable["sam/a"]})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_frozen(state)
        checkpoints.save(state, 1)
    np.testing.assert_array_equal(restored(tmp_path, state).frozen["sam/b"], state.frozen["sam/b"])
    flip(tmp_path / "checkpoints" / "frozen")
    with pytest.raises(UserError, match=r"checkpoints/frozen: holds other values .* bring it back"):
        restored(tmp_path, state)


def test_a_damaged_best_is_told_and_the_newest_is_taken(saved, caplog):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.save_best(state_at(1), 1, score=0.5)
    flip(saved / "checkpoints" / "best" / "1")
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore_best(like(state_at(0)))
    np.testing.assert_array_equal(state.trainable["sam/a"], state_at(2).trainable["sam/a"])
    assert "the newest checkpoint is taken instead" in caplog.text


def test_another_models_checkpoint_is_refused_by_leaf(saved):
    """It is sound, so it is neither called damaged nor set aside."""
    with pytest.raises(
        UserError, match=r"model or optimiser: trainable/sam/a=\(300, 200\) \(now \(301"
    ):
        restored(saved, state_at(0, width=301))
    assert (saved / "checkpoints" / "latest" / "2").is_dir()


def test_another_configs_checkpoint_is_refused_by_field(saved, config):
    """Also where the workdir's own config.json is gone; what is free to differ may."""
    with Checkpoints(saved) as checkpoints:
        checkpoints.save_config(config)
        config.checkpoint.every_steps, config.mesh.fsdp = 7, 4
        checkpoints.check_config(config)
        path = saved / "checkpoints" / "config.json"
        fields = json.loads(path.read_text())
        del fields["data"]["default_orientation"]  # of before that field came
        path.write_text(json.dumps(fields))
        checkpoints.check_config(config)
        config.train.learning_rate, config.cam.threshold = 0.5, 0.4
        with pytest.raises(
            UserError, match=r"trained with cam\.threshold=0\.2 \(now 0\.4\), train\."
        ):
            checkpoints.check_config(config)


def test_a_fresh_workdir_has_none(tmp_path, config):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check_config(config)
        assert checkpoints.latest_step is None
        assert checkpoints.restore(like(state_at(0))) is None
        with pytest.raises(UserError, match="no checkpoint there"):
            checkpoints.restore_best(like(state_at(0)))


def test_the_last_ones_are_kept_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in enumerate((0.2, 0.6, 0.4, 0.5), 1):
            checkpoints.save(state_at(step), step)
            assert checkpoints.save_best(state_at(step), step, score) == (step < 3)
            # As a run does that was killed between this and its next checkpoint.
            assert not checkpoints.save_best(state_at(step), step, score + 0.001 * (step == 2))
    names = {
        kind: sorted(p.name for p in (tmp_path / "checkpoints" / kind).iterdir() if p.is_dir())
        for kind in ("latest", "best")
    }
    assert names == {"latest": ["3", "4"], "best": ["2"]}


def test_what_a_killed_save_left_behind_is_cleared(saved):
    """And never taken for a checkpoint."""
    latest = saved / "checkpoints" / "latest"
    (latest / "3.orbax-checkpoint-tmp").mkdir()
    (latest / "3.orbax-checkpoint-tmp" / "rubbish").write_text("")
    jax.tree.map(np.testing.assert_array_equal, restored(saved), state_at(2))
    assert sorted(p.name for p in latest.iterdir() if p.is_dir()) == ["1", "2"]


def test_a_reader_leaves_what_a_run_is_writing(saved):
    latest = saved / "checkpoints" / "latest"
    unfinished = latest / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    truncate(latest / "2")
    (saved / "checkpoints" / "best").rmdir()  # as in a bucket, which has no empty folders
    before = sorted(saved.rglob("*"))
    with Checkpoints(saved, read_only=True) as checkpoints:
        found = checkpoints.restore_best(like(state_at(0)))
    assert int(found.step) == 1
    assert sorted(saved.rglob("*")) == before and unfinished.is_dir()


def test_frozen_parameters_that_were_cut_off_in_a_bucket_are_written_again(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        folder = tmp_path / "checkpoints" / "frozen"
        folder.mkdir()
        (folder / "part").write_text("")
        # In a bucket a folder is whole once it says so.
        whole = lambda path, **_: (path / "_CHECKPOINT_METADATA").exists()  # noqa: E731
        monkeypatch.setattr(checkpoint.ocp.path.step, "is_path_finalized", whole)
        checkpoints.save_frozen(state_at(1))
        checkpoints.save(state_at(1), 1)
    assert restored(tmp_path).frozen["sam/b"].tolist() == [7.0] * 3


def test_a_run_that_begins_anew_leaves_no_frozen_parameters_of_another_start(tmp_path):
    first, second = state_at(1), state_at(1)
    second = second.replace(frozen={"sam/b": second.frozen["sam/b"] + 1})
    for state, saves, kept in ((first, False, 7), (second, True, 8), (first, False, 8)):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save_frozen(state)
            if saves:
                checkpoints.save(state, 1)
            frozen = checkpoints._restore_frozen(like(state))
        assert frozen["sam/b"].tolist() == [kept] * 3


def test_checksums_see_every_bit_and_no_order():
    values = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    of = lambda array: int(checksums({"a": jnp.asarray(array)})[0])  # noqa: E731
    assert of(values) == of(values[::-1].copy())
    for bit in range(32):
        other = values.copy()
        other.view(np.uint32)[5, 1] ^= np.uint32(1 << bit)
        assert of(other) != of(values)
    assert of(values.astype(jnp.bfloat16)) != of(values)


def test_the_config_beside_the_weights_is_the_runs(saved, config):
    with Checkpoints(saved) as checkpoints:
        checkpoints.save_config(config)
    kept = json.loads((saved / "checkpoints" / "config.json").read_text())
    assert kept == json.loads(config.to_json())


class Left:
    def __del__(self):
        raise RuntimeError("of something else")


async def read():
    try:
        await pending()
    finally:
        raise RuntimeError("at the next array")


@types.coroutine
def pending():
    yield


def test_reads_that_a_fault_left_unfinished_are_not_told_one_by_one(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda left: told.append(str(left.exc_value)))

    with unfinished_reads_untold():
        begun = read()
        begun.send(None)
        del begun
        Left()
    assert told == ["of something else"]
    begun = read()
    begun.send(None)
    del begun
    assert told[1:] == ["at the next array"]
