"""When a run validates, what it keeps then, and what it owes when it was stopped before."""

import os
import signal

import pytest

from sammix_jax import train as train_module
from sammix_jax.data.files import read_json
from sammix_jax.data.split_files import kept_split
from sammix_jax.hosts import Terminated
from sammix_jax.prepare import prepare
from sammix_jax.train import train
from sammix_jax.training import loop
from sammix_jax.training.log import read_log


def test_validation_patients_choose_and_the_best_is_whole_before_the_log_tells(
    toy_config, tmp_path, monkeypatch
):
    """A run that is killed after it has told of a validation does not validate that step again."""
    toy_config.data.split, toy_config.log.validate_every_steps = (2, 1, 1), 3
    scores, asked, kept = iter([0.2, 0.5, 0.5, 0.1]), [], {}
    saved, saved_before = [], []

    def validate(predict, variables, store, scans, *rest):
        asked.append(scans)
        saved_before.append(saved[-1])
        return {"dice": next(scores)}

    write = loop.TrainLog.write

    def watched(self, step, values):
        if "val/dice" in values:
            kept[step] = {path.name for path in (tmp_path / "checkpoints" / "best").iterdir()}
        write(self, step, values)

    save = loop.Checkpoints.save
    monkeypatch.setattr(
        loop.Checkpoints, "save", lambda *args: saved.append(args[2]) or save(*args)
    )
    monkeypatch.setattr(train_module, "validate", validate)
    monkeypatch.setattr(loop.TrainLog, "write", watched)
    train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert kept == {3: {"3"}, 6: {"6"}, 9: {"6"}, 12: {"6"}}
    assert saved_before == [2, 6, 8, 12]  # none that was due waits for the validation
    assert asked == [kept_split(tmp_path).val] * 4 and len(asked[0]) == 1
    assert read_json(tmp_path / "weights.json") == {
        "model.sam_weights": "", "model.classifier_weights": ""
    }  # fmt: skip


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
@pytest.mark.parametrize("steps", [6, 3])
@pytest.mark.parametrize("asked", ["in a step", "in validation"])
def test_a_run_that_was_stopped_where_it_validates_does_so_when_it_goes_on(
    toy_config, tmp_path, monkeypatch, asked, steps, number, ends
):
    """In the last step too: what comes after it may take longer than there is time."""
    toy_config.data.split, toy_config.log.validate_every_steps = (2, 1, 1), 3
    toy_config.train.steps = steps
    scores, taken, sent = iter([0.5, 0.4]), [], []

    def terminate():
        if not sent:
            sent.append(os.kill(os.getpid(), number))

    def validate(predict, variables, store, scans, batch, stop, protocol):
        if asked == "in validation":
            terminate()
        if stop():
            raise Terminated
        return {"dice": next(scores)}

    def jit_train_step(*args):
        step = jit(*args)

        def watched(state, batch):
            taken.append(step)
            if asked == "in a step" and len(taken) == 3:
                terminate()
            return step(state, batch)

        return watched

    jit = train_module.jit_train_step
    monkeypatch.setattr(train_module, "jit_train_step", jit_train_step)
    monkeypatch.setattr(train_module, "validate", validate)
    with pytest.raises(ends, match=f"after step 3 of {steps}, which is saved"):
        train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert not [name for _, name, _ in read_log(tmp_path) if name == "val/dice"]
    assert train(toy_config, tmp_path, prepare(toy_config, tmp_path)) is True
    validated = {step: value for step, name, value in read_log(tmp_path) if name == "val/dice"}
    assert validated == ({3: 0.5, 6: 0.4} if steps == 6 else {3: 0.5})
    assert [path.name for path in (tmp_path / "checkpoints" / "best").iterdir()] == ["3"]
    assert train(toy_config, tmp_path, prepare(toy_config, tmp_path)) is False


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_in_a_validation_that_was_owed_is_heard(toy_config, tmp_path, monkeypatch, late):
    """And after it was asked for the last time."""
    toy_config.data.split, toy_config.train.steps = (2, 1, 1), 3
    asked = []

    def validate(predict, variables, store, scans, batch, stop, protocol):
        asked.append(stop)
        if late and len(asked) > 1:
            os.kill(os.getpid(), signal.SIGINT)
            return {"dice": 0.5}
        os.kill(os.getpid(), signal.SIGINT)
        if stop():
            raise Terminated
        raise AssertionError("nobody heard")

    monkeypatch.setattr(train_module, "validate", validate)
    for _ in range(2):  # the second of no step that is left
        with pytest.raises(KeyboardInterrupt, match=r"step 3( of 3)?, which is saved"):
            train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert len(asked) == 2


def test_a_validation_that_had_nothing_to_score_is_not_owed(toy_config, tmp_path, monkeypatch):
    toy_config.data.split, toy_config.train.steps = (2, 1, 1), 3
    monkeypatch.setattr(train_module, "validate", lambda *_: {})
    assert train(toy_config, tmp_path, prepare(toy_config, tmp_path)) is True
    assert train(toy_config, tmp_path, prepare(toy_config, tmp_path)) is False


def test_several_processes_hear_a_signal_of_the_last_validation(toy_config, tmp_path, monkeypatch):
    """They are told at the step after the last that was taken."""
    asked = []

    def told(self, step):
        asked.append(step)
        return step == 4

    monkeypatch.setattr(loop.hosts.Termination, "asked", told)
    toy_config.train.steps = 3
    with pytest.raises(Terminated, match="after step 3 of 3, which is saved"):
        train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert asked == [1, 2, 3, 4]
    assert train(toy_config, tmp_path, prepare(toy_config, tmp_path)) is False
