"""Configs: every file builds, unknown fields are named, a workdir belongs to one config."""

import importlib
import json
import pathlib

import pytest

from configs import labels, lits, totalsegmentator
from sammix_jax.config import default_config
from sammix_jax.config_files import check_workdir, claim_workdir, load_config, overlay
from sammix_jax.config_rules import check_config, check_files
from sammix_jax.errors import UserError
from sammix_jax.presets import apply_preset
from sammix_jax.systems.named import make_system

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_describes_a_model(name):
    module = importlib.import_module(f"configs.{name}")
    assert "Command" in module.__doc__
    config = default_config()
    overlay(config, module.get_config())  # one that only says how to evaluate leaves the rest open
    check_config(config)
    make_system(config)


@pytest.mark.parametrize("variant", labels.VARIANTS)
def test_variants_of_the_labels_config(variant):
    config = labels.get_config(variant)
    check_config(config)
    changed = labels.VARIANTS[variant]
    plain = labels.get_config("sam_mix")
    assert (config.to_dict() == plain.to_dict()) == (not changed)
    plain.update_from_flattened_dict(changed)
    assert config.to_dict() == plain.to_dict()


def test_an_unknown_variant_is_named():
    with pytest.raises(UserError, match="no variant 'techer': expected one of sam_mix, no_fusion"):
        labels.get_config("techer")


def test_totalsegmentator_says_only_how_to_evaluate():
    config = totalsegmentator.get_config()
    assert set(config) == {"evaluate"}
    assert set(config.evaluate) == set(default_config().evaluate)  # any is an option
    said = {name for name, value in config.evaluate.items() if value is not None}
    assert said == {"scans", "seed"} and config.evaluate.scans == 20


def test_the_papers_run_takes_a_preset():
    from_paper, standard = lits.get_config(), lits.get_config("standard")
    for config in (from_paper, standard):
        check_config(config)
    assert from_paper.data.size == 256 and from_paper.data.split == (91, 13, 27)
    assert from_paper.data.central_fraction == 0.3
    assert (from_paper.data.resize, from_paper.input.scaling) == ("paper", "paper")
    assert (standard.data.resize, standard.input.scaling) == ("fit", "window")
    assert standard.data.central_fraction == 1.0
    with pytest.raises(UserError, match="no preset 'papr': expected one of paper, standard"):
        lits.get_config("papr")


def test_a_preset_leaves_nothing_of_another():
    config = default_config()
    apply_preset(config, "paper")
    apply_preset(config, "standard")
    config.data.size = default_config().data.size
    assert config.to_dict() == default_config().to_dict()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.resize", "stretch"),
        ("input.window", (-100.0, 200.0)),
        ("input.normalise", "sam"),
        ("train.augment", True),
        ("consistency.weight", 0.5),
    ],
)
def test_what_the_papers_scaling_does_not_fit(field, value):
    config = lits.get_config("paper")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"{field}=.*where input\.scaling=paper"):
        check_config(config)


def test_bfloat16_wants_the_papers_few_greys_spread():
    config = lits.get_config("paper")
    config.model.dtype = "bfloat16"
    check_config(config)
    config.input.normalise = "unit"
    with pytest.raises(UserError, match=r"'unit': expected minmax with model\.dtype=bf"):
        check_config(config)
    config.model.dtype = "float32"
    check_config(config)


def test_the_papers_resize_clips_to_its_window():
    config = default_config()
    config.data.resize = "paper"
    check_config(config)
    config.input.window = (-200.0, 240.0)
    with pytest.raises(UserError, match=r"input\.window=.*within \(-160, 240\)"):
        check_config(config)


def test_a_workdir_belongs_to_one_config(config, tmp_path):
    claim_workdir(config, tmp_path)
    claim_workdir(config, tmp_path)
    config.train.learning_rate = 0.5
    config.input.window = (-100.0, 200.0)
    with pytest.raises(UserError) as error:
        claim_workdir(config, tmp_path)
    assert "train.learning_rate=0.01 (now 0.5)" in str(error.value)
    assert "input.window=[-160.0, 240.0] (now [-100.0, 200.0])" in str(error.value)


def test_a_workdir_of_before_a_field_came(config, tmp_path):
    """It was made with what is now the default."""
    claim_workdir(config, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["data"]["default_orientation"]
    path.write_text(json.dumps(fields))
    check_workdir(config, tmp_path)
    config.data.default_orientation = "LAS"
    with pytest.raises(UserError, match=r"data\.default_orientation= \(now LAS\)"):
        check_workdir(config, tmp_path)
    check_workdir(config, tmp_path, other_scans=True)
    config.train.steps = 7
    with pytest.raises(UserError, match=r"train\.steps"):
        check_workdir(config, tmp_path, other_scans=True)


def test_places_and_reporting_may_change(config, tmp_path):
    claim_workdir(config, tmp_path)
    config.data.root = "/moved"
    config.evaluate.part = "val"
    config.log.every_steps = 1
    claim_workdir(config, tmp_path)


def test_saved_config_comes_back(config, tmp_path):
    claim_workdir(config, tmp_path)
    assert load_config(tmp_path).to_dict() == config.to_dict()


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_config(tmp_path)


def test_saved_by_another_version(tmp_path):
    (tmp_path / "config.json").write_text('{"data": {"colour": 1}}')
    with pytest.raises(UserError, match=r"unknown field data\.colour"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("cam.fusion", "times", "one of add, concat, none"),
        ("cam.component", "first", "one of largest, peak, all"),
        ("cam.threshold", 0.0, "above 0 to 1"),
        ("data.resize", "crop", "one of fit, stretch"),
        ("data.size", 32, "33 at least, or the classifier's map"),
        ("data.phantom.domain", "arterial", "one of portal, unenhanced"),
        ("data.labelled_slices", -1, "at least 0"),
        ("input.window", (240.0, -160.0), "low < high"),
        ("input.window", (40.0, 40.0), "low < high"),
        ("input.window", (-100.0,), r"\(low, high\)"),
        ("data.split", (1, 1), r"\(train, val, test\)"),
        ("data.split", (-1, 1, 1), "parts of 0 or more"),
        ("data.split", (0, 1, 1), "parts of 0 or more"),
        ("input.window", ("a", "b"), "numbers"),
        ("data.label_values", ("liver",), "whole numbers"),
        ("model.widths", (1.5,), "whole numbers"),
        ("train.trainable", ("(",), r"regular expressions; of '\('"),
        ("train.trainable", (), "one pattern at least"),
        ("train.epochs", float("inf"), "a number"),
        ("seed", 2**32, r"below 2\*\*32"),
        ("log.profile", (1, 2, 3), r"\(start, stop\)"),
        ("model.sam", "vit_x", "vit_b"),
        ("model.image_size", 1000, "a multiple of 16"),
        ("model.classifier_stride", 4, "one of 32, 16, 8 for model.classifier=resnet38"),
        ("model.lora_targets", ("x",), "some of q, k, v"),
        ("train.batch_labelled", 0, "at least 1"),
        (
            "cam.layer",
            "layer4",
            "one of last, b2, b3, b4, b5, b6, b7 for model.classifier=resnet38",
        ),
        ("model.mask_index", 3, "0, 1 or 2"),
        ("consistency.confidence", 1.0, "0.5 to below 1"),
        ("evaluate.protocols", ("oracle",), "some of cam, gt_box, none"),
        ("evaluate.part", "holdout", "one of train, val, test"),
        ("checkpoint.every_steps", 0, "at least 1"),
    ],
)
def test_values_that_no_run_could_use(field, value, expected):
    config = default_config()
    check_config(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"config: {field}=.*: expected .*{expected}"):
        check_config(config)


@pytest.mark.parametrize(
    ("field", "settings", "expected"),
    [
        ("cam.method", {"cam.method": "cam", "cam.layer": "b5"}, "grad_cam"),
        ("train.box", {"train.box": "gt", "cam.box": False}, "cam where cam.box says no box"),
        (
            "train.batch_unlabelled",
            {"consistency.weight": 1.0, "train.batch_unlabelled": 0},
            "above 0, for a teacher",
        ),
        *(
            ("loss.dice_smooth", {"loss.dice_smooth": 0.0, **empty}, "above 0 where a mask may be")
            for empty in ({"train.augment": True}, {"consistency.weight": 1.0})
        ),
        (
            "data.slice_range",
            {"data.slice_range": (0.2, 0.8), "data.central_fraction": 0.3},
            "where data.central_fraction says",
        ),
    ],
)
def test_values_that_do_not_go_together(field, settings, expected):
    config = default_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=rf"config: {field}=.*: expected .*{expected}"):
        check_config(config)


def test_missing_weights_are_named():
    config = default_config()
    check_files(config)
    config.model.sam_weights = "/nowhere.safetensors"
    check_config(config)  # a trained workdir needs the file no more
    with pytest.raises(UserError, match=r"model\.sam_weights=/nowhere\.safetensors: no such file"):
        check_files(config)


def test_all_faults_are_told_at_once():
    config = default_config()
    config.data.size, config.train.schedule = 0, "step"
    with pytest.raises(UserError, match=r"data\.size=0.*") as error:
        check_config(config)
    assert "train.schedule='step'" in str(error.value)


@pytest.mark.parametrize("field", ["data.split_file", "data.labels_file"])
def test_missing_files_of_the_split_are_named_before_any_work(field):
    config = default_config()
    config.update_from_flattened_dict({field: "/nowhere.json", "model.start_from": ""})
    with pytest.raises(UserError, match=rf"{field}=/nowhere\.json: no such file; README"):
        check_files(config)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], r"config\.json: holds '\[\]', expected a JSON object"),
        ({"train": {"steps": "6"}}, r"json: train\.steps='6', expected a value such as 0; bring"),
        ({"train": 5}, r"json: train=5, expected a section; bring back"),
        ({"train": None}, r"json: train=None, expected a section"),
        ({"log": {"profile": 3}}, r"json: log\.profile=3, expected a value such as \(0, 0\)"),
        ({"seed": {}}, r"json: seed=\{\}, expected a value such as 0"),
        ({"seed": None}, r"json: seed=None, expected a value such as 0"),
        ({"data": {"organs": 1}}, r"json: unknown field data\.organs; it was"),
    ],
)
def test_a_config_that_was_written_by_hand(tmp_path, content, match):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=match):
        load_config(tmp_path)


def test_a_misspelt_field_is_no_new_field():
    config = default_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.train.learning_rat = 1.0
