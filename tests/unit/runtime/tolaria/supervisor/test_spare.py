"""When a spare trainer is due, and when memory forbids it."""

import os
import resource
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
from esper_runtime.tolaria.supervisor import room
from esper_runtime.tolaria.supervisor.room import Room
from esper_runtime.tolaria.supervisor.spare import (
    BACKOFF_S,
    FAILURE_LIMIT,
    SETTLE_S,
    SHORTAGE_BACKOFF_S,
    SparePolicy,
    Spares,
)
from hypothesis import given

GIB = 1 << 30


def test_a_spare_is_due_once_training_has_settled():
    policy = SparePolicy()
    assert not policy.due(now_s=100.0, trained_s=None)
    assert not policy.due(now_s=100.0, trained_s=0.0)
    assert not policy.due(now_s=100.0, trained_s=SETTLE_S - 0.1)
    assert policy.due(now_s=100.0, trained_s=SETTLE_S)


def test_a_strategy_without_restarts_in_place_wants_none():
    assert not SparePolicy(strategy_allows=False).due(now_s=100.0, trained_s=100.0)


def test_failures_are_answered_ever_later_and_then_no_more():
    policy, now_s = SparePolicy(), 0.0
    for failure in range(FAILURE_LIMIT):
        assert not policy.given_up
        assert policy.due(now_s=now_s, trained_s=100.0)
        policy = policy.failed(now_s=now_s)
        wait_s = BACKOFF_S * 2**failure
        assert not policy.due(now_s=now_s + wait_s - 0.1, trained_s=100.0)
        now_s += wait_s
    assert policy.given_up
    assert not policy.due(now_s=now_s + 1e6, trained_s=1e6)


def test_a_ready_spare_forgives_the_failures_before_it():
    policy = SparePolicy().failed(now_s=0.0).failed(now_s=0.0).ready(GIB)
    assert (policy.failures, policy.need) == (0, GIB)
    assert policy.ready(None).need == GIB


def test_the_first_spare_may_need_what_the_trainer_has_and_later_ones_what_it_had():
    policy, tight = SparePolicy(), Room(limit=4 * GIB, left=GIB)
    assert policy.shortage(tight, trainer_bytes=GIB) == "1024 MiB of memory are left, and it may need 1024 MiB"
    assert policy.shortage(tight, trainer_bytes=GIB // 2) == ""
    assert policy.ready(GIB // 2).shortage(tight, trainer_bytes=3 * GIB) == ""


@pytest.mark.parametrize(("left", "trainer"), [(None, GIB), (GIB, None)])
def test_what_is_not_known_forbids_nothing(left: int | None, trainer: int | None):
    space = None if left is None else Room(limit=4 * GIB, left=left)
    assert SparePolicy().shortage(space, trainer_bytes=trainer) == ""
    assert not SparePolicy().tight(None)


def test_a_shortage_is_looked_at_again_later_and_is_no_failure():
    policy = SparePolicy().short(now_s=10.0)
    assert not policy.due(now_s=10.0 + SHORTAGE_BACKOFF_S - 0.1, trained_s=100.0)
    assert policy.due(now_s=10.0 + SHORTAGE_BACKOFF_S, trained_s=100.0)
    assert policy.failures == 0


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """The next one that is asked for is refused by the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_spare_that_the_system_refuses_is_told_once_and_tried_again_for_ever():
    told: list[str] = []
    with selectors.DefaultSelector() as selector:
        spares = Spares(
            module="none", policy=SparePolicy(), selector=selector, measure=lambda: None,
            private_bytes=lambda pid: None, tell=told.append,
        )  # fmt: skip
        now_s = 0.0
        for _ in range(2 * FAILURE_LIMIT):
            with no_descriptor_left():
                spares.tend(now_s=now_s, trained_s=100.0, trainer=1, environ={})
            assert (spares.pid, spares.starts) == (None, 0)
            assert not spares._policy.due(now_s=now_s + SHORTAGE_BACKOFF_S - 0.1, trained_s=100.0)
            now_s += SHORTAGE_BACKOFF_S
            assert spares._policy.due(now_s=now_s, trained_s=100.0)
    [why] = told
    assert "Too many open files" in why


@given(st.integers(1, 64 * GIB), st.integers(0, 64 * GIB), st.integers(0, 16 * GIB))
def test_a_spare_that_was_begun_with_room_is_not_given_up_as_soon_as_it_has_taken_it(limit: int, left: int, need: int):
    policy = SparePolicy(need=need)
    if not policy.shortage(Room(limit=limit, left=left), trainer_bytes=None):
        assert not policy.tight(Room(limit=limit, left=left - need))


# What the kernel tells


def files(directory: Path, **contents: str) -> list[str]:
    for name, text in contents.items():
        (directory / name).write_text(text)
    return [str(directory / name) for name in contents]


def test_room_is_the_tighter_of_container_and_machine(tmp_path: Path):
    limit, usage, stat, meminfo = files(
        tmp_path, limit="1000000\n", usage="900000\n", stat="anon 1\ninactive_file 150000\n",
        meminfo="MemTotal:  2000 kB\nMemAvailable:   1000 kB\n",
    )  # fmt: skip
    cgroups = ((limit, usage, stat, "inactive_file"),)
    assert room.measure(cgroups, meminfo) == Room(limit=1000000, left=250000)
    Path(meminfo).write_text("MemTotal: 2000 kB\nMemAvailable: 100 kB\n")
    assert room.measure(cgroups, meminfo) == Room(limit=2048000, left=102400)


def test_a_container_without_a_limit_has_the_machines_room(tmp_path: Path):
    limit, usage, stat, meminfo = files(
        tmp_path, limit="max\n", usage="5\n", stat="\n", meminfo="MemTotal: 2 kB\nMemAvailable: 1 kB\n"
    )
    assert room.measure(((limit, usage, stat, "x"),), meminfo) == Room(limit=2048, left=1024)
    assert room.measure(((limit, usage, stat, "x"),), str(tmp_path / "absent")) is None
