"""Scored scans come back as they were, and only where nothing that they depend on has changed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from scored import case, example

from sammix_jax.evaluation.scores import Guidance
from sammix_jax.evaluation.so_far import FOLDER, ScoredScan, ScoredSoFar, model_digest

DIGESTS = ("mask", "image")


@pytest.fixture
def scored():
    cases = [case("v-1", "cam", 0.1 + 0.2), case("v-1", "none", None, "both_empty")]
    guidance = Guidance(
        np.array([True, False]), np.array([0.9, 0.2], np.float32), np.ones(1), np.array([False])
    )
    return ScoredScan(cases, guidance, example(cases[0]))


def assert_same(one, other):
    assert one.cases == other.cases  # to the bit
    for of_one, of_other in ((one.guidance, other.guidance), (one.example, other.example)):
        for name, value in vars(of_one).items():
            found = getattr(of_other, name)
            assert type(found) is type(value), name
            np.testing.assert_array_equal(found, value, err_msg=name)
            assert getattr(found, "dtype", None) == getattr(value, "dtype", None), name


def test_what_was_scored_comes_back(tmp_path, scored):
    ScoredSoFar(tmp_path, small_config(), "model").save(scored, DIGESTS)
    assert_same(ScoredSoFar(tmp_path, small_config(), "model").load("v-1", DIGESTS), scored)


def test_so_does_a_scan_of_a_system_without_cam_and_classifier(tmp_path, scored):
    so_far = ScoredSoFar(tmp_path, small_config(), "model")
    bare = ScoredScan(
        scored.cases,
        Guidance(np.array([False, False]), None, None, None),
        dataclasses.replace(scored.example, cam=None, box=None, true_box=None),
    )
    so_far.save(bare, DIGESTS)
    assert_same(so_far.load("v-1", DIGESTS), bare)


def test_only_what_its_scores_depend_on_may_not_change(tmp_path, scored):
    config = small_config()
    ScoredSoFar(tmp_path, config, "model").save(scored, DIGESTS)
    found = ScoredSoFar(tmp_path, config, "model")
    assert found.load("v-2", DIGESTS) is None
    assert found.load("v-1", ("another mask", "image")) is None
    assert found.load("v-1", ("mask", "another image")) is None
    assert ScoredSoFar(tmp_path, config, "another").load("v-1", DIGESTS) is None
    with config.unlocked():
        config.evaluate.batch += 1
    assert ScoredSoFar(tmp_path, config, "model").load("v-1", DIGESTS)
    config.evaluate.nsd_tolerance += 1.0
    assert ScoredSoFar(tmp_path, config, "model").load("v-1", DIGESTS) is None


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_is_told_and_scored_again(tmp_path, scored, caplog, content):
    so_far = ScoredSoFar(tmp_path, small_config(), "model")
    so_far.save(scored, DIGESTS)
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    assert so_far.load("v-1", DIGESTS) is None
    assert f"{path}: damaged" in caplog.text and "v-1 is scored again" in caplog.text


def test_so_is_one_of_other_fields(tmp_path, scored, monkeypatch, caplog):
    so_far = ScoredSoFar(tmp_path, small_config(), "model")
    so_far.save(scored, DIGESTS)
    (path,) = (tmp_path / FOLDER).iterdir()
    arrays = dict(np.load(path))
    np.savez(path, **{name: array for name, array in arrays.items() if name != "example.cam"})
    assert so_far.load("v-1", DIGESTS) is None
    told = json.loads(arrays["told"].item())
    told["cases"][0]["another_metric"] = 1.0
    np.savez(path, **arrays | {"told": np.array(json.dumps(told))})
    assert so_far.load("v-1", DIGESTS) is None
    assert caplog.text.count("v-1 is scored again") == 2


def test_a_model_is_known_by_its_values():
    one = {"params": {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}}
    alike = {"params": {name: array.copy() for name, array in one["params"].items()}}
    other = {"params": one["params"] | {"b": np.array([0, 1e-30], np.float32)}}
    renamed = {"params": {"a": one["params"]["a"], "c": one["params"]["b"]}}
    found = [model_digest(jax.tree.map(jnp.asarray, v)) for v in (one, alike, other, renamed)]
    assert found[0] == found[1] and len(set(found)) == 3


def test_nothing_is_left_of_an_evaluation_that_is_done(tmp_path, scored):
    so_far = ScoredSoFar(tmp_path, small_config(), "model")
    so_far.clear()  # there may be none
    so_far.save(scored, DIGESTS)
    ScoredSoFar(tmp_path, small_config(), "another").save(scored, DIGESTS)
    so_far.clear()
    assert not list(tmp_path.iterdir())
