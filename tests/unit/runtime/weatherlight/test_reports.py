import dataclasses

import pytest
from esper_leyline.reasons import RunReason, SignalRejection
from esper_leyline.v1.emergency_pb2 import AckStage, EmergencyAck
from esper_leyline.v1.report_pb2 import (
    CheckpointState,
    Completion,
    Counters,
    Degradation,
    Failure,
    NamedMetric,
    Notice,
    Progress,
    Recovery,
    RunReport,
    RuntimePhase,
)
from esper_runtime.weatherlight.reports import Memory, Reporter
from hypothesis import given
from hypothesis import strategies as st

from tests.support.weatherlight import IDENTITY, RUNNING, FakeClock, beat, boot, event, transition

STARTING = RuntimePhase.RUNTIME_PHASE_STARTING
RESTARTING = RuntimePhase.RUNTIME_PHASE_RESTARTING
HALTING = RuntimePhase.RUNTIME_PHASE_HALTING
SUCCEEDED = RuntimePhase.RUNTIME_PHASE_SUCCEEDED


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def reporter(clock):
    """One that has seen a Boot and the first step."""
    made = Reporter(IDENTITY)
    made.event(boot(), clock())
    made.event(transition(RUNNING, STARTING), clock())
    return made


def number(report):
    return report.seq >> 32, report.seq & 0xFFFFFFFF


def test_nothing_is_said_before_boot(clock):
    reporter = Reporter(IDENTITY)
    assert reporter.event(transition(RUNNING), clock()) == []
    assert reporter.beat(beat(1, ns=clock.ns), clock.advance(60)) == []
    assert reporter.degraded("oona", RunReason.BUS_UNAVAILABLE, "gone", clock()) == []
    assert reporter.died(clock()) == []
    [first] = reporter.event(boot(), clock())
    assert number(first) == (1, 1)
    assert [d.component for d in first.degradations] == ["oona"], "what was known before is not lost"


def test_numbers_rise_and_start_anew_with_each_incarnation(clock):
    reporter = Reporter(IDENTITY)
    made = [
        *reporter.event(boot(1), clock()),
        *reporter.event(transition(RUNNING), clock()),
        *reporter.event(boot(2), clock()),
        *reporter.event(transition(RUNNING), clock()),
    ]
    assert [number(report) for report in made] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_a_report_says_who_where_and_when(reporter, clock):
    [report] = reporter.event(transition(RUNNING), clock())
    assert (report.version, report.run, report.attempt, report.rank) == (1, "team/digits", 1, 0)
    assert (report.pod_name, report.node_name) == ("digits-a1-0", "node-1")
    assert report.time.ToNanoseconds() // 1000 == int(clock().time.timestamp() * 1e6)


EVENTS = {
    "transition": transition(RUNNING, STARTING, 7).transition,
    "recovery": Recovery(cause="NonFiniteLoss", from_step=9, to_step=5),
    "saved": CheckpointState(latest_step=5, count=1),
    "ack": EmergencyAck(signal_id="0" * 32, stage=AckStage.ACK_STAGE_SEEN),
    "failure": Failure(reason="TrainerKilled", exit_code=137),
    "completion": Completion(export_path="x/export"),
    "notice": Notice(reason="FaultInjected", message="as asked"),
}


@pytest.mark.parametrize("name", EVENTS)
def test_each_event_of_history_is_one_report_with_that_event(reporter, clock, name):
    content = EVENTS[name]
    [report] = reporter.event(event(**{"checkpoint" if name == "saved" else name: content}), clock())
    assert report.WhichOneof("event") == name
    found = getattr(report, name)
    for field, value in content.ListFields():
        assert getattr(found, field.name) == value


def test_an_event_without_a_time_of_its_own_gets_that_of_its_frame(reporter, clock):
    frame = transition(RUNNING)
    [report] = reporter.event(frame, clock())
    assert report.transition.time == frame.time


def test_state_accumulates_and_every_later_report_carries_it(reporter, clock):
    reporter.event(event(checkpoint=CheckpointState(latest_step=5)), clock())
    reporter.event(
        event(epoch=Progress(step=8, total_epochs=3, metrics=[NamedMetric(name="validation_accuracy", value=0.9)])),
        clock(),
    )
    reporter.event(event(degradation=Degradation(component="tamiyo", degraded=True, reason="SidecarDown")), clock())
    [report] = reporter.event(event(notice=Notice(reason="x"), counters=Counters(rollbacks=2)), clock())
    assert report.phase == RUNNING
    assert report.checkpoint.latest_step == 5
    assert (report.progress.step, report.progress.metrics[0].value) == (8, 0.9)
    assert [d.component for d in report.degradations] == ["tamiyo"]
    assert report.counters.rollbacks == 2
    [later] = reporter.event(event(degradation=Degradation(component="tamiyo", degraded=False)), clock())
    assert not later.degradations


def test_each_report_names_the_event_before_it(reporter, clock):
    [one] = reporter.event(event(notice=Notice(reason="a")), clock())
    [plain] = reporter.beat(beat(1, ns=clock.ns), clock.advance(6))
    [two] = reporter.event(event(notice=Notice(reason="b")), clock())
    assert plain.previous_event_seq == one.seq
    assert two.previous_event_seq == one.seq
    [three] = reporter.event(event(notice=Notice(reason="c")), clock())
    assert three.previous_event_seq == two.seq


def test_progress_is_told_once_a_second_while_the_step_changes(reporter, clock):
    told = []
    for step in range(40):  # ten seconds of looks
        told += reporter.beat(beat(step, ns=clock.ns), clock.advance(0.25))
    assert len(told) == 10
    assert told[-1].progress.step == 39


def test_a_standing_step_gives_a_heartbeat_every_five_seconds(reporter, clock):
    told = []
    for _ in range(80):  # twenty seconds of looks
        told += reporter.beat(beat(0, ns=clock.ns), clock.advance(0.25))
    assert len(told) == 4


def test_the_age_of_the_heartbeat_tells_a_silent_trainer(reporter, clock):
    seen = beat(3, ns=clock.ns)
    reporter.beat(seen, clock())
    [report] = reporter.beat(seen, clock.advance(7))
    assert report.heartbeat_age_ms == pytest.approx(7000)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_not_reported_as_one(reporter, clock, loss):
    reporter.beat(beat(1, ns=clock.ns, loss=0.25), clock.advance(1))
    [report] = reporter.beat(beat(2, ns=clock.ns, loss=loss), clock.advance(1))
    assert report.progress.loss == 0.25


def test_the_step_of_a_restoring_trainer_is_no_progress(reporter, clock):
    reporter.beat(beat(50, ns=clock.ns), clock.advance(1))
    reporter.event(transition(RESTARTING, RUNNING), clock())
    [report] = reporter.beat(beat(0, ns=clock.ns, phase=STARTING), clock.advance(6))
    assert report.progress.step == 50
    reporter.event(event(recovery=Recovery(to_step=40)), clock())
    [report] = reporter.beat(beat(0, ns=clock.ns, phase=STARTING), clock.advance(6))
    assert report.progress.step == 40


def test_an_epoch_that_is_read_late_does_not_turn_the_step_back(reporter, clock):
    reporter.beat(beat(120, ns=clock.ns), clock())
    [report] = reporter.event(event(monotonic_ns=clock.ns - 1, epoch=Progress(step=100, total_epochs=3)), clock())
    assert (report.progress.step, report.progress.total_epochs) == (120, 3)


def test_an_event_may_be_ahead_of_the_last_look_at_the_page(reporter, clock):
    reporter.beat(beat(120, ns=clock.ns), clock())
    moved = transition(HALTING, RUNNING)
    moved.transition.step, moved.monotonic_ns = 123, clock.ns + 1
    [report] = reporter.event(moved, clock())
    assert report.progress.step == 123
    moved.transition.step, moved.monotonic_ns = 119, clock.ns - 1
    [report] = reporter.event(moved, clock())
    assert report.progress.step == 123


def test_a_container_death_is_failure_and_transition_in_that_order_and_once(reporter, clock):
    reporter.beat(beat(12, ns=clock.ns), clock())
    failure, moved = reporter.died(clock())
    assert (failure.failure.reason, failure.failure.step) == (RunReason.CONTAINER_DIED, 12)
    assert (moved.transition.from_phase, moved.transition.to_phase, moved.phase) == (RUNNING, RESTARTING, RESTARTING)
    assert reporter.died(clock()) == []


def test_a_container_that_ended_its_work_does_not_die(reporter, clock):
    reporter.event(transition(SUCCEEDED, RUNNING), clock())
    assert not reporter.expects_supervisor
    assert reporter.died(clock()) == []


def test_the_next_container_may_die_again(reporter, clock):
    reporter.died(clock())
    reporter.event(boot(2), clock())
    assert len(reporter.died(clock())) == 2


def test_a_supervisor_that_returns_takes_its_death_back(reporter, clock):
    reporter.died(clock())
    [report] = reporter.returned(1, clock())
    assert (report.transition.to_phase, report.transition.reason) == (RUNNING, RunReason.RESUMED)
    assert reporter.returned(1, clock()) == []
    assert len(reporter.died(clock())) == 2, "it may still die for good"


def test_a_new_container_takes_nothing_back(reporter, clock):
    reporter.died(clock())
    assert reporter.returned(2, clock()) == []
    assert reporter.phase == RESTARTING


def test_degradations_are_told_when_they_change_only(reporter, clock):
    assert len(reporter.degraded("oona", RunReason.BUS_UNAVAILABLE, "gone", clock())) == 1
    assert reporter.degraded("oona", RunReason.BUS_UNAVAILABLE, "still gone", clock()) == []
    assert len(reporter.restored("oona", clock())) == 1
    assert reporter.restored("oona", clock()) == []


def test_a_new_container_forgets_what_the_old_trainer_missed_and_keeps_our_own(reporter, clock):
    reporter.event(event(degradation=Degradation(component="tamiyo", degraded=True)), clock())
    reporter.degraded("oona", RunReason.BUS_UNAVAILABLE, "gone", clock())
    [report] = reporter.event(boot(2), clock())
    assert [d.component for d in report.degradations] == ["oona"]


def test_rejections_are_all_counted_and_noticed_at_intervals(reporter, clock):
    [first] = reporter.rejected(SignalRejection.INVALID_SIGNATURE, "redis", clock())
    assert first.notice.warning
    assert "invalid_signature" in first.notice.message
    for _ in range(500):
        assert reporter.rejected(SignalRejection.INVALID_SIGNATURE, "redis", clock()) == []
    [later] = reporter.rejected(SignalRejection.REPLAYED, "redis", clock.advance(11))
    assert "500 more" in later.notice.message
    assert later.counters.rejected_signals == 502


def test_giant_texts_and_lists_of_the_trainer_are_cut(reporter, clock):
    frame = event(failure=Failure(message="ä" * 5000), counters=Counters())
    [report] = reporter.event(frame, clock())
    assert len(report.failure.message.encode()) <= 2048
    metrics = [NamedMetric(name="m" * 3000, value=1.0)] * 500
    [report] = reporter.event(event(epoch=Progress(metrics=metrics)), clock())
    assert len(report.progress.metrics) == 32
    assert report.ByteSize() < 100_000
    for n in range(100):
        reporter.event(event(degradation=Degradation(component=f"c{n}", degraded=True)), clock())
    [report] = reporter.event(event(notice=Notice()), clock())
    assert len(report.degradations) == 16


# --- over a restart of the process -------------------------------------------------------------------------------

HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.just("boot"), st.integers(1, 3)),
        st.tuples(st.just("transition"), st.sampled_from([RUNNING, RESTARTING, SUCCEEDED])),
        st.tuples(st.just("notice"), st.just(0)),
        st.tuples(st.just("beat"), st.integers(0, 100)),
        st.tuples(st.just("died"), st.just(0)),
        st.tuples(st.just("rejected"), st.just(0)),
        st.tuples(st.just("degraded"), st.sampled_from(["oona", "emergency"])),
        st.tuples(st.just("restored"), st.sampled_from(["oona", "emergency"])),
        st.tuples(st.just("counters"), st.integers(0, 9)),
        st.tuples(st.just("restart"), st.just(0)),
    ),
    max_size=40,
)


def happen(reporter, clock, what, value):
    match what:
        case "boot":
            return reporter.event(boot(value), clock())
        case "transition":
            return reporter.event(transition(value), clock())
        case "notice":
            return reporter.event(event(notice=Notice(reason="x")), clock())
        case "beat":
            return reporter.beat(beat(value, ns=clock.ns), clock.advance(2))
        case "died":
            return reporter.died(clock())
        case "rejected":
            return reporter.rejected(SignalRejection.REPLAYED, "redis", clock.advance(20))
        case "degraded":
            return reporter.degraded(value, RunReason.BUS_UNAVAILABLE, "gone", clock())
        case "restored":
            return reporter.restored(value, clock())
        case "counters":
            return reporter.event(event(notice=Notice(), counters=Counters(rollbacks=value)), clock())
    raise AssertionError(what)


@given(HAPPENINGS)
def test_numbers_always_rise_and_no_event_goes_unmentioned_over_any_restarts(happenings):
    clock = FakeClock()
    reporter, made = Reporter(IDENTITY), []
    for what, value in happenings:
        if what == "restart":
            reporter = Reporter(IDENTITY, last=made[-1] if made else None, memory=reporter.memory)
        else:
            made += happen(reporter, clock, what, value)
    seqs = [report.seq for report in made]
    assert seqs == sorted(set(seqs))
    newest_event = 0
    for report in made:
        assert report.previous_event_seq == newest_event
        if report.WhichOneof("event"):
            newest_event = report.seq


@given(HAPPENINGS.filter(bool), st.integers(0, 40))
def test_a_restart_forgets_no_state(happenings, at):
    """The report after a restart equals the report without one, but for what only the process knew."""
    clock = FakeClock()
    reporter = Reporter(IDENTITY)
    made = []
    for what, value in [("boot", 1), *happenings[:at]]:
        if what != "restart":
            made += happen(reporter, clock, what, value)
    assert made
    [before] = reporter.event(event(notice=Notice(reason="x")), clock())
    resumed = Reporter(IDENTITY, last=before, memory=reporter.memory)
    [left] = reporter.event(transition(RUNNING), clock())
    [right] = resumed.event(transition(RUNNING), clock())
    for report in (left, right):
        report.ClearField("heartbeat_age_ms")
        report.transition.ClearField("time")
    assert left == right


def test_memory_is_what_a_restart_needs_besides_the_newest_report():
    assert {field.name for field in dataclasses.fields(Memory)} == {"dead_incarnation", "rejected_signals"}
    assert Reporter(IDENTITY, last=RunReport(seq=(2 << 32) | 9)).incarnation == 2
