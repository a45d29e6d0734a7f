"""A workdir has one run at a time."""

import errno
import fcntl

import pytest

from sammix_jax.errors import UserError
from sammix_jax.prepare import prepare
from sammix_jax.train import train
from sammix_jax.training.lock import sole_writer


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, toy_config):
    store = prepare(toy_config, tmp_path)
    with sole_writer(tmp_path / "run"):
        with pytest.raises(UserError, match="run: another process trains in this workdir; let it"):
            train(toy_config, tmp_path / "run", store)
        assert not (tmp_path / "run" / "config.json").exists()
    assert train(toy_config, tmp_path / "run", store)


def test_a_workdir_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        with pytest.raises(UserError, match=rf"--workdir=.*{folder}: cannot be written to \("):
            sole_writer(tmp_path / folder).__enter__()


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_writer(tmp_path), sole_writer(tmp_path):
        assert (tmp_path / ".lock").exists()
