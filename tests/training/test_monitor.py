"""A run watches itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax import train as train_module
from sammix_jax.errors import UserError
from sammix_jax.prepare import prepare
from sammix_jax.train import train
from sammix_jax.training import monitor
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.log import read_log
from sammix_jax.training.loop import save_interval
from sammix_jax.training.monitor import Profile, Timer, memory, refuse_not_finite


def metrics_with(**others):
    sound = {"loss": 1.0, "dice_loss": 0.5, "gradient_norm": 2.0, "parameter_norm": 3.0}
    norms = np.ones((2, 3), np.float32)
    return {k: jnp.asarray(v) for k, v in (sound | {"leaf_norms": norms} | others).items()}


def test_sound_numbers_pass():
    refuse_not_finite(3, metrics_with(), ["a", "b", "c"])


def test_the_culprit_is_named():
    norms = np.ones((2, 3), np.float32)
    norms[0, 1] = np.inf
    with pytest.raises(UserError) as told:
        refuse_not_finite(
            7, metrics_with(gradient_norm=np.inf, leaf_norms=norms), ["a", "sam/b", "c"]
        )
    assert "step 7: gradient_norm, gradient of sam/b is not finite" in str(told.value)
    with pytest.raises(UserError, match="step 8: dice_loss, loss is not finite"):
        refuse_not_finite(8, metrics_with(loss=np.nan, dice_loss=np.nan), ["a", "b", "c"])


def test_many_culprits_are_counted():
    norms = np.full((2, 9), np.nan, np.float32)
    with pytest.raises(UserError, match=r"gradient of p4, 4 more, value of p0"):
        refuse_not_finite(
            1, metrics_with(loss=np.nan, leaf_norms=norms), [f"p{i}" for i in range(9)]
        )


def test_the_very_step_is_told_and_the_checkpoint_before_is_sound(
    toy_config, tmp_path, monkeypatch
):
    """Though nothing else looks at step 7 of 12: neither log nor checkpoint."""
    place = train_module.place_batch

    def poisoned(batches, step, layout, mesh):
        batch = place(batches, step, layout, mesh)
        return batch | {"mask": batch["mask"] * jnp.nan} if step == 6 else batch

    monkeypatch.setattr(train_module, "place_batch", poisoned)
    with pytest.raises(UserError, match=r"step 7: dice_loss, .*loss, .*sam/kernel"):
        train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 6
    monkeypatch.setattr(train_module, "place_batch", place)
    assert train(toy_config, tmp_path, prepare(toy_config, tmp_path)) is True
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 12


def test_nothing_moves_to_the_device_unasked(toy_config, tmp_path, monkeypatch):
    place = train_module.place_batch
    on_host = lambda *args: jax.device_get(place(*args))  # noqa: E731
    monkeypatch.setattr(train_module, "place_batch", on_host)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(toy_config, tmp_path, prepare(toy_config, tmp_path))


def test_the_log_tells_time_by_part_and_memory(workdir):
    names = {name for _, name, _ in read_log(workdir)}
    parts = {f"train/seconds/{part}" for part in (*monitor.APART, "data", "step")}
    assert parts | {"train/host_mib", "train/slices_per_second"} <= names
    assert not any("leaf_norms" in name for name in names)


def test_a_timer_leaves_out_what_comes_now_and_then(monkeypatch):
    now = iter([0.0, 1.0, 1.5, 2.0, 5.0, 5.5, 6.0, 7.0, 7.0])
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(now))
    timer = Timer()
    with timer.part("step"):
        pass
    timer.count(10)
    with timer.part("validation"):
        pass
    found = timer.report()
    assert (found["seconds/step"], found["seconds/validation"]) == (0.5, 3.0)
    assert found["slices_per_second"] == 4  # ten in 5.5 s without the 3 of the validation
    again = timer.report()
    assert again["slices_per_second"] == again["seconds/validation"] == 0


@pytest.mark.parametrize("seen", [True, False])
def test_a_run_without_a_terminal_tells_how_far_it_is(monkeypatch, caplog, seen):
    """In the logs of a cluster a slow run and one that hangs would look alike."""
    caplog.set_level("INFO")
    now = iter([0.0, 10.0, 40.0, 50.0, 75.0])
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(now))
    progress = monitor.Progress(100, 500, seen)
    for done in (110, 140, 150, 200):
        progress.tell(done, 0.5, 16.0)
    told = [] if seen else [
        "step 140 of 500: loss 0.500, 16.0 slices/s, 06:00 left",
        "step 200 of 500: loss 0.500, 16.0 slices/s, 03:45 left",
    ]  # fmt: skip
    assert caplog.messages == told


def test_the_time_that_is_left_knows_nothing_of_compiling(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = iter([0.0, 300.0, 300.0, 340.0])
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(now))
    progress = monitor.Progress(0, 101, seen=False)
    progress.begin(1)
    progress.tell(1, 0.5, 16.0)  # nothing to reckon by
    progress.tell(21, 0.5, 16.0)
    assert caplog.messages == ["step 21 of 101: loss 0.500, 16.0 slices/s, 02:40 left"]


def test_a_run_without_a_terminal_is_told_of(toy_config, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(monitor, "TOLD_SECONDS", 0.0)
    toy_config.log.every_steps = 5
    train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert [m[:14] for m in caplog.messages if ": loss" in m] == [
        "step 5 of 12: ", "step 10 of 12:", "step 12 of 12:",
    ]  # fmt: skip


def test_the_mesh_is_the_configs(toy_config, tmp_path, monkeypatch):
    def stop(fsdp):
        raise InterruptedError(fsdp)

    toy_config.mesh.fsdp = 2
    monkeypatch.setattr(train_module, "make_mesh", stop)
    with pytest.raises(InterruptedError, match="2"):
        train(toy_config, tmp_path, None)


def test_memory_is_that_of_the_process():
    assert 100 < memory()["host_mib"] < 200_000


def test_a_trace_is_written_of_the_steps_asked_for(tmp_path):
    def traced(start, stop):
        folder = tmp_path / f"{start}-{stop}"
        with Profile(folder, start, stop) as profile:
            for step in range(6):
                profile.at(step)
                jnp.ones(3).sum().block_until_ready()
        return list(folder.rglob("*.xplane.pb"))

    assert len(traced(2, 4)) == len(traced(4, 100)) == 1
    assert not traced(0, 0)


def test_a_trace_that_cannot_be_written_is_told(tmp_path, monkeypatch, caplog):
    def fails():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: File system scheme 's3'")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    with Profile(tmp_path, 0, 1) as profile:
        profile.at(0)
        profile.at(1)
    assert "the trace could not be written: UNIMPLEMENTED" in caplog.text


@pytest.mark.parametrize("every", [2, 3, 4, 6, 100])
def test_a_kill_while_saving_costs_one_interval_at_most(every):
    """Killed just before the save of step n is whole, which the next save waits for."""
    between = save_interval(every)
    assert 2 * between <= every
    assert save_interval(1) == 1  # and there each save is waited for
