"""The operator is killed in every phase of a run: training never cares, and in the end everything is as if no operator
had ever died, with nothing twice."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.apiserver.operators import Cluster, moment

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

STEPS = 40


Act = Callable[[Cluster, str], Awaitable[None]]
"""Does something to the run of that name."""


@dataclass(frozen=True)
class Story:
    """`before` leads to the moment of death; `after` to the end, with a new operator."""

    before: Act
    after: Act
    phases: tuple[str, ...]
    """All that must be in the history."""
    attempt: int = 1
    restarts: int = 0


async def nothing(_: Cluster, __: str) -> None: ...


async def job_made(colony: Cluster, run: str) -> None:
    await colony.until(lambda: colony.created("jobs", run), "the Job")


async def rolled_back(colony: Cluster, run: str) -> None:
    await colony.stepped(run, 9)  # the loss turns NaN at step 10


async def nearly_done(colony: Cluster, run: str) -> None:
    await colony.stepped(run, STEPS - 1)


def asked(mode: str) -> Act:
    """The signal has arrived in the pod; what the operator had time to do about the answer is chance."""

    async def ask(colony: Cluster, run: str) -> None:
        await colony.stepped(run, 15)
        colony.set_spec(run, emergencyStop=mode)
        (pod,) = colony.node.pod_names(run)
        await colony.until(lambda: colony.node.signals_of(pod), "the signal")

    return ask


async def lifted(colony: Cluster, run: str) -> None:
    status = await colony.phase(run, "Halted")
    assert (status["halt"]["acknowledged"], status["halt"]["expected"]) == (1, 1)
    colony.set_spec(run, emergencyStop="None")


async def suspended(colony: Cluster, run: str) -> None:
    await colony.stepped(run, 15)
    colony.set_spec(run, suspend=True)
    await colony.until(
        lambda: all("deletionTimestamp" in job["metadata"] for job in colony.children("jobs", run)),
        "its Job's deletion",
    )


async def resumed(colony: Cluster, run: str) -> None:
    await colony.phase(run, "Suspended")
    colony.set_spec(run, suspend=False)


async def crashed(colony: Cluster, run: str) -> None:
    await colony.stepped(run, 15)
    (pod,) = colony.node.pod_names(run)
    await colony.node.crash(pod, 70)


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


@pytest.mark.parametrize("death", STORIES)
async def test_an_operator_killed_in_any_phase_changes_nothing(colony: Cluster, death: str) -> None:
    story, run = STORIES[death], f"dies-at-{death}"
    colony.create_run(run, steps=STEPS, nan_at=10, restart={"initialBackoffSeconds": 0})
    await story.before(colony, run)
    await colony.replace_operator()
    await story.after(colony, run)
    status = await colony.phase(run, "Succeeded")
    assert trained(status) == story.phases, "\n".join(f"{e}" for e in status["history"])
    assert (status["rollbacks"]["total"], status["progress"]["step"]) == (1, STEPS)
    assert status["attempt"] == story.attempt
    assert (status["restarts"]["total"], status["restarts"]["counted"]) == (story.restarts, story.restarts)
    colony.assert_nothing_doubled(run)
    for reason in ("RolledBack", "Complete"):
        assert len(colony.events(run, reason)) <= 1, reason


async def test_a_rollback_that_nobody_watched_has_the_runtimes_own_times(colony: Cluster) -> None:
    colony.create_run("alone", steps=40, nan_at=20)
    await colony.stepped("alone", 5)
    colony.operator.kill()
    await colony.stepped("alone", 30)
    await colony.leading_operator()
    status = await colony.phase("alone", "Succeeded")
    begin = next((e for e in status["history"] if e["to"] == "RollingBack"), None)
    assert begin is not None, status["history"]
    end = status["history"][status["history"].index(begin) + 1]
    assert (end["from"], end["to"]) == ("RollingBack", "Running")
    assert 0 <= (moment(end["time"]) - moment(begin["time"])).total_seconds() < 1
    await colony.until(lambda: colony.events("alone", "RolledBack"), "the Event")
    (event,) = colony.events("alone", "RolledBack")
    assert (moment(event["eventTime"]) - moment(begin["time"])).total_seconds() > 0.5, "recorded long after"
    times = [moment(entry["time"]) for entry in status["history"]]
    assert times == sorted(times)
    colony.assert_nothing_doubled("alone")
