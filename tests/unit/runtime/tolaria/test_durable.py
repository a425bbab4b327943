"""Waiting for the volume is never taken for death: the trainer beats while a thread reads or writes."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from esper_leyline.phases import Durability, RestoreOutcome
from esper_leyline.runconfig import Checkpoint
from esper_runtime.checkpoint import GenerationData, NoValidCheckpointError, SaveError, Store, Wal, Writer
from esper_runtime.checkpoint.durability import Probe
from esper_runtime.checkpoint.files import CHUNK
from esper_runtime.tolaria import durable
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.judge import Call, Verdict
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.stability import Calm, Part

from tests.support.checkpoints import training_state
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


class Crawling:
    """A disk that answers no read until it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.calls = 0
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, *arguments: Any) -> int:
        self.calls += 1
        assert self.go.wait(60)
        return self._real(*arguments)


@pytest.mark.row("T20")
def test_a_load_that_takes_too_long_is_left_alone_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path, run_uid="uid", attempt=1, verification="None")
    store.prepare()
    store.save(training_state(10, elements=20 * CHUNK // 4))
    now = [100.0]

    def beat() -> None:
        now[0] += 0.05

    facts = Facts(Wal(tmp_path / "wal.log"), run_seconds=lambda: 0.0)
    events: Any = Noted()
    patient = Checkpoints(
        store, Writer(store), config=Checkpoint(), facts=facts, events=events, beat=beat, monotonic=lambda: now[0]
    )
    crawling = Crawling(monkeypatch)
    monkeypatch.setattr(durable, "BEAT_S", 0.001)
    assert patient.load_newest(deadline_s=12.0) == (RestoreOutcome.DEADLINE_EXCEEDED, None)
    assert 112.0 <= now[0] <= 112.2
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint-load")]
    assert threads, "it still waits for the disk"
    crawling.go.set()
    for thread in threads:
        thread.join(60)
    assert crawling.calls <= 6, "after the chunks under way nothing more is read"
    outcome, loaded = patient.load_newest(before_step=11)
    assert outcome is RestoreOutcome.OK
    assert loaded is not None
    assert loaded.step == 10
    assert patient.load_newest(before_step=10) == (RestoreOutcome.NO_CHECKPOINT, None)


class Noted:
    """Events, kept."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, str]] = []
        self.degradations: list[tuple[bool, str]] = []

    def notice(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.notices.append((reason, message))

    def degradation(self, component: str, *, degraded: bool, reason: str, message: str) -> None:
        self.degradations.append((degraded, message))

    def checkpoint(self, state: object) -> None:
        return


class Standing(Calm):
    """What was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def succeeded(self, part: Part) -> None:
        self.told.append(f"{part} succeeded")

    def failed(self, part: Part, why: str) -> None:
        self.told.append(f"{part} failed")


class State:
    """As much of a training state as a save asks for."""

    step = 10

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.weight = torch.ones(5, dtype=dtype)

    def generation(self, metrics: Mapping[str, float], *, copy: Any) -> GenerationData:
        copied, release = copy({"model": {"w": self.weight}})
        return GenerationData(epoch=3, step=self.step, tensors=copied, metrics=metrics, release=release)


@pytest.fixture
def saving(tmp_path: Path) -> tuple[Checkpoints, Noted, Standing, Metrics]:
    store = Store(tmp_path, run_uid="uid", attempt=1)
    store.prepare()
    facts = Facts(Wal(tmp_path / "wal.log"), run_seconds=lambda: 0.0)
    noted, standing, metrics = Noted(), Standing(), Metrics(None)
    events: Any = noted
    made = Checkpoints(
        store, Writer(store), config=Checkpoint(), facts=facts, events=events, beat=lambda: None, metrics=metrics,
        stability=standing,
    )  # fmt: skip
    return made, noted, standing, metrics


def test_a_save_is_measured(saving: tuple[Checkpoints, Noted, Standing, Metrics]):
    checkpoints, noted, standing, metrics = saving
    state: Any = State()
    assert checkpoints.save_now(state) == 10
    assert metrics.value("tolaria.checkpoint.generation") == 1
    assert metrics.value("tolaria.checkpoint.last_good_epoch") == 3
    assert metrics.value("tolaria.checkpoint.bytes") == checkpoints.store.state().total_bytes
    assert metrics.value("tolaria.checkpoint.duration_s") == metrics.value("tolaria.checkpoint_duration_seconds") > 0
    assert metrics.value("tolaria.checkpoint.durability_mode") in (0, 1, 2)
    assert standing.told == ["checkpoint succeeded"]
    assert [reason for reason, _ in noted.notices if reason != "CheckpointNotDurable"] == []


def test_a_state_that_cannot_be_copied_is_a_failed_save_and_no_crash(
    saving: tuple[Checkpoints, Noted, Standing, Metrics],
):
    checkpoints, noted, standing, metrics = saving
    state: Any = State(torch.complex128)
    assert checkpoints.save_now(state) is None
    assert standing.told == ["checkpoint failed"]
    assert metrics.value("tolaria.checkpoint.failures_total") == 1
    assert noted.degradations[-1][0]
    assert "step 10 was not saved: tensor w" in noted.degradations[-1][1]
    state.weight = torch.ones(5)
    assert checkpoints.save_now(state) == 10, "its memory was given back"


def test_a_save_that_falls_due_while_the_disk_is_busy_comes_as_soon_as_it_is_free(
    saving: tuple[Checkpoints, Noted, Standing, Metrics], monkeypatch: pytest.MonkeyPatch
):
    checkpoints, *_ = saving
    checkpoints.configure(Checkpoint(every_steps=10, period_seconds=None))
    free, saved, save = threading.Event(), [], checkpoints.store.save

    def busy(data: GenerationData) -> Any:
        assert free.wait(60)
        saved.append(data.step)
        return save(data)

    monkeypatch.setattr(checkpoints.store, "save", busy)
    state: Any = State()
    saved = []
    for step in range(10, 26):
        if step == 23:
            free.set()
            checkpoints.wait()
        state.step = step
        checkpoints.after_step(state, Verdict(call=Call.GOOD))
    checkpoints.wait()
    assert saved == [10, 23]


def test_a_save_that_falls_due_at_a_doubtful_step_waits_for_a_good_one(
    saving: tuple[Checkpoints, Noted, Standing, Metrics],
):
    checkpoints, *_ = saving
    checkpoints.configure(Checkpoint(every_steps=10, period_seconds=None))
    state: Any = State()
    saved = []
    for step, call in ((10, Call.SUSPECT), (11, Call.GOOD), (12, Call.GOOD)):
        state.step = step
        checkpoints.after_step(state, Verdict(call=call))
        checkpoints.wait()
        saved.append(checkpoints.saved_step)
    assert saved == [None, 11, 11]


def test_a_copy_that_fails_is_tried_again_at_the_next_cadence_and_not_at_every_step(
    saving: tuple[Checkpoints, Noted, Standing, Metrics],
):
    checkpoints, _, standing, _ = saving
    now = [0.0]
    checkpoints._monotonic, checkpoints._submitted_at = lambda: now[0], 0.0
    checkpoints.configure(Checkpoint(every_steps=None, period_seconds=10))
    state: Any = State(torch.complex128)
    for second in range(25):
        now[0] += 1.0
        state.step = second
        checkpoints.after_step(state, Verdict(call=Call.GOOD))
    assert standing.told == ["checkpoint failed"] * 2


def test_an_obstacle_is_told_once_with_its_numbers(saving: tuple[Checkpoints, Noted, Standing, Metrics]):
    checkpoints, noted, *_ = saving
    state: Any = State()
    checkpoints.store.period_s = 0.0
    for step in (10, 20, 30):
        state.step = step
        assert checkpoints.save_now(state) == step
    told = [message for reason, message in noted.notices if reason == "CheckpointInfeasible"]
    assert len(told) == 1
    assert "a checkpoint is asked for every 0.0 s" in told[0]
    assert not checkpoints.store.state().feasible


def test_a_volume_that_forgets_is_told_at_the_start(tmp_path: Path):
    store = Store(tmp_path, run_uid="uid", attempt=1)
    store.probe = Probe(mode=Durability.UNKNOWN, direct_io=False, filesystem="tmpfs", doubts=("tmpfs: it is memory",))
    noted, metrics = Noted(), Metrics(None)
    events: Any = noted
    facts = Facts(Wal(tmp_path / "wal.log"), run_seconds=lambda: 0.0)
    Checkpoints(
        store, Writer(store), config=Checkpoint(), facts=facts, events=events, beat=lambda: None, metrics=metrics
    )
    assert noted.notices == [("CheckpointNotDurable", f"{tmp_path}: what is saved may be lost: tmpfs: it is memory")]
    assert metrics.value("tolaria.checkpoint.durability_mode") == 0
