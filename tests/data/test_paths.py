"""What a user may write for a path, and what is said where it cannot be used."""

import pathlib

import fsspec
import pytest

from sammix_jax.data import paths
from sammix_jax.errors import UserError


@pytest.fixture(autouse=True)
def no_bucket_is_known():
    paths._reach.cache_clear()
    yield
    paths._reach.cache_clear()


def test_a_local_path_is_pathlibs(tmp_path):
    for path in ("scans/a b", "./gs/x", "", "C:/scans", tmp_path):
        assert type(paths.as_path(path)) is type(pathlib.Path())
        assert paths.as_path(path) == pathlib.Path(path) and not paths.is_remote(path)


def test_a_tilde_is_the_home_and_only_in_front(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.as_path("~/runs") == tmp_path / "runs"
    (tmp_path / "seed-0").mkdir()
    assert paths.find_matching("~/seed-*") == [tmp_path / "seed-0"]
    for path in ("runs/~", "~runs"):
        assert paths.as_path(path) == pathlib.Path(path)


@pytest.mark.parametrize(
    "path", ["gs:/bucket/x", pathlib.Path("gs://bucket/x"), "gs://", "https://host/x", "GS://b/x"]
)
def test_no_uri_becomes_a_local_folder(path):
    with pytest.raises(UserError, match=r"expected a local path, gs://BUCKET/… or s3://BUCKET/…"):
        paths.as_path(path)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("gs://b/x", ImportError("Please install gcsfs"), r"gcsfs\): .*requirements/cloud\.txt"),
        ("s3://b/x", ImportError("Install s3fs"), r"s3://b: needs a client .*pip install s3fs"),
        ("gs://b/x", RuntimeError("no token"), r"gs://b: cannot be reached .*no token.*gcloud"),
    ],
)
def test_a_bucket_out_of_reach_is_told_at_once(monkeypatch, path, error, message):
    def refuse(_):
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(UserError, match=message):
        paths.as_path(path)
