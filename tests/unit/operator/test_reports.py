"""Reports on their way in: verified, in order, once, bounded."""

import logging
from collections import Counter
from typing import Any

import pytest
from esper_leyline.oona import Entry
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.report_pb2 import Notice, RunReport, Transition
from esper_operator import reports
from esper_operator.model import RunKey
from esper_operator.reports import Intake
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.forgeries import flipped, rewritten, same_meaning, truncated, under_other_keys

SEED = bytes(range(32))
UID = "uid-1"
KEY = RunKey("team", "digits")
FIRST = 1 << 32


def envelope(n: int, *, attempt: int = 1, uid: str = UID, seed: bytes = SEED, **event: Any) -> BusEnvelope:
    report = RunReport(version=1, run_uid=uid, attempt=attempt, seq=FIRST + n, **event)
    return sealed(report, uid=uid, seed=seed)


def sealed(report: RunReport, *, uid: str = UID, seed: bytes = SEED) -> BusEnvelope:
    kind = BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT
    return seal(report.SerializeToString(), kind, run_uid=uid, key=SigningKey.derive(seed, uid, Role.REPORT))


class Bench:
    def __init__(self) -> None:
        self.now = 100.0
        self.woken: list[bool] = []
        self.forged: list[str] = []
        self.intake = Intake(
            seed=SEED,
            generation=1,
            monotonic=lambda: self.now,
            on_report=lambda _key, urgent: self.woken.append(urgent),
            on_forged=lambda _key, reason: self.forged.append(reason),
        )
        self.intake.observe(UID, KEY, (0, 0))

    def take(self, *envelopes: BusEnvelope, way: str = "bus") -> list[str]:
        return [self.intake.accept(each, way=way) for each in envelopes]

    def pending(self) -> list[int]:
        return [report.seq - FIRST for report in self.intake.of(UID)]


MOVED = {"transition": Transition(reason="Training")}


def test_events_are_kept_in_order_and_mere_progress_gives_way() -> None:
    bench = Bench()
    assert bench.take(envelope(5), envelope(2, **MOVED), envelope(3), envelope(1)) == ["accepted"] * 4
    assert bench.pending() == [2, 5]
    assert bench.woken == [False, True, False, False]


def test_a_report_that_comes_by_both_ways_counts_once() -> None:
    bench = Bench()
    assert bench.take(envelope(1, **MOVED), envelope(1, **MOVED)) == ["accepted", "repeated"]
    assert bench.take(envelope(1, **MOVED), way="pull") == ["repeated"]
    assert bench.pending() == [1]


def test_what_the_status_includes_is_dropped_and_never_comes_back() -> None:
    bench = Bench()
    bench.take(*(envelope(n, **MOVED) for n in range(1, 5)))
    bench.intake.observe(UID, KEY, (1, FIRST + 3))
    assert bench.pending() == [4]
    assert bench.take(envelope(2, **MOVED), envelope(3, **MOVED)) == ["repeated", "repeated"]
    bench.intake.fold(UID, (1, FIRST + 4))
    assert (bench.pending(), bench.intake.cursor(UID)) == ([], (1, FIRST + 4))
    assert bench.take(envelope(4, **MOVED)) == ["repeated"]
    bench.intake.observe(UID, KEY, (1, FIRST + 1))  # an older version of the resource
    assert bench.take(envelope(2, **MOVED)) == ["repeated"]


@pytest.mark.parametrize(
    ("bad", "outcome"),
    [
        (envelope(1, seed=bytes(32)), "forged"),
        (envelope(1, uid="uid-2"), "unknown"),
        (sealed(RunReport(version=2, run_uid=UID, attempt=1, seq=FIRST + 1)), "wrong_version"),
        (sealed(RunReport(run_uid=UID, attempt=1, seq=FIRST + 1)), "wrong_version"),
        (sealed(RunReport(version=1, run_uid="uid-2", attempt=1, seq=FIRST + 1)), "malformed"),
        (sealed(RunReport(version=1, run_uid=UID, attempt=0, seq=FIRST + 1)), "malformed"),
        (sealed(RunReport(version=1, run_uid=UID, attempt=1, seq=0)), "malformed"),
        (BusEnvelope(run_uid=UID, payload=b"\xff"), "malformed"),
        (
            BusEnvelope(message_type=BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT, run_uid=UID, payload=b"\xff\xff"),
            "malformed",
        ),
    ],
)
def test_what_is_not_a_report_of_this_run_changes_nothing(bad: BusEnvelope, outcome: str) -> None:
    bench = Bench()
    assert bench.take(bad) == [outcome]
    assert (bench.pending(), bench.woken) == ([], [])
    assert bench.intake.age_s(UID, 1) is None


def test_changed_bytes_do_not_count() -> None:
    bench = Bench()
    changed = envelope(1)
    changed.payload = RunReport(version=1, run_uid=UID, attempt=1, seq=FIRST + 9).SerializeToString()
    assert bench.take(changed) == ["forged"]


@pytest.mark.row("T07")
def test_no_change_to_a_report_that_somebody_without_the_key_can_make_counts() -> None:
    bench = Bench()
    good = envelope(3, **MOVED)
    raw = good.SerializeToString()
    other = RunReport(version=1, run_uid=UID, attempt=1, seq=FIRST + 9, **MOVED).SerializeToString()
    roles = (Role.OPERATOR, Role.TAMIYO)
    forged = [*under_other_keys(good, SEED, UID, roles).values(), *rewritten(good, other).values()]
    bits = [one for one in flipped(raw) if not same_meaning(one, good)]
    forged += [found for one in (*truncated(raw), *bits) if (found := Entry("", one).envelope()) is not None]
    outcomes = Counter(bench.take(*forged))
    assert set(outcomes) <= {"forged", "malformed", "wrong_version", "unknown"}
    assert (bench.pending(), bench.woken, bench.intake.age_s(UID, 1)) == ([], [], None)
    assert len(bench.forged) <= 14
    assert bench.take(good) == ["accepted"]
    print(f"{len(forged)} forged reports refused: {dict(outcomes)}")


def test_a_report_that_is_sent_again_is_no_sign_of_life() -> None:
    """Whoever holds Redis can repeat the last one for ever."""
    bench = Bench()
    bench.take(envelope(1))
    for _ in range(10):
        bench.now += 1
        assert bench.take(envelope(1)) == ["repeated"]
    assert (bench.intake.age_s(UID, 1), bench.intake.bus_age_s(UID, 0)) == (10, 10)
    bench.take(envelope(2), way="pull")
    assert (bench.intake.age_s(UID, 1), bench.intake.bus_age_s(UID, 0)) == (0, 10)
    bench.take(envelope(2))  # Redis follows: it delivers again
    assert bench.intake.bus_age_s(UID, 0) == 0


def chained(*numbers: int, before: int = 0) -> list[BusEnvelope]:
    """Events that name the one before them."""
    made = []
    for n in numbers:
        made.append(envelope(n, previous_event_seq=FIRST + before if before else 0, **MOVED))
        before = n
    return made


def test_what_follows_a_missing_report_waits_until_the_pod_has_told_it() -> None:
    bench = Bench()
    one, two, three, four = chained(1, 2, 3, 4)
    bench.take(one, three, four)
    assert bench.pending() == [1]
    assert bench.intake.misses(UID)
    assert bench.intake.last_seq(UID, 1, 0) == FIRST + 1  # asked for what comes behind the last whole one
    assert bench.take(two, way="pull") == ["accepted"]
    assert (bench.pending(), bench.intake.misses(UID)) == ([1, 2, 3, 4], False)
    assert bench.intake.last_seq(UID, 1, 0) == FIRST + 4


def test_a_report_that_nobody_has_any_more_is_waited_for_three_seconds() -> None:
    bench = Bench()
    one, _, three = chained(1, 2, 3)
    bench.take(one, three)
    for n in range(4, 7):
        bench.now += 0.9
        bench.take(envelope(n, previous_event_seq=FIRST + 3))  # progress gives way, and the gap is still the same
        bench.intake.give_up_gaps()
        assert bench.pending() == [1]
    woken = len(bench.woken)
    bench.now += 0.4
    bench.intake.give_up_gaps()
    assert (bench.pending(), bench.woken[woken:]) == ([1, 3, 6], [True])
    assert not bench.intake.misses(UID)
    assert bench.intake.last_seq(UID, 1, 0) == FIRST + 6
    bench.intake.give_up_gaps()
    assert len(bench.woken) == woken + 1


def test_a_status_that_goes_on_behind_a_gap_has_none() -> None:
    bench = Bench()
    one, _, three, four = chained(1, 2, 3, 4)
    bench.take(one, three)
    bench.intake.observe(UID, KEY, (1, FIRST + 3))
    bench.take(four)
    assert (bench.pending(), bench.intake.misses(UID)) == ([4], False)


def test_the_first_report_of_an_attempt_follows_nothing() -> None:
    bench = Bench()
    bench.take(*chained(1, 2), envelope(1, attempt=2, previous_event_seq=0, **MOVED))
    assert bench.pending() == [1, 2, 1]
    bench.take(envelope(3, attempt=2, previous_event_seq=FIRST + 2, **MOVED))
    assert bench.pending() == [1, 2, 1]
    bench.intake.forget(UID)
    bench.intake.give_up_gaps()


def test_of_a_run_that_is_not_known_only_its_own_reports_are_kept_and_only_so_many_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reports, "MAX_STRANGER_BYTES", 4000)
    bench = Bench()
    assert bench.take(envelope(1, uid="uid-9", seed=bytes(32), **MOVED)) == ["forged"]
    notice = {"notice": Notice(reason="Training", message="x" * 1000)}
    assert bench.take(*(envelope(1, uid=f"stranger-{n}", **notice) for n in range(9))) == ["unknown"] * 9
    names = [f"stranger-{n}" for n in range(9)]
    for name in names:
        bench.intake.observe(name, KEY, (0, 0))
    assert [name for name in names if bench.intake.of(name)] == names[-3:]


def test_a_flood_of_forgeries_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING):
        bench.take(*[envelope(1, seed=bytes(32))] * 1000)
    assert len(caplog.records) <= 11
    assert len(bench.forged) <= 11
    assert bench.take(envelope(1)) == ["accepted"]


def test_no_run_can_take_more_memory_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_PENDING", 20)
    bench = Bench()
    notice = {"notice": Notice(reason="Training", message="x")}
    bench.take(*(envelope(n, **notice) for n in range(1, 100)))
    assert bench.pending() == list(range(80, 100))


def test_reports_of_runs_that_are_not_known_yet_are_kept_within_bounds() -> None:
    bench = Bench()
    for stranger in range(300):
        bench.take(*(envelope(n, uid=f"stranger-{stranger}", **MOVED) for n in range(1, 70 if stranger > 297 else 2)))
    bench.intake.observe("stranger-0", RunKey("team", "old"), (0, 0))
    bench.intake.observe("stranger-299", RunKey("team", "new"), (0, 0))
    assert bench.intake.of("stranger-0") == ()
    assert len(bench.intake.of("stranger-299")) == 64
    bench.intake.forget("stranger-299")
    assert bench.intake.of("stranger-299") == ()


def test_ages_tell_the_run_from_the_bus() -> None:
    bench = Bench()
    bench.take(envelope(1))
    bench.now += 4
    bench.take(envelope(2), way="pull")
    bench.now += 1
    assert (bench.intake.age_s(UID, 1), bench.intake.bus_age_s(UID, 0)) == (1, 5)
    assert bench.intake.age_s(UID, 2) is None
    assert bench.intake.bus_age_s(UID, 1) == float("inf")
    assert bench.intake.last_seq(UID, 1, 0) == FIRST + 2
    assert bench.intake.last_seq(UID, 2, 0) == 0


@settings(deadline=None)
@given(st.permutations(list(range(1, 13))), st.sets(st.integers(1, 12)))
def test_the_order_of_arrival_does_not_matter(order: list[int], events: set[int]) -> None:
    bench = Bench()
    bench.take(*(envelope(n, **(MOVED if n in events else {})) for n in order))
    assert bench.pending() == sorted(events | {12})
