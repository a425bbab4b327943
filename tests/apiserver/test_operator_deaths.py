"""Operators that die: in every phase, again and again, with a standby, with the API server away. Training never cares,
and in the end everything is as if no operator had ever died, with nothing twice."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.apiserver.operators import Cluster, OperatorProcess

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
    await place.until(lambda: all("deletionTimestamp" in j["metadata"] for j in place.items(path)), "the Job's deletion")


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

