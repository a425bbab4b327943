"""When silence is a hang: the short limit, its evidence, and what suspends it."""

import math

import pytest
from esper_leyline.pages import Heartbeat
from esper_leyline.v1 import report_pb2 as pb
from esper_runtime.tolaria.supervisor.hang import LOOK_S, HangLimits, HangWatch, Pulse

LIMITS = HangLimits(heartbeat_s=60.0, progress_s=600.0)
IDLE = Pulse(cpu_s=7.0, io_bytes=1000, wants=False)


class Looker:
    """Looks at a trainer as the supervisor does: when the watch asks, on a clock of its own."""

    def __init__(self, watch: HangWatch | None = None) -> None:
        self.now_s = 0.0 if watch is None else watch.now_s
        self.watch = watch or HangWatch(limits=LIMITS, now_s=0.0)
        self.step = 0
        self.beat: Heartbeat | None = None
        self.pulse: Pulse | None = IDLE
        self.phase: int = pb.RUNTIME_PHASE_RUNNING
        self.validating = False

    def beats(self, *, step: bool) -> None:
        self.step += int(step)
        at_ns = round(self.now_s * 1e9)
        self.beat = Heartbeat(self.step, 1, self.phase, at_ns, 0.5, 1000, 42, 0, self.validating)

    def steps(self, count: int, seconds: float) -> str:
        """Makes steps of this length and looks whenever a look is due; the first verdict, or nothing."""
        for _ in range(count):
            found = self.quiet(seconds)
            if found:
                return found
            self.beats(step=True)
        return ""

    def quiet(self, seconds: float) -> str:
        """Lets time pass without a beat."""
        end_s = self.now_s + seconds
        while (due_s := min(self.watch.look_at_s, self.watch._looked_s + 1.0)) <= end_s:
            self.now_s = max(self.now_s, due_s)
            found = self.look()
            if found:
                return found
        self.now_s = end_s
        return ""

    def look(self) -> str:
        pulse = self.pulse if self.watch.doubts else None
        return self.watch.look(self.beat, now_s=self.now_s, pulse=pulse)

    def noticed_s(self, at_most_s: float = 700.0) -> float:
        """Silence from the newest beat to the verdict."""
        began_s = self.now_s
        assert self.quiet(at_most_s), "never noticed"
        return self.now_s - began_s


@pytest.mark.parametrize("step_s", [0.002, 0.03, 0.3, 1.0, 4.0])
def test_a_quiet_trainer_is_noticed_within_three_steps_and_a_second(step_s: float):
    looker = Looker()
    assert looker.steps(max(100, int(10 / step_s)), step_s) == ""
    assert 3 * step_s < looker.noticed_s() <= 3 * step_s + 1.0


@pytest.mark.parametrize("into_epoch", [1, 8, 15])
def test_epochs_shorter_than_a_look_say_soon_enough_how_long_a_step_takes(into_epoch: int):
    """Nearly half of the time is validation, in which no step is made and nothing is learnt."""
    looker = Looker()
    for _ in range(135):  # five seconds
        looker.validating = False
        assert looker.steps(20, 0.001) == ""
        looker.validating = True
        looker.beats(step=False)
        assert looker.quiet(0.017) == ""
    looker.validating = False
    assert looker.steps(into_epoch, 0.001) == ""
    assert looker.noticed_s() <= 1.0 + 3 * looker.watch.times.p99_s


def test_before_fifty_steps_only_the_heartbeat_limit_counts():
    looker = Looker()
    assert looker.steps(49, 0.1) == ""
    assert looker.watch.limit_s == math.inf
    assert LIMITS.heartbeat_s <= looker.noticed_s() <= LIMITS.heartbeat_s + 2.0


def test_what_was_survived_once_is_survived_again():
    looker = Looker()
    assert looker.steps(20, 0.1) == ""
    assert looker.steps(1, 8.0) == "", "a long silence among the first steps"
    assert looker.steps(600, 0.1) == "", "p99 has forgotten it"
    assert looker.watch.times.p99_s < 1.0
    assert looker.steps(1, 15.0) == ""
    assert looker.noticed_s() > 29.0


WORKING = {
    "processor": Pulse(cpu_s=0.5, io_bytes=0, wants=False),
    "bytes": Pulse(cpu_s=0.0, io_bytes=100_000, wants=False),
    "waits": Pulse(cpu_s=0.0, io_bytes=0, wants=True),
}


@pytest.mark.parametrize("sign", WORKING)
def test_a_slow_step_that_shows_work_is_waited_for_ten_times_as_long(sign: str):
    looker = Looker()
    looker.steps(100, 0.1)
    more, total = WORKING[sign], 0.0

    class Working(Looker):
        def look(self) -> str:
            nonlocal total
            total += 1.0
            self.pulse = Pulse(cpu_s=total * more.cpu_s, io_bytes=int(total * more.io_bytes), wants=more.wants)
            return super().look()

    looker.__class__ = Working
    noticed_s = looker.noticed_s()
    assert 10 * 1.2 <= noticed_s <= 10 * 1.3 + LOOK_S


def test_without_evidence_nobody_is_killed_early():
    looker = Looker()
    looker.steps(100, 0.1)
    looker.pulse = None
    assert looker.noticed_s() > 10.0


def test_work_that_stops_is_noticed():
    looker = Looker()
    looker.steps(100, 0.1)
    looker.pulse = Pulse(cpu_s=1.0, io_bytes=0, wants=True)
    assert looker.quiet(4.0) == ""
    looker.pulse = Pulse(cpu_s=1.0, io_bytes=0, wants=False)
    assert looker.quiet(1.5)


def test_a_verdict_says_what_it_rests_on():
    looker = Looker()
    looker.steps(100, 0.1)
    found = looker.quiet(60.0)
    assert found.startswith("no new step for 1.2")
    assert "and no sign of work after step 100; a step takes 0.1" in found


def test_beats_alone_are_the_business_of_the_progress_limit():
    looker = Looker()
    looker.steps(100, 0.1)
    for _ in range(500):
        assert looker.quiet(1.0) == ""
        looker.beats(step=False)


@pytest.mark.parametrize("how", ["validating", "rolling back", "frozen", "starting"])
def test_phases_that_may_be_long_suspend_the_short_limit(how: str):
    looker = Looker()
    looker.steps(100, 0.1)
    looker.validating = how == "validating"
    if how != "validating":
        phases = {
            "rolling back": pb.RUNTIME_PHASE_ROLLING_BACK,
            "frozen": pb.RUNTIME_PHASE_FROZEN,
            "starting": pb.RUNTIME_PHASE_STARTING,
        }
        looker.phase = phases[how]
    looker.beats(step=False)
    assert looker.quiet(50.0) == ""
    looker.phase, looker.validating = pb.RUNTIME_PHASE_RUNNING, False
    looker.beats(step=True)
    assert looker.watch.times.longest_s < 1.0, "that time was no step"
    assert looker.steps(5, 0.1) == ""


def test_a_container_that_was_frozen_gets_its_limit_again():
    looker = Looker()
    looker.steps(100, 0.1)
    looker.now_s += 3600.0
    assert looker.look() == ""
    looker.now_s += 0.05
    assert looker.look() == "", "two looks cannot make a hang"
    looker.beats(step=True)
    assert looker.quiet(0.5) == ""


def test_a_starved_watcher_counts_little_of_what_it_missed():
    looker = Looker()
    looker.steps(100, 0.1)
    for _ in range(2):
        looker.now_s += 5.0
        assert looker.look() == ""


def test_every_early_verdict_doubles_the_patience_with_the_next_trainer():
    looker = Looker()
    looker.steps(100, 0.1)
    first_s = looker.noticed_s()
    for doubling in (2, 4):
        looker = Looker(looker.watch.successor(now_s=looker.now_s))
        assert looker.watch.limit_s == math.inf, "its own first steps may take long"
        looker.steps(100, 0.1)
        assert looker.noticed_s() == pytest.approx(doubling * first_s, rel=0.2)


def test_deaths_of_another_kind_leave_the_patience_alone():
    looker = Looker()
    looker.steps(100, 0.1)
    assert looker.watch.successor(now_s=looker.now_s).patience == 1.0


def test_the_short_limit_never_exceeds_the_heartbeat_limit():
    looker = Looker()
    looker.steps(60, 25.0)
    assert looker.noticed_s() <= LIMITS.heartbeat_s + 1.0
