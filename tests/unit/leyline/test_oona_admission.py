"""Where a message goes and whether it may: by its own priority, the pressure, and the rates of the emergency stream."""

import itertools

import pytest
from esper_leyline.oona import EMERGENCY, NORMAL, POLICY, REPORTS, TELEMETRY, Admission, Pressure, route, signals
from esper_leyline.oona.admission import (
    CALM_S,
    CRITICAL_PER_MINUTE,
    HIGH_DEPTH,
    HIGH_PER_MINUTE,
    RECOVERY_DEPTH,
    SOFT_DEPTH,
    PressureGauge,
    Verdict,
)
from esper_leyline.v1 import common_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

LOW, NORMAL_, HIGH, CRITICAL = (
    getattr(pb, f"MESSAGE_PRIORITY_{name}") for name in ("LOW", "NORMAL", "HIGH", "CRITICAL")
)
PRIORITIES = (LOW, NORMAL_, HIGH, CRITICAL)
TELE, SIGNAL = pb.BUS_MESSAGE_TYPE_TELEMETRY, pb.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL
CONTROL = (
    pb.BUS_MESSAGE_TYPE_POLICY_UPDATE,
    pb.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST,
    pb.BUS_MESSAGE_TYPE_FIELD_REPORT,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def at(pressure):
    return lambda: pressure


@pytest.mark.row("K11", "T29")
@pytest.mark.parametrize(
    ("kind", "priority", "streams"),
    [
        (TELE, LOW, (TELEMETRY,)),
        (TELE, NORMAL_, (TELEMETRY,)),
        (TELE, HIGH, (EMERGENCY,)),
        (TELE, CRITICAL, (EMERGENCY,)),
        *((SIGNAL, priority, (signals("u"), EMERGENCY)) for priority in PRIORITIES),
        *((pb.BUS_MESSAGE_TYPE_FIELD_REPORT, priority, (NORMAL,)) for priority in PRIORITIES),
        *((pb.BUS_MESSAGE_TYPE_POLICY_UPDATE, priority, (POLICY,)) for priority in PRIORITIES),
        *((pb.BUS_MESSAGE_TYPE_RUN_REPORT, priority, (REPORTS,)) for priority in PRIORITIES),
    ],
)
def test_type_and_priority_alone_say_where_a_message_goes(kind, priority, streams):
    assert route(kind, priority, "u") == streams


@pytest.mark.row("K12")
@pytest.mark.parametrize("priority", [0, 5, -1])
def test_a_message_without_priority_goes_nowhere(priority):
    with pytest.raises(ValueError, match="needs a priority"):
        route(TELE, priority, "u")


@pytest.mark.parametrize("kind", [0, 20, 999])
def test_a_type_that_does_not_travel_is_refused(kind):
    with pytest.raises(ValueError, match="do not travel"):
        route(kind, NORMAL_, "u")


@given(
    st.sampled_from([SIGNAL, TELE, *CONTROL, pb.BUS_MESSAGE_TYPE_RUN_REPORT, pb.BUS_MESSAGE_TYPE_SYSTEM_STATE]),
    st.sampled_from(list(Pressure)),
)
def test_critical_always_passes(kind, pressure):
    assert Admission(Clock()).judge(kind, CRITICAL, at(pressure)) is Verdict.ADMIT


@pytest.mark.row("K39")
@pytest.mark.parametrize("kind", CONTROL)
def test_a_control_message_is_never_dropped_but_refused_under_high_pressure(kind):
    admission = Admission(Clock())
    verdicts = [admission.judge(kind, NORMAL_, at(pressure)) for pressure in Pressure]
    assert verdicts == [Verdict.ADMIT, Verdict.ADMIT, Verdict.REFUSE]


@pytest.mark.row("K39")
def test_low_goes_first_then_normal_and_high_never():
    admission = Admission(Clock())
    seen = {
        (pressure, priority): [admission.judge(TELE, priority, at(pressure)) for _ in range(4)]
        for pressure, priority in itertools.product(Pressure, (LOW, NORMAL_, HIGH))
    }
    drop, admit = Verdict.DROP, Verdict.ADMIT
    assert seen[Pressure.NONE, LOW] == seen[Pressure.SOFT, NORMAL_] == [admit] * 4
    assert seen[Pressure.SOFT, LOW] == [drop, admit] * 2
    assert seen[Pressure.HIGH, LOW] == seen[Pressure.HIGH, NORMAL_] == [drop] * 4
    assert all(seen[pressure, HIGH] == [admit] * 4 for pressure in Pressure)


def test_high_telemetry_over_its_rate_is_demoted_and_comes_back_with_time():
    clock = Clock()
    admission = Admission(clock)
    verdicts = [admission.judge(TELE, HIGH, at(Pressure.NONE)) for _ in range(HIGH_PER_MINUTE + 1)]
    assert verdicts == [Verdict.ADMIT] * HIGH_PER_MINUTE + [Verdict.DEMOTE]
    clock.now += 60.0 / HIGH_PER_MINUTE
    assert admission.judge(TELE, HIGH, at(Pressure.NONE)) is Verdict.ADMIT
    assert admission.judge(SIGNAL, HIGH, at(Pressure.NONE)) is Verdict.ADMIT, "signals have no rate"


def test_critical_telemetry_over_its_hard_cap_is_counted_until_one_passes():
    clock = Clock()
    admission = Admission(clock)
    for _ in range(CRITICAL_PER_MINUTE):
        assert admission.judge(TELE, CRITICAL, at(Pressure.NONE)) is Verdict.ADMIT
    assert [admission.judge(TELE, CRITICAL, at(Pressure.NONE)) for _ in range(3)] == [Verdict.COALESCE] * 3
    assert admission.coalesced == 3
    clock.now += 1.0
    assert admission.judge(TELE, CRITICAL, at(Pressure.NONE)) is Verdict.ADMIT


def test_pressure_rises_at_once_and_falls_late():
    clock = Clock()
    gauge = PressureGauge(clock)
    assert [gauge.see(depth) for depth in (SOFT_DEPTH - 1, SOFT_DEPTH, HIGH_DEPTH)] == list(Pressure)
    clock.now += CALM_S
    assert gauge.see(RECOVERY_DEPTH) is Pressure.HIGH
    assert gauge.see(RECOVERY_DEPTH - 1) is Pressure.NONE
    gauge.see(SOFT_DEPTH)
    clock.now += CALM_S - 1
    assert gauge.see(0) is Pressure.SOFT


@given(st.lists(st.tuples(st.integers(0, 12_000), st.floats(0, 100)), max_size=50))
def test_pressure_is_never_below_what_the_depth_asks_for(steps):
    clock = Clock()
    gauge = PressureGauge(clock)
    for depth, seconds in steps:
        clock.now += seconds
        found = gauge.see(depth).level
        assert found >= (1.0 if depth >= HIGH_DEPTH else 0.5 if depth >= SOFT_DEPTH else 0.0)
