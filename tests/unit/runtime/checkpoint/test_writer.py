"""Saves beside training."""

import threading
from pathlib import Path

from esper_runtime.checkpoint import Generation, GenerationData, SaveError, Store, Writer

from tests.support.checkpoints import training_state

WAIT_S = 10.0


class SlowStore(Store):
    """Saves when it is let, and fails when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, run_uid="uid-1", attempt=1)
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error: Exception | None = None
        self.prepare()

    def save(self, data: GenerationData) -> Generation:
        self.entered.release()
        assert self.go.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        return super().save(data)


def test_the_newest_of_those_that_wait_wins(tmp_path: Path):
    store = SlowStore(tmp_path)
    writer = Writer(store)
    writer.submit(training_state(10))
    assert store.entered.acquire(timeout=WAIT_S)
    for step in (20, 30, 40):
        writer.submit(training_state(step))
    assert not writer.idle
    assert not writer.drain(0.01)
    assert [(outcome.step, outcome.replaced) for outcome in writer.poll()] == [(20, True), (30, True)]
    store.go.release(2)
    assert writer.drain(WAIT_S)
    assert writer.idle
    assert [(outcome.step, outcome.saved) for outcome in writer.poll()] == [(10, True), (40, True)]
    assert writer.poll() == []
    assert writer.close(WAIT_S)


def test_an_error_is_an_outcome(tmp_path: Path):
    store = SlowStore(tmp_path)
    store.go.release(2)
    writer = Writer(store)
    store.error = SaveError("no space", errno=28)
    writer.submit(training_state(10))
    assert writer.drain(WAIT_S)
    store.error = None
    writer.submit(training_state(20))
    assert writer.drain(WAIT_S)
    failed, saved = writer.poll()
    assert (failed.step, failed.saved, failed.error, failed.errno) == (10, False, "no space", 28)
    assert (saved.step, saved.saved, saved.error) == (20, True, "")
    assert writer.close(WAIT_S)


def test_after_close_a_submission_is_an_error_and_no_exception(tmp_path: Path):
    writer = Writer(SlowStore(tmp_path))
    assert writer.close(WAIT_S)
    writer.submit(training_state(10))
    (outcome,) = writer.poll()
    assert outcome.error == "the checkpoint writer has ended"
    assert writer.drain(0)


def test_close_finishes_what_was_submitted(tmp_path: Path):
    store = SlowStore(tmp_path)
    writer = Writer(store)
    writer.submit(training_state(10))
    store.go.release()
    assert writer.close(WAIT_S)
    assert [outcome.step for outcome in writer.poll()] == [10]
