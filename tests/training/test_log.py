"""Curves are on disk as they are written, and a disk that refuses for a while ends no run."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from sammix_jax.training import log as train_log
from sammix_jax.training.log import TrainLog, read_log


def events(workdir) -> list[Event]:
    """Of all event files; a record is its length, a checksum, the event and a checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def curve(workdir, tag: str) -> list[tuple[int, float]]:
    return [
        (event.step, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
        if value.tag == tag
    ]


def test_what_is_written_is_there_at_once(tmp_path):
    """Of a run that is killed nothing of it is lost."""
    with TrainLog(tmp_path, 0) as log:
        log.write(1, {"train/loss": 0.5, "val/dice": 0.25})
        log.write(2, {"train/loss": 0.125})
        assert curve(tmp_path, "train/loss") == [(1, 0.5), (2, 0.125)]
        assert curve(tmp_path, "val/dice") == [(1, 0.25)]
        assert len(read_log(tmp_path)) == 3


def test_steps_that_are_repeated_hide_those_before(tmp_path):
    with TrainLog(tmp_path, 0) as log:
        for step in (39, 40, 41):
            log.write(step, {"train/loss": 0.5})
    (tmp_path / "tensorboard").rename(tmp_path / "before")
    with TrainLog(tmp_path, 40):
        pass
    assert [step for step, *_ in read_log(tmp_path)] == [39, 40]
    assert [event.step for event in events(tmp_path) if event.session_log.status] == [41]


@pytest.mark.parametrize("moment", ["write", "close"])
def test_a_disk_that_refuses_is_told_and_asked_again(tmp_path, monkeypatch, caplog, moment):
    refusing = []

    class Writer(train_log.EventsWriter):
        def flush(self):
            if refusing:
                raise OSError(28, "No space left on device")
            return super().flush()

    monkeypatch.setattr(train_log, "EventsWriter", Writer)
    with TrainLog(tmp_path, 0) as log:
        log.write(1, {"train/loss": 0.5})
        refusing.append(True)
        if moment == "write":
            for step in range(2, 40):
                log.write(step, {"train/loss": 0.25})
            refusing.clear()
            log.write(40, {"train/loss": 0.125})
            assert [step for step, _ in curve(tmp_path, "train/loss")] == list(range(1, 41))
    assert f"{tmp_path}: could not be written" in caplog.text
