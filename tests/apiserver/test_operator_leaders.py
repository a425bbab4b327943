"""Operators that come and go: they die all the time, sleep, stand by, lose the API server and Redis."""

import asyncio
import itertools
from typing import Any

import pytest

from tests.apiserver.operators import Cluster

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(400)]

NAME = "digits"
PASSING = ("Pending", "Starting", "Halting")
"""Phases that are recorded only when an operator saw them."""


def trained(status: dict[str, Any]) -> list[str]:
    return [phase for entry in status["history"] if (phase := entry["to"]) not in PASSING]


async def test_operators_that_die_all_the_time_change_nothing(place: Cluster) -> None:
    """A run freezes, crashes, is halted and suspended while every operator lives but a moment."""
    place.create_run(NAME, steps=100_000, nan_at=10, restart={"initialBackoffSeconds": 0})
    mortality = asyncio.create_task(keep_killing(place))
    try:
        await place.stepped(NAME, 12)
        await halt(place, "Freeze")
        await place.phase(NAME, "Running")
        await place.node.crash(place.node.pod_names(NAME)[-1], 70)
        await place.trains(NAME, 2)
        await halt(place, "Checkpoint")
        await place.trains(NAME, 3)
        place.set_spec(NAME, suspend=True)
        await place.phase(NAME, "Suspended")
        place.set_spec(NAME, suspend=False)
        await place.trains(NAME, 4)
        training = place.node.training(NAME)
        training.total_steps = training.step + 5
        status = await place.phase(NAME, "Succeeded")
    finally:
        mortality.cancel()
    print(f"\n{len(place.operators)} operators lived and died")
    assert trained(status) == [
        "Running", "RollingBack", "Running", "Halted", "Running", "Restarting", "Running", "Halted", "Running",
        "Suspended", "Running", "Succeeded",
    ]  # fmt: skip
    assert (status["rollbacks"]["total"], status["attempt"]) == (1, 4)
    assert (status["restarts"]["total"], status["restarts"]["counted"]) == (1, 1)
    assert status["progress"]["step"] == training.total_steps
    assert not mortality.done() or mortality.cancelled()
    place.assert_nothing_doubled(NAME)


async def halt(place: Cluster, mode: str) -> None:
    """Halts and lifts."""
    place.set_spec(NAME, emergencyStop=mode)
    halted = await place.sees(
        NAME, lambda s: s.get("phase") == "Halted" and s["halt"]["mode"] == mode, f"{mode} is done"
    )
    assert (halted["halt"]["acknowledged"], halted["halt"]["expected"]) == (1, 1)
    place.set_spec(NAME, emergencyStop="None")


async def keep_killing(place: Cluster) -> None:
    """A new one as soon as the last is dead; killed some moments after it leads, ever at another place."""
    for life_s in itertools.cycle((0.05, 0.8, 0.2, 0.4, 0.1, 1.6)):
        operator = await place.leading_operator()
        await asyncio.sleep(life_s)  # what is waited for is chance
        operator.kill()


async def test_a_standby_takes_over_and_a_leader_that_slept_writes_nothing_when_it_wakes(place: Cluster) -> None:
    first = await place.leading_operator("one", user="alice")
    second = await place.standby("two", user="bob")
    place.create_run(NAME, steps=1000)
    await place.phase(NAME, "Running")
    assert not place.written_by("bob", 0), "a standby writes nothing"
    first.pause()  # as good as dead, until it wakes
    mark = place.audit_mark()
    place.set_spec(NAME, emergencyStop="Checkpoint")
    status = await place.phase(NAME, "Halted")
    assert second.said("leading as")
    assert (status["halt"]["acknowledged"], status["halt"]["expected"]) == (1, 1)
    assert [signal.term for signal in place.node.signals_seen] == [2]
    first.go_on()
    await place.until(lambda: not first.running, "the old leader ends itself")
    assert first.process.returncode == 1
    assert not place.written_by("alice", mark)
    assert place.written_by("bob", mark)
    assert not [write for write in place.writes(mark) if write[2] == 409], "conflicts"
    third = await place.standby("three")
    assert second.stop() == 0
    await place.until(lambda: third.said("leading as"), "a Lease that was given up is taken at once")
    place.set_spec(NAME, emergencyStop="None")
    await place.trains(NAME, 2)
    place.assert_nothing_doubled(NAME)


async def test_training_goes_on_while_the_api_server_is_away(place: Cluster) -> None:
    """The leader loses its Lease and ends; whoever restarts it finds an API server that is still away."""
    first = await place.leading_operator()
    place.create_run(NAME, steps=400, nan_at=20)
    await place.stepped(NAME, 5)
    with place.plane.away():
        mark = place.audit_mark()
        await place.until(lambda: not first.running, "the Lease cannot be renewed")
        step = place.node.training(NAME).step
        second = place.start_operator()  # as the kubelet does
        await place.until(lambda: second.said("the seed Secret cannot be read yet"), "the second waits")
        assert second.get("/livez").count("ok")
        assert "not filled" in second.get("/readyz")
        await place.stepped(NAME, step + 10)
        missed = place.node.training(NAME).step
    status = await place.sees(NAME, lambda s: s.get("progress", {}).get("step", 0) >= missed, "the status catches up")
    print(f"\nfirst status write {place.first_status_write_s(mark):.1f} s after the API server is back")
    assert first.process.returncode == 1
    assert second.running
    assert trained(status) == ["Running", "RollingBack", "Running"]
    assert (status["attempt"], status["restarts"]["total"], status["rollbacks"]["total"]) == (1, 0, 1)
    place.assert_nothing_doubled(NAME)


@pytest.mark.parametrize("way", ["killed", "never there"])
async def test_without_redis_reports_are_pulled_and_halts_go_by_config_map(place: Cluster, way: str) -> None:
    operator = await place.leading_operator(**({"bus_url": ""} if way == "never there" else {}))
    place.create_run(NAME, steps=10_000, nan_at=12)
    await place.stepped(NAME, 5)
    if way == "killed":
        assert place.redis is not None
        place.redis.kill()
    await place.until(lambda: operator.metric("esper_reports_total", way="pull", outcome="accepted"), "pulled")
    await place.sees(NAME, lambda s: s.get("rollbacks", {}).get("total") == 1, "the rollback")
    for mode, attempt in (("Freeze", 1), ("Checkpoint", 2)):
        started = place.node.steps_of(NAME, 1)
        await halt(place, mode)
        await place.phase(NAME, "Running")
        await place.until(lambda a=attempt, s=started: place.node.steps_of(NAME, a) > (s if a == 1 else 0), "training")
    status = place.status(NAME)
    print(f"\nhalt acknowledged, Redis {way}: {status['halt']['milliseconds']} ms")
    assert trained(status) == ["Running", "RollingBack", "Running", "Halted", "Running", "Halted", "Running"]
    place.assert_nothing_doubled(NAME)
