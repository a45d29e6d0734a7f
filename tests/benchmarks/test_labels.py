"""Rows of the label-efficiency benchmark: a finished one is taken as it is, or refused."""

import json

import pytest

from benchmarks.accuracy import labels, rows
from configs.labels import VARIANTS
from sammix_jax.config_files import claim_workdir
from sammix_jax.data.files import write_json
from sammix_jax.errors import UserError
from sammix_jax.evaluation.results import results_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A finished row of 20 steps; to make data or to train is an error."""

    def never(*args, **kwargs):
        raise AssertionError("a finished row was not taken")

    monkeypatch.setattr(rows.prepare, "prepare", never)
    monkeypatch.setattr(rows.train, "train", never)
    config = labels.row_config("no_box", 5, 2, tmp_path, steps=20)
    workdir = tmp_path / "no_box-k5-s2"
    claim_workdir(config, workdir)
    (workdir / "checkpoints" / "best" / "20").mkdir(parents=True)
    for root in ("", str(tmp_path / "unenhanced")):
        config.evaluate.root = root
        evaluate = json.loads(config.evaluate.to_json())
        results = {"evaluate": evaluate, "checkpoint_step": 20, "faults": []}
        write_json(results_folder(config, workdir) / "results.json", results)
    return tmp_path


def config_of(folder):
    return lambda variant, count, seed: labels.row_config(variant, count, seed, folder, 20)


def test_a_finished_row_is_taken(folder, monkeypatch):
    monkeypatch.setattr(rows.phantom, "write_lits", lambda *args: None)
    rows.run_row(labels.row_config("no_box", 5, 2, folder, 20), "no_box", 5, 2, folder)
    portal, unenhanced = rows.finished_rows(config_of(folder), folder)
    assert (portal.variant, portal.count, portal.seed) == ("no_box", 5, 2)
    assert (portal.domain, unenhanced.domain) == rows.DOMAINS
    assert portal.folder == folder / "no_box-k5-s2" / "evaluation" / "test"
    assert unenhanced.folder.name.startswith("unenhanced-")


def test_a_row_that_is_not_scored_in_one_domain_is_not_finished(folder):
    (next(folder.glob("no_box-k5-s2/evaluation/unenhanced-*")) / "results.json").unlink()
    assert rows.finished_rows(config_of(folder), folder) == []


@pytest.mark.parametrize(
    ("steps", "edit", "named"),
    [
        (30, {}, r"train\.steps=20 \(now 30\)"),
        (0, {}, r"train\.steps=20 \(now 300\)"),
        (20, {"cam.threshold": 0.4}, r"cam\.threshold=0\.2 \(now 0\.4\)"),
    ],
)
def test_a_row_made_with_other_settings_is_refused(folder, monkeypatch, steps, edit, named):
    monkeypatch.setitem(VARIANTS, "no_box", VARIANTS["no_box"] | edit)
    with pytest.raises(UserError, match=rf"no_box-k5-s2.config\.json.*made with {named};"):
        config = labels.row_config("no_box", 5, 2, folder, steps)
        rows.run_row(config, "no_box", 5, 2, folder)
    assert [path.name for path in folder.iterdir()] == ["no_box-k5-s2"]  # before data are made


def test_tables_hold_every_finished_row_of_the_folder(folder, monkeypatch):
    other = folder / "sam_mix-k50-s1"
    claim_workdir(labels.row_config("sam_mix", 50, 1, folder, 20), other)  # not scored yet
    (folder / "store").mkdir()
    seen = []
    monkeypatch.setattr(rows, "run_row", lambda *args: None)
    rows.run_rows([(0, 5, "sam_mix")], config_of(folder), folder, seen.append)
    assert [(row.variant, row.domain) for row in seen[0]] == [("no_box", d) for d in rows.DOMAINS]


def test_a_row_that_cannot_be_run_ends_the_benchmark_before_the_first(folder, monkeypatch, capsys):
    def config_of(variant, count, seed):
        config = labels.row_config(variant, count, seed, folder, 20)
        if seed == 1:
            config.model.sam_weights = "missing.safetensors"
        return config

    monkeypatch.setattr(rows, "run_row", lambda *args: pytest.fail("a row was run"))
    with pytest.raises(SystemExit, match=r"model\.sam_weights=missing\.safetensors: no such file"):
        rows.run_rows([(0, 5, "sam_mix"), (1, 5, "sam_mix")], config_of, folder, pytest.fail)


def test_rows_share_their_data_and_patients(tmp_path):
    one = labels.row_config("sam_mix", 5, 0, tmp_path)
    other = labels.row_config("sam_mix", 100, 2, tmp_path)
    for config in (one, other):
        config.data.labelled_slices, config.data.labels_seed, config.seed = 0, 0, 0
    assert one.to_dict() == other.to_dict()
