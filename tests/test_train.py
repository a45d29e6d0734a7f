"""Training learns, resumes exactly, and refuses what cannot be trained."""

import csv
import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from toy import Toy

from sammix_jax import train as train_module
from sammix_jax.config import default_config
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.slices import SliceStore
from sammix_jax.errors import UserError
from sammix_jax.evaluate import evaluate
from sammix_jax.prepare import prepare
from sammix_jax.sharding import abstract, make_mesh, replicated
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.train import train
from sammix_jax.training import loop
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.log import read_log
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import make_init


def test_training_learns_and_logs(workdir):
    losses = [value for step, name, value in read_log(workdir) if name == "train/loss"]
    assert len(losses) == 6 and losses[-1] < losses[0]
    dices = [value for _, name, value in read_log(workdir) if name == "train/dice_loss"]
    assert dices[-1] < 0.9 * dices[0]  # the masks too, not the classes alone
    with open(workdir / "metrics.csv", encoding="utf-8", newline="") as file:
        names = {row["metric"] for row in csv.DictReader(file)}
    assert {"train/dice_loss", "train/slices_per_second", "val/dice", "val/accuracy"} <= names
    assert list((workdir / "tensorboard").glob("events.*"))
    assert (workdir / "split.json").exists() and (workdir / "labels.json").exists()


def test_a_finished_run_is_left_alone(workdir, config):
    assert train(config, workdir, prepare(config, workdir)) is False


class Killed(Exception):
    pass


def remembering(function):
    """The same function, which for equal arguments gives the very same result."""
    calls = []

    def remembered(*args, **options):
        for given, result in calls:
            if given == (args, options):
                return result
        calls.append(((args, options), function(*args, **options)))
        return calls[-1][1]

    return remembered


def test_resumed_equals_uninterrupted(workdir, config, tmp_path, monkeypatch):
    """Stopped after step 17 and run again: the same bits as in one go."""
    config.data.store = str(workdir / "store")
    config.data.split_file = str(workdir / "split.json")
    config.data.labels_file = str(workdir / "labels.json")
    store = prepare(config, workdir)
    # Both parts of the run take one compiled program, unless they ask for different ones.
    for name in ("make_optimiser", "jit_train_step", "make_predict"):
        monkeypatch.setattr(train_module, name, remembering(getattr(train_module, name)))
    step_of = loop.prefetch

    def until_17(make, start, stop):
        for step, batch in step_of(make, start, stop):
            if step == 17:
                raise Killed
            yield step, batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "prefetch", until_17)
        with pytest.raises(Killed):
            train(config, tmp_path, store)
    assert train(config, tmp_path, store) is True

    optimiser = make_optimiser(config.train, config.train.steps)
    shapes = jax.eval_shape(make_init(SamMixSystem.of(config), optimiser, config))
    like = abstract(shapes, replicated(make_mesh()))

    def final_state(folder):
        with Checkpoints(folder) as checkpoints:
            return checkpoints.restore(like)

    whole, resumed = final_state(workdir), final_state(tmp_path)
    assert int(resumed.step) == config.train.steps
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    measured = ("per_second", "seconds", "mib")  # of the machine, not of the run
    logs = [
        [row for row in read_log(folder) if not any(word in row[1] for word in measured)]
        for folder in (workdir, tmp_path)
    ]
    assert logs[0] == logs[1] and len(logs[0]) > 20


def test_nan_stops_the_run(workdir, config, tmp_path, monkeypatch):
    """With a model that is compiled in a moment."""
    monkeypatch.setattr(train_module, "make_system", lambda c: SamMixSystem(Toy(), c))
    config.train.learning_rate = config.train.weight_decay = 1e30  # their product is infinite
    config.train.clip_norm = 0.0
    config.train.schedule, config.train.warmup_steps = "constant", 0
    with pytest.raises(UserError, match=r"step 1: parameter_norm, value of .*kernel is not finite"):
        train(config, tmp_path, SliceStore.open(workdir / "store"))


def test_a_warm_up_as_long_as_the_run_is_refused(workdir, config, tmp_path):
    config.train.classifier_warmup_steps = config.train.steps
    with pytest.raises(UserError, match=r"classifier_warmup_steps=30: expected fewer than .* 30"):
        train(config, tmp_path, SliceStore.open(workdir / "store"))
    assert not (tmp_path / "config.json").exists()


def test_a_run_in_which_nothing_learns_is_refused(toy_config, tmp_path):
    toy_config.train.trainable, toy_config.model.lora_rank = (".*/lora_.*",), 0
    with pytest.raises(UserError, match=r"train\.trainable=\('\.\*/lora_\.\*',\): matches no"):
        train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_what_is_not_over_when_the_run_is_is_told(toy_config, tmp_path, caplog):
    toy_config.train.warmup_steps = toy_config.consistency.start_step = 12
    train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert "train.warmup_steps=12: not over when the run's 12 steps are" in caplog.text
    assert "start_step" not in caplog.text  # there is no teacher


def test_a_best_state_of_a_start_from_other_weights_is_not_mixed(workdir, config, tmp_path):
    (tmp_path / "checkpoints" / "best" / "15").mkdir(parents=True)
    write_json(tmp_path / "weights.json", {"model.sam_weights": "of others"})
    with pytest.raises(UserError, match=r"checkpoints/best/15: of a start from other weights"):
        train(config, tmp_path, SliceStore.open(workdir / "store"))
    assert not (tmp_path / "config.json").exists()


def test_validation_prompts_by_as_many_points_as_training(toy_config, tmp_path, monkeypatch):
    """Not by those of the report, which may be others when the run is resumed."""
    asked = []

    def make_predict(system, config, *rest, **named):
        asked.append((system.config.evaluate.points, config.evaluate.points))
        raise Stopped(0)

    monkeypatch.setattr(train_module, "make_predict", make_predict)
    toy_config.train.points, toy_config.evaluate.points = 2, 5
    with pytest.raises(Stopped):
        train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert asked == [(2, 2)]


def test_the_best_by_validation_is_kept(workdir, config):
    """`best` holds the step whose Dice the log shows to be the highest."""
    values = {step: value for step, name, value in read_log(workdir) if name == "val/dice"}
    best = [int(p.name) for p in (workdir / "checkpoints" / "best").iterdir() if p.name.isdigit()]
    assert best == [max(values, key=values.get)]


def test_given_files_are_followed_to_the_end(workdir, config, tmp_path):
    """A run on a given split and given labels evaluates on that split."""
    split = read_json(workdir / "split.json")
    swapped = {"train": split["train"], "val": split["test"], "test": split["val"]}
    labels = read_json(workdir / "labels.json")[::2]  # fewer than would be drawn
    write_json(tmp_path / "split.json", swapped)
    write_json(tmp_path / "labels.json", labels)
    config.data.store = str(workdir / "store")
    config.data.split_file = str(tmp_path / "split.json")
    config.data.labels_file = str(tmp_path / "labels.json")
    # A small U-Net is compiled in a moment.
    config.model.system, config.model.widths = "unet", (4, 4, 4)
    config.train.trainable = (".*",)
    config.train.steps = 1
    config.evaluate.protocols = ("none",)
    run = tmp_path / "run"
    train(config, run, SliceStore.open(workdir / "store"))
    assert {case.scan for case in evaluate(config, run).cases} == set(swapped["test"])
    assert read_json(run / "labels.json") == labels


def test_a_part_that_is_empty_is_told_before_training(workdir, config, tmp_path):
    config.data.split = (1, 0, 0)
    with pytest.raises(UserError, match=r"evaluate\.part=test: that part of the split is empty"):
        train(config, tmp_path, SliceStore.open(workdir / "store"))
    assert not (tmp_path / "config.json").exists()


def test_a_part_annotated_in_part_is_told_before_training(workdir, config, tmp_path):
    store = SliceStore.open(workdir / "store")
    records = [dataclasses.replace(record, unannotated=(0,)) for record in store.records.values()]
    partly = SliceStore(store.root, store.params, records)
    config.data.split = (1, 0, 0)
    config.evaluate.part = "train"
    told = r"evaluate\.part=train: every scan is annotated in part.*\. Or train alone, with --noev"
    with pytest.raises(UserError, match=told):
        train(config, tmp_path, partly)


def test_one_class_is_told(caplog):
    labels = {"with": 1, "unknown": -1, "without": 0}
    store = types.SimpleNamespace(image_label=labels.get, params={"organ": "spleen"})
    train_module._tell_of_one_class(store, labels)
    assert not caplog.text
    train_module._tell_of_one_class(store, ["with", "unknown"])
    assert "known not to show data.organ=spleen" in caplog.text


def test_an_encoder_frozen_at_random_values_is_told(config, caplog):
    def told(sam_weights: str) -> bool:
        caplog.clear()
        init = make_init(SamMixSystem.of(config), make_optimiser(config.train, 10), config)
        train_module._tell_of_frozen_noise(jax.eval_shape(init).frozen, sam_weights)
        return "--config.model.sam_weights=FILE" in caplog.text

    assert not told("")  # it is trained
    config.train.trainable = default_config().train.trainable
    assert told("") and not told("sam.safetensors")


def test_what_is_frozen_without_use_is_told(caplog):
    path = "sam/image_encoder/patch_embed/kernel"
    train_module._tell_of_frozen_noise({path: 0}, "sam.safetensors")
    train_module._tell_of_frozen_noise({}, "")
    statistics = {"classifier": {"bn": 0}}
    learns = types.SimpleNamespace(batch_stats=statistics, trainable={"classifier/head/kernel": 0})
    frozen = types.SimpleNamespace(batch_stats=statistics, trainable={"sam/mask_decoder/token": 0})
    train_module._tell_of_moving_statistics(learns, False)
    train_module._tell_of_moving_statistics(frozen, True)
    assert not caplog.records
    train_module._tell_of_frozen_noise({path: 0}, "")
    train_module._tell_of_moving_statistics(frozen, False)
    assert "frozen at random values" in caplog.messages[0]
    assert "no parameter of the classifier is trained, but its BatchNorm" in caplog.messages[1]


class Stopped(Exception):
    """Ends training where a test has seen enough; carries what it saw."""


def test_epochs_count_slices_without_masks_and_steps_overrule(
    workdir, config, tmp_path, monkeypatch
):
    """And the quota of each kind in a batch is the config's."""
    config.train.batch_labelled, config.train.batch_unlabelled = 3, 5
    made = []

    class Recorded(train_module.Batches):
        def __post_init__(self):
            super().__post_init__()
            made.append(self)

    def stop(_, steps):
        raise Stopped(steps)

    monkeypatch.setattr(train_module, "Batches", Recorded)
    monkeypatch.setattr(train_module, "make_optimiser", stop)

    def steps_taken(**fields):
        config.train.update(fields)
        with pytest.raises(Stopped) as seen:
            train(config, tmp_path, SliceStore.open(workdir / "store"))
        return seen.value.args[0]

    twice, half = steps_taken(steps=0, epochs=2.0), steps_taken(epochs=0.5)
    batches = made[0]
    assert batches.sizes == (3, 5) and batches.seed == config.seed
    assert len(batches(0)["hu"]) == 8 and len(batches(0)["mask"]) == 3
    count = len(batches.unlabelled)
    assert (twice, half) == (math.ceil(2 * count / 5), math.ceil(0.5 * count / 5))
    assert steps_taken(steps=7) == 7


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("evaluate.root", "/nowhere", "evaluate.root=/nowhere: no such folder"),
        ("evaluate.scans", 5, "evaluate.scans=5: draws from another folder"),
    ],
)
def test_what_cannot_be_scored_is_not_trained(toy_config, tmp_path, field, value, match):
    toy_config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=match):
        train(toy_config, tmp_path, prepare(toy_config, tmp_path))
    assert not (tmp_path / "config.json").exists()
