"""The supervisor's decisions over time, told by hand: deaths, hangs, drains and halts."""

import signal

import hypothesis.strategies as st
import pytest
from esper_leyline.exitcodes import ExitCode
from esper_leyline.pages import EmergencyRecord, Heartbeat
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import (
    EMERGENCY_MODE_CHECKPOINT,
    EMERGENCY_MODE_FREEZE,
    EMERGENCY_MODE_KILL,
)
from esper_runtime.tolaria.supervisor import core
from esper_runtime.tolaria.supervisor.core import DUMP_S, Core, Stage
from esper_runtime.tolaria.supervisor.hang import HangLimits, Pulse
from esper_runtime.tolaria.supervisor.policy import RestartPolicy
from hypothesis import given

HEARTBEAT_S, PROGRESS_S, DRAIN_S = 10.0, 100.0, 28.0
KILLED = -signal.SIGKILL
REFUSAL = "[Errno 11] Resource temporarily unavailable"


def beat(step: int, at_s: float, *, phase: int = pb.RUNTIME_PHASE_RUNNING, order: int = 0) -> Heartbeat:
    return Heartbeat(step, 1, phase, int(at_s * 1e9), 0.5, 1000, 4242, order)


def halt(mode: int, *, seq: int = 1, attempt: int = 0, clear: bool = False) -> EmergencyRecord:
    return EmergencyRecord(
        term=1, seq=seq, mode=mode, clear=clear, attempt=attempt, signal_id="ab" * 16, arrived_ns=1, source=1
    )


class Watched:
    """A core whose trainer has started at time 0, and a clock moved by hand in looks of one second."""

    def __init__(self, strategy: str = "Auto") -> None:
        self.now_s = 0.0
        self.core = Core(
            attempt=1,
            policy=RestartPolicy(strategy=strategy),
            limits=HangLimits(heartbeat_s=HEARTBEAT_S, progress_s=PROGRESS_S),
            drain_s=DRAIN_S,
            now_s=0.0,
        )
        assert self.core.tick(None, now_s=0.0) == [core.Start()]

    def look(self, last: Heartbeat | None, seconds: float) -> list[core.Action]:
        """Looks once a second while the trainer's page stays as it is."""
        found: list[core.Action] = []
        for _ in range(int(seconds)):
            self.now_s += 1.0
            found += self.core.tick(last, now_s=self.now_s)
        return found

    def steps(self, first: int, count: int, **more: int) -> list[core.Action]:
        found: list[core.Action] = []
        for step in range(first, first + count):
            self.now_s += 1.0
            found += self.core.tick(beat(step, self.now_s, **more), now_s=self.now_s)
        return found

    def dies(self, status: int) -> list[core.Action]:
        return self.core.died(status, now_s=self.now_s)

    def refused(self) -> list[core.Action]:
        """The start that was just asked for."""
        return self.core.refused(REFUSAL, now_s=self.now_s)

    def refused_when_due(self) -> list[core.Action]:
        self.now_s = max(self.now_s, self.core.deadline_s)
        assert isinstance(self.core.tick(None, now_s=self.now_s)[-1], core.Start)
        return self.refused()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_death_is_reported_and_answered_by_a_start_at_once(watched: Watched):
    assert watched.steps(1, 5) == []
    report, start = watched.dies(KILLED)
    assert isinstance(report, core.ReportRestart)
    assert (report.death.cause, report.death.exit_code, report.death.step, report.number) == (
        RunReason.TRAINER_KILLED, 137, 5, 1,
    )  # fmt: skip
    assert start == core.Start(recovery=core.Recovery(cause=RunReason.TRAINER_KILLED, detected_s=5.0, step=5))


def test_deaths_without_a_new_step_are_answered_ever_later_and_then_by_the_end(watched: Watched):
    watched.steps(1, 5)
    assert isinstance(watched.dies(KILLED)[-1], core.Start)
    watched.steps(4, 1)
    assert isinstance(watched.dies(1)[-1], core.Start), "the first fruitless one is answered at once too"
    watched.steps(4, 1)
    [report] = watched.dies(1)
    assert isinstance(report, core.ReportRestart)
    assert report.restart.delay_s == 1.0
    assert watched.core.stage is Stage.WAITING
    assert watched.core.tick(None, now_s=watched.now_s + 0.9) == []
    assert isinstance(watched.core.tick(None, now_s=watched.now_s + 1.0)[0], core.Start)
    watched.steps(4, 1)
    [finish] = watched.dies(1)
    assert isinstance(finish, core.Finish)
    assert (finish.end.exit_code, finish.end.reason) == (ExitCode.TRAINER_CRASHED, RunReason.RESTARTS_EXHAUSTED)
    assert watched.core.stage is Stage.ENDED


def test_a_trainer_that_moves_on_may_die_without_end(watched: Watched):
    for number in range(20):
        watched.steps(10 * number, 3)
        assert isinstance(watched.dies(KILLED)[-1], core.Start)


@pytest.mark.parametrize("code", [0, 71, 72, 73, 74, 75, 78, 143], ids=lambda code: ExitCode(code).name.lower())
def test_what_the_trainer_means_ends_the_container(watched: Watched, code: int):
    watched.steps(1, 2)
    [finish] = watched.dies(code)
    assert isinstance(finish, core.Finish)
    assert finish.end.exit_code == code


def test_a_start_that_the_system_refuses_is_tried_again_like_one_that_died(watched: Watched):
    watched.steps(1, 5)
    _, start = watched.dies(KILLED)
    report, again = watched.refused()
    assert isinstance(report, core.ReportRestart)
    assert (report.death.cause, report.death.exit_code, report.death.step) == (RunReason.TRAINER_CRASHED, 0, None)
    assert report.death.words == f"trainer could not be started: {REFUSAL}"
    assert again == start, "what the next one recovers from is still the death before"
    [report] = watched.refused()
    assert isinstance(report, core.ReportRestart)
    assert report.restart.delay_s == 1.0
    assert watched.core.tick(None, now_s=watched.now_s + 0.9) == []
    assert watched.core.tick(None, now_s=watched.now_s + 1.0) == [start]
    assert watched.core.restarts == 1, "no trainer followed another but the first"


def test_starts_that_are_refused_use_up_the_budget_of_crashes(watched: Watched):
    watched.steps(1, 5)
    watched.dies(KILLED)
    watched.steps(4, 1)
    watched.dies(1)
    watched.refused()
    [finish] = watched.refused_when_due()
    assert isinstance(finish, core.Finish)
    assert (finish.end.exit_code, finish.end.reason) == (ExitCode.TRAINER_CRASHED, RunReason.RESTARTS_EXHAUSTED)
    assert finish.end.message == f"trainer could not be started: {REFUSAL}; 3 starts in a row made no new step"


def test_a_first_start_that_is_refused_makes_the_next_one_no_recovery(watched: Watched):
    assert watched.refused()[-1] == core.Start(recovery=None)


def test_recreate_leaves_a_refused_start_to_the_operator_too():
    [finish] = Watched("Recreate").refused()
    assert isinstance(finish, core.Finish)
    assert (finish.end.exit_code, finish.end.reason) == (ExitCode.TRAINER_CRASHED, RunReason.TRAINER_CRASHED)


def test_recreate_leaves_every_death_to_the_operator():
    watched = Watched("Recreate")
    watched.steps(1, 2)
    [finish] = watched.dies(KILLED)
    assert isinstance(finish, core.Finish)
    assert (finish.end.exit_code, finish.end.reason) == (ExitCode.TRAINER_CRASHED, RunReason.TRAINER_KILLED)


def test_silence_is_a_hang_that_dumps_and_then_kills(watched: Watched):
    watched.steps(1, 5)
    last = beat(5, watched.now_s)
    assert watched.look(last, HEARTBEAT_S) == []
    [dump] = watched.look(last, 1)
    assert isinstance(dump, core.DumpStacks)
    assert "no heartbeat for 10 s (health.heartbeatTimeoutSeconds) at step 5" in dump.why
    assert watched.core.deadline_s == watched.now_s + DUMP_S
    [kill] = watched.look(last, DUMP_S)
    assert isinstance(kill, core.Kill)
    report, start = watched.dies(KILLED)
    assert isinstance(report, core.ReportRestart)
    assert report.death.cause == RunReason.HANG
    assert isinstance(start, core.Start)
    assert watched.core.hangs == 1


def test_beats_without_steps_are_a_hang_unless_it_validates(watched: Watched):
    def alive(seconds: float, **more: bool) -> list[core.Action]:
        found: list[core.Action] = []
        for _ in range(int(seconds)):
            watched.now_s += 1.0
            one = Heartbeat(7, 1, pb.RUNTIME_PHASE_RUNNING, int(watched.now_s * 1e9), 0.5, 1000, 4242, 0, **more)
            found += watched.core.tick(one, now_s=watched.now_s)
        return found

    assert alive(10 * PROGRESS_S, validating=True) == []
    assert alive(PROGRESS_S) == []
    [dump] = alive(1)
    assert isinstance(dump, core.DumpStacks)
    assert "health.progressTimeoutSeconds" in dump.why


@pytest.mark.parametrize(
    "phase", [pb.RUNTIME_PHASE_STARTING, pb.RUNTIME_PHASE_FROZEN, pb.RUNTIME_PHASE_HALTING], ids=pb.RuntimePhase.Name
)
def test_some_phases_may_take_their_time(watched: Watched, phase: int):
    watched.steps(1, 1)
    assert watched.look(beat(1, watched.now_s, phase=phase), 1000) == []


def test_time_in_which_the_supervisor_itself_stood_still_does_not_count(watched: Watched):
    watched.steps(1, 5)
    last = beat(5, watched.now_s)
    assert watched.look(last, HEARTBEAT_S - 3) == []
    watched.now_s += 3600.0  # the whole container was frozen
    assert watched.core.tick(last, now_s=watched.now_s) == []
    assert watched.steps(6, 3) == []


def test_a_stop_terminates_and_kills_when_the_grace_is_nearly_over(watched: Watched):
    watched.steps(1, 5)
    assert watched.core.stop(now_s=5.0) == [core.Terminate()]
    assert watched.core.stop(now_s=6.0) == [], "a second SIGTERM changes nothing"
    assert watched.core.deadline_s == 5.0 + DRAIN_S
    busy = beat(5, 5.0, phase=pb.RUNTIME_PHASE_STOPPING)
    assert watched.core.tick(busy, now_s=5.0 + DRAIN_S - 0.1) == []
    [kill] = watched.core.tick(busy, now_s=5.0 + DRAIN_S)
    assert isinstance(kill, core.Kill)
    [finish] = watched.dies(KILLED)
    assert isinstance(finish, core.Finish)
    assert (finish.end.exit_code, finish.end.reason) == (ExitCode.DRAINED, RunReason.DRAINED)


def test_a_silent_trainer_that_saves_at_the_end_is_no_hang(watched: Watched):
    watched.steps(1, 5)
    watched.core.stop(now_s=watched.now_s)
    assert watched.look(beat(5, watched.now_s), HEARTBEAT_S + 5) == []


def test_a_stop_between_two_trainers_ends_at_once(watched: Watched):
    watched.steps(1, 5)
    for _ in range(3):
        watched.dies(1)
    assert watched.core.stage is Stage.WAITING
    [finish] = watched.core.stop(now_s=watched.now_s)
    assert isinstance(finish, core.Finish)
    assert finish.end.exit_code == ExitCode.DRAINED
    assert watched.core.tick(None, now_s=watched.now_s + 60) == []


@pytest.mark.parametrize("stage", ["alive", "waiting"])
def test_kill_stops_at_once_and_is_acknowledged(watched: Watched, stage: str):
    watched.steps(1, 5)
    if stage == "waiting":
        watched.dies(1)
        watched.dies(1)
        watched.dies(1)
        assert watched.core.stage is Stage.WAITING
    order = halt(EMERGENCY_MODE_KILL)
    actions = watched.core.signalled(order, now_s=watched.now_s)
    if stage == "alive":
        assert actions == [core.Kill(why="emergency stop")]
        actions = watched.dies(KILLED)
    acknowledge, finish = actions
    assert acknowledge == core.Acknowledge(record=order)
    assert isinstance(finish, core.Finish)
    assert (finish.end.exit_code, finish.end.reason) == (ExitCode.HALTED, RunReason.EMERGENCY_STOP)


def test_a_training_that_completed_before_the_kill_reached_it_is_complete(watched: Watched):
    watched.steps(1, 5)
    watched.core.signalled(halt(EMERGENCY_MODE_KILL), now_s=watched.now_s)
    [finish] = watched.dies(0)
    assert isinstance(finish, core.Finish)
    assert finish.end.exit_code == ExitCode.COMPLETE


@pytest.mark.parametrize(
    "record",
    [
        halt(EMERGENCY_MODE_KILL, attempt=2),
        halt(EMERGENCY_MODE_KILL, clear=True),
        halt(EMERGENCY_MODE_FREEZE),
        halt(EMERGENCY_MODE_CHECKPOINT),
    ],
    ids=["another attempt", "a clear", "freeze", "checkpoint"],
)
def test_what_is_not_the_supervisors_business_is_left_to_the_trainer(watched: Watched, record: EmergencyRecord):
    watched.steps(1, 5)
    assert watched.core.signalled(record, now_s=watched.now_s) == []
    assert watched.steps(6, 20, order=record.order) == []


def test_a_checkpoint_that_a_hung_trainer_cannot_make_becomes_a_kill(watched: Watched):
    watched.steps(1, 5)
    last = beat(5, watched.now_s)
    watched.core.signalled(halt(EMERGENCY_MODE_CHECKPOINT), now_s=watched.now_s)
    actions = watched.look(last, HEARTBEAT_S + 1)
    assert [type(action) for action in actions] == [core.Kill]
    acknowledge, finish = watched.dies(KILLED)
    assert isinstance(acknowledge, core.Acknowledge)
    assert isinstance(finish, core.Finish)


def test_a_checkpoint_that_takes_long_is_waited_for(watched: Watched):
    watched.steps(1, 5)
    order = halt(EMERGENCY_MODE_CHECKPOINT)
    watched.core.signalled(order, now_s=watched.now_s)
    saving = beat(5, watched.now_s, phase=pb.RUNTIME_PHASE_HALTING, order=order.order)
    assert watched.look(saving, 20 * HEARTBEAT_S) == []


EVENTS = st.one_of(
    st.tuples(st.just("beat"), st.integers(0, 30)),
    st.tuples(st.just("silence"), st.integers(1, 30)),
    st.tuples(st.just("dies"), st.sampled_from([0, 1, 70, 71, 75, 143, -9, -11])),
    st.tuples(st.just("refuse"), st.integers(1, 4)),
    st.tuples(st.just("stop"), st.just(0)),
    st.tuples(
        st.just("signal"), st.sampled_from([EMERGENCY_MODE_FREEZE, EMERGENCY_MODE_CHECKPOINT, EMERGENCY_MODE_KILL])
    ),
)


@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_there_is_one_trainer_at_most_and_one_end(events: list[tuple[str, int]]):
    watched = Watched()
    lives, ends, last, refusals = True, 0, None, 0
    for seq, (what, value) in enumerate(events, start=1):
        match what:
            case "beat":
                last = beat(value, watched.now_s + 1)
                actions = watched.look(last, 1)
            case "silence":
                actions = watched.look(last, value)
            case "dies" if lives:
                lives = False
                actions = watched.dies(value)
            case "refuse":
                refusals, actions = value, []
            case "stop":
                actions = watched.core.stop(now_s=watched.now_s)
            case "signal":
                actions = watched.core.signalled(halt(value, seq=seq), now_s=watched.now_s)
            case _:
                actions = []
        for action in actions:
            assert not ends, "nothing follows the end"
            if isinstance(action, core.Start):
                assert not lives
                lives, last = refusals == 0, None
                if refusals:
                    refusals -= 1
                    actions += watched.refused()
            elif isinstance(action, core.Terminate | core.DumpStacks | core.Kill):
                assert lives, "signals go to a trainer that is there"
            ends += isinstance(action, core.Finish)
        assert not (ends and lives)
    assert ends <= 1


def patient() -> Core:
    """With the limits of a real run, its trainer started at time 0."""
    limits = HangLimits(heartbeat_s=60, progress_s=600)
    made = Core(attempt=1, policy=RestartPolicy(), limits=limits, drain_s=DRAIN_S, now_s=0.0)
    made.tick(None, now_s=0.0)
    return made


def test_a_trainer_that_steps_again_before_its_kill_is_let_live() -> None:
    """It was slow, as a loader that waits for the network is; the next verdict has to wait longer."""
    watched = patient()
    now, step = 0.0, 0
    while now < 20:
        now, step = now + 0.01, step + 1
        newest = beat(step, now)
        watched.tick(newest, now_s=now)
    idle = Pulse(cpu_s=1.0, io_bytes=0, wants=False)
    said: list[core.Action] = []
    while not said:
        now += 0.05
        said = watched.tick(newest, now_s=now, pulse=idle if watched.doubts else None)
    assert isinstance(said[0], core.DumpStacks)
    for _ in range(300):
        now, step = now + 0.01, step + 1
        assert watched.tick(beat(step, now), now_s=now) == []


def test_a_far_rollback_does_not_make_the_next_lives_fruitless() -> None:
    watched = patient()
    now = 0.0
    for life in ((4990, 5000), (4991, 4995, 100, 1100), (1095, 2100), (2095, 3100)):
        for step in life:
            now += 1
            watched.tick(beat(step, now), now_s=now)
        assert any(isinstance(action, core.ReportRestart) for action in watched.died(-9, now_s=now)), life
        now += 5
        watched.tick(None, now_s=now)
