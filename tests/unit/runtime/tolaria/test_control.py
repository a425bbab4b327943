"""The trainer's ear: signals in the order of their sending, each answered, also those that came in one blink."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from esper_leyline import paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.pages import EmergencyPage, EmergencyRecord
from esper_leyline.v1.emergency_pb2 import (
    ACK_STAGE_DONE,
    ACK_STAGE_SEEN,
    EMERGENCY_MODE_CHECKPOINT,
    EMERGENCY_MODE_FREEZE,
    EMERGENCY_MODE_KILL,
    EmergencyAck,
)
from esper_runtime.tolaria.control import Control, Identity

FREEZE, CHECKPOINT, KILL = EMERGENCY_MODE_FREEZE, EMERGENCY_MODE_CHECKPOINT, EMERGENCY_MODE_KILL
SEEN, DONE = ACK_STAGE_SEEN, ACK_STAGE_DONE


class Told:
    """Events and heart in one: what the trainer says."""

    def __init__(self) -> None:
        self.acks: list[tuple[str, int, bool]] = []
        self.incidents: list[str] = []
        self.order = 0
        self.phase = 2
        self.beats = 0

    @contextmanager
    def incident(self, name: str) -> Iterator[None]:
        self.incidents.append(name)
        yield
        assert self.incidents.pop() == name

    def ack(self, ack: EmergencyAck) -> None:
        assert self.incidents[-1] == ack.signal_id, "told under another incident's name"
        self.acks.append((ack.signal_id[:1], ack.stage, ack.clear))

    def transition(self, *_: Any, **__: Any) -> None: ...

    def beat(self) -> None:
        self.beats += 1


class Ear:
    def __init__(self, directory: Path, while_frozen: Sequence[EmergencyRecord] = ()) -> None:
        self.page = EmergencyPage.create(directory / paths.EMERGENCY_PAGE)
        self.told = Told()
        self.while_frozen = list(while_frozen)
        told: Any = self.told
        self.control = Control(
            directory,
            identity=Identity(run_uid="run", attempt=1, rank=0),
            heart=told,
            events=told,
            step=lambda: 7,
            save=lambda: 7,
            sleep=lambda _: self.page.publish(self.while_frozen.pop(0)) if self.while_frozen else None,
        )
        self.control.poll()


def order(seq: int, name: str, mode: int = FREEZE, *, clear: bool = False, attempt: int = 0) -> EmergencyRecord:
    return EmergencyRecord(
        term=1, seq=seq, mode=mode, clear=clear, attempt=attempt, signal_id=name * 32, arrived_ns=1, source=1
    )


@pytest.fixture
def ear(tmp_path: Path) -> Ear:
    return Ear(tmp_path)


def test_a_halt_and_its_end_between_two_looks_are_both_answered_and_training_goes_on(ear: Ear) -> None:
    ear.page.publish(order(1, "a", CHECKPOINT))
    ear.page.publish(order(2, "a", CHECKPOINT, clear=True))
    assert ear.control.poll() is None
    assert ear.told.acks == [("a", SEEN, False), ("a", DONE, True)]
    assert ear.told.order == order(2, "a").order


def test_of_three_signals_in_one_blink_the_one_that_was_not_lifted_acts(ear: Ear) -> None:
    ear.page.publish(order(1, "a"))
    ear.page.publish(order(2, "a", clear=True))
    ear.page.publish(order(3, "b", KILL))
    outcome = ear.control.poll()
    assert outcome is not None
    assert outcome.exit_code is ExitCode.HALTED
    assert ear.told.acks == [("a", SEEN, False), ("a", DONE, True), ("b", SEEN, False), ("b", DONE, False)]


def test_a_stronger_order_right_behind_a_freeze_is_obeyed_from_within_it(ear: Ear) -> None:
    ear.page.publish(order(1, "a"))
    ear.page.publish(order(2, "b", CHECKPOINT))
    outcome = ear.control.poll()
    assert outcome is not None
    assert outcome.saved_step == 7
    assert [name for name, _, _ in ear.told.acks] == ["a", "a", "b", "b"]


def test_what_comes_while_frozen_is_taken_in_order(ear: Ear) -> None:
    ear.page.publish(order(1, "a"))
    ear.while_frozen = [order(2, "c", clear=True), order(3, "a", clear=True)]
    assert ear.control.poll() is None
    assert ear.told.acks == [("a", SEEN, False), ("a", DONE, False), ("a", DONE, True)]


def test_a_signal_of_another_attempt_is_passed_over_without_hiding_the_next(ear: Ear) -> None:
    ear.page.publish(order(1, "a", KILL, attempt=2))
    ear.page.publish(order(2, "b", KILL, attempt=1))
    outcome = ear.control.poll()
    assert outcome is not None
    assert [name for name, _, _ in ear.told.acks] == ["b", "b"]


def test_a_trainer_that_starts_honours_what_is_in_force_and_nothing_before(tmp_path: Path) -> None:
    page = EmergencyPage.create(tmp_path / paths.EMERGENCY_PAGE)
    page.publish(order(1, "a", CHECKPOINT))
    page.publish(order(2, "a", CHECKPOINT, clear=True))
    assert Ear(tmp_path).told.acks == []
    page.publish(order(3, "b"))
    late = Ear(tmp_path, while_frozen=[order(4, "b", clear=True)])
    assert late.told.acks == [("b", SEEN, False), ("b", DONE, False), ("b", DONE, True)]


@pytest.mark.row("K09")
def test_a_trainer_that_starts_behind_a_clear_of_another_signal_is_halted(tmp_path: Path) -> None:
    page = EmergencyPage.create(tmp_path / paths.EMERGENCY_PAGE)
    for record in (order(1, "a"), order(2, "b", KILL), order(3, "a", clear=True)):
        page.publish(record)
    ear = Ear(tmp_path)
    assert ear.told.acks == [("b", SEEN, False), ("b", DONE, False)]
