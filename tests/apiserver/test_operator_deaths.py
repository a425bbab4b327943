"""Operators that die: in every phase, again and again, with a standby, with the API server away. Training never cares,
and in the end everything is as if no operator had ever died, with nothing twice."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.apiserver.operators import Cluster

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(400)]

NAME = "digits"
STEPS = 40


@dataclass(frozen=True)
class Story:
    """`before` leads to the moment of death; `after` to the end, with a new operator."""

    before: Callable[[Cluster], Awaitable[None]]
    after: Callable[[Cluster], Awaitable[None]]
    phases: tuple[str, ...]
    """All that must be in the history."""
    attempt: int = 1
    restarts: int = 0


async def nothing(_: Cluster) -> None: ...


async def job_made(place: Cluster) -> None:
    await place.until(lambda: place.created("jobs", NAME), "the Job")


async def rolled_back(place: Cluster) -> None:
    await place.stepped(NAME, 9)  # the loss turns NaN at step 10


async def nearly_done(place: Cluster) -> None:
    await place.stepped(NAME, STEPS - 1)


def asked(mode: str) -> Callable[[Cluster], Awaitable[None]]:
    """The signal has arrived in the pod; what the operator had time to do about the answer is chance."""

    async def ask(place: Cluster) -> None:
        await place.stepped(NAME, 15)
        place.set_spec(NAME, emergencyStop=mode)
        await place.until(lambda: place.node.signals_seen, "the signal")

    return ask


async def lifted(place: Cluster) -> None:
    status = await place.phase(NAME, "Halted")
    assert (status["halt"]["acknowledged"], status["halt"]["expected"]) == (1, 1)
    place.set_spec(NAME, emergencyStop="None")


async def suspended(place: Cluster) -> None:
    await place.stepped(NAME, 15)
    place.set_spec(NAME, suspend=True)
    path = f"/apis/batch/v1/namespaces/{place.namespace}/jobs"
    await place.until(
        lambda: all("deletionTimestamp" in j["metadata"] for j in place.items(path)), "the Job's deletion"
    )


async def resumed(place: Cluster) -> None:
    await place.phase(NAME, "Suspended")
    place.set_spec(NAME, suspend=False)


async def crashed(place: Cluster) -> None:
    await place.stepped(NAME, 15)
    (pod,) = place.node.pod_names(NAME)
    await place.node.crash(pod, 70)


START = ("Running", "RollingBack", "Running")
END = ("Running", "Succeeded")
STORIES = {
    "start": Story(job_made, nothing, (*START, "Succeeded")),
    "rollback": Story(rolled_back, nothing, (*START, "Succeeded")),
    "checkpoint": Story(asked("Checkpoint"), lifted, (*START, "Halted", *END), attempt=2),
    "freeze": Story(asked("Freeze"), lifted, (*START, "Halted", *END)),
    "kill": Story(asked("Kill"), lifted, (*START, "Halted", *END), attempt=2),
    "suspension": Story(suspended, resumed, (*START, "Suspended", *END), attempt=2),
    "crash": Story(crashed, nothing, (*START, "Restarting", *END), attempt=2, restarts=1),
    "completion": Story(nearly_done, nothing, (*START, "Succeeded")),
}
PASSING = ("Pending", "Starting", "Halting")
"""Phases that are recorded only when an operator saw them."""


def trained(status: dict[str, Any]) -> tuple[str, ...]:
    return tuple(phase for entry in status["history"] if (phase := entry["to"]) not in PASSING)


async def finish(place: Cluster, story: Story) -> None:
    status = await place.phase(NAME, "Succeeded")
    assert_told(place, status, story)


def assert_told(place: Cluster, status: dict[str, Any], story: Story) -> None:
    assert trained(status) == story.phases
    assert (status["rollbacks"]["total"], status["progress"]["step"]) == (1, STEPS)
    assert status["attempt"] == story.attempt
    assert (status["restarts"]["total"], status["restarts"]["counted"]) == (story.restarts, story.restarts)
    place.assert_nothing_doubled(NAME)
    for reason in ("RolledBack", "Complete"):
        assert len(place.events(NAME, reason)) <= 1, reason


@pytest.mark.parametrize("moment", STORIES)
async def test_an_operator_killed_in_any_phase_changes_nothing(place: Cluster, moment: str) -> None:
    story = STORIES[moment]
    first = place.start_operator()
    place.create_run(NAME, steps=STEPS, nan_at=10, restart={"initialBackoffSeconds": 0})
    await story.before(place)
    first.kill()
    place.start_operator()
    await story.after(place)
    await finish(place, story)


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
    assert trained(status) == (
        *START, "Halted", "Running", "Restarting", "Running", "Halted", "Running", "Suspended", *END,
    )  # fmt: skip
    assert (status["rollbacks"]["total"], status["attempt"]) == (1, 4)
    assert (status["restarts"]["total"], status["restarts"]["counted"]) == (1, 1)
    assert status["progress"]["step"] == training.total_steps
    assert not mortality.done() or mortality.cancelled()
    place.assert_nothing_doubled(NAME)


async def halt(place: Cluster, mode: str) -> None:
    """Halts and lifts."""
    place.set_spec(NAME, emergencyStop=mode)
    halted = await place.sees(NAME, lambda s: s.get("phase") == "Halted" and s["halt"]["mode"] == mode, f"{mode} is done")
    assert (halted["halt"]["acknowledged"], halted["halt"]["expected"]) == (1, 1)
    place.set_spec(NAME, emergencyStop="None")


async def keep_killing(place: Cluster) -> None:
    """A new one as soon as the last is dead; killed some moments after it leads, ever at another place."""
    for life_s in itertools.cycle((0.05, 0.8, 0.2, 0.4, 0.1, 1.6)):
        operator = await place.leading_operator()
        await asyncio.sleep(life_s)  # what is waited for is chance
        operator.kill()


async def test_a_standby_takes_over_when_the_leader_is_killed(place: Cluster) -> None:
    story = STORIES["checkpoint"]
    first = await place.leading_operator("one")
    second = await place.standby("two")
    place.create_run(NAME, steps=STEPS, nan_at=10)
    await story.before(place)
    assert not second.said("leading as")
    mark = place.audit_mark()
    first.kill()
    await place.until(lambda: second.said("leading as"), "the standby leads")
    await story.after(place)
    await finish(place, story)
    assert not [write for write in place.writes(mark) if write[2] == 409], "conflicts"
    assert second.stop() == 0


async def test_a_leader_that_was_asleep_writes_nothing_when_it_wakes(place: Cluster) -> None:
    first = await place.leading_operator("one")
    second = await place.standby("two")
    place.create_run(NAME, steps=400)
    await place.phase(NAME, "Running")
    first.pause()
    await place.until(lambda: second.said("leading as"), "the second takes over")
    mark = place.audit_mark()
    place.set_spec(NAME, emergencyStop="Checkpoint")
    await place.phase(NAME, "Halted")
    first.go_on()
    await place.until(lambda: not first.running, "the old leader ends itself")
    assert first.process.returncode == 1
    assert not [write for write in place.writes(mark) if write[2] == 409]
    third = await place.standby("three")
    assert second.stop() == 0
    await place.until(lambda: third.said("leading as"), "a Lease that was given up is taken at once")


async def test_training_goes_on_while_the_api_server_is_away(place: Cluster) -> None:
    """The leader loses its Lease and ends; whoever restarts it finds an API server that is still away."""
    first = await place.leading_operator()
    place.create_run(NAME, steps=400, nan_at=20)
    await place.stepped(NAME, 5)
    mark = place.audit_mark()
    with place.plane.away():
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
    assert trained(status) == ("Running", "RollingBack", "Running")
    assert (status["attempt"], status["restarts"]["total"], status["rollbacks"]["total"]) == (1, 0, 1)
    place.assert_nothing_doubled(NAME)
