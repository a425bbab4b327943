"""Waiting for the volume is never taken for death: the trainer beats while a thread reads or writes."""

from pathlib import Path
from typing import Any

import pytest
from esper_leyline.phases import RestoreOutcome
from esper_leyline.runconfig import Checkpoint
from esper_runtime.checkpoint import NoValidCheckpointError, SaveError, Store, Wal, Writer
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.facts import Facts

from tests.support.waiting import until_sync


class SlowStore(Store):
    """Works once somebody has beaten three times."""

    beats = 0
    error: Exception | None = None

    def _wait(self) -> None:
        until_sync(lambda: self.beats >= 3, what="three beats")
        if self.error is not None:
            raise self.error

    def load_newest(self, *_: Any, **__: Any) -> None:
        self._wait()

    def load(self, *_: Any, **__: Any) -> Any:
        self._wait()
        return "the best"

    def export(self, *_: Any) -> Any:
        self._wait()


@pytest.fixture
def slow(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path, run_uid="uid", attempt=1)


@pytest.fixture
def checkpoints(slow: SlowStore, tmp_path: Path) -> Checkpoints:
    def beat() -> None:
        slow.beats += 1

    facts = Facts(Wal(tmp_path / "wal.log"), run_seconds=lambda: 0.0)
    writer = Writer(slow)
    return Checkpoints(slow, writer, config=Checkpoint(), facts=facts, events=None, beat=beat)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "work",
    [
        lambda c: c.load_first(None),
        lambda c: c.load_newest(),
        lambda c: c.load_best(),
        lambda c: c.export({}, {}),
    ],
    ids=["first", "newest", "best", "export"],
)
def test_it_beats_while_the_volume_takes_its_time(checkpoints: Checkpoints, slow: SlowStore, work: Any):
    work(checkpoints)
    assert slow.beats >= 3


def test_errors_come_through(checkpoints: Checkpoints, slow: SlowStore):
    slow.error = NoValidCheckpointError("none", ("a00001/gen-0000000001/state.json: missing",))
    with pytest.raises(NoValidCheckpointError):
        checkpoints.load_first(None)
    assert checkpoints.load_best() == (RestoreOutcome.INTEGRITY_FAILED, None)
    assert checkpoints.load_newest() == (RestoreOutcome.INTEGRITY_FAILED, None)
    slow.error = SaveError("no", errno=28, path=Path())
    with pytest.raises(SaveError):
        checkpoints.export({}, {})
