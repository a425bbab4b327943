"""P12: one status write per transition, progress at most every 10 s, nothing when nothing changes, no conflict with
itself. Counted from the API server's audit log."""

from collections import Counter

import pytest

from tests.apiserver.operators import USER_AGENT, VERBS, Cluster
from tests.apiserver.writes import PROGRESS_PERIOD_S, RUN, Life, Stage

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(400)]

OTHERS = ("kube-controller-manager", "Python-urllib", "test-node")
"""User agents of the cluster and of the test."""
SIGNAL = {"patch configmaps": 1}
"""One emergency signal: the record. The one pod is touched at most once: not when it answers in time."""
TOUCH = "patch pods"
OBJECTS: dict[str, dict[str, int]] = {
    "start": {
        "create secrets": 1,
        "patch secrets": 1,
        "create configmaps": 1,
        "patch configmaps": 1,
        "create persistentvolumeclaims": 1,
        "patch services": 1,
        "create jobs": 1,
    },
    "freeze": SIGNAL,
    "lift": SIGNAL,
    "halt": SIGNAL,
    "resume": {"delete jobs": 1, "create jobs": 1},
    "crash": {"delete jobs": 1, "create jobs": 1},
}
"""All that may be written besides the status and Events, exactly."""
BESIDES = {"start": 1, "freeze": 1, "lift": 1, "halt": 1, "resume": 2, "crash": 2}
"""Status writes of transitions that are no entry of the history: pods ready, a rank's acknowledgement, an edit seen,
the next attempt's number, a failure reported ahead of the container's end."""
EVENTS = {"start": 2, "rollback": 1, "freeze": 2, "lift": 1, "halt": 2, "resume": 2, "crash": 3, "finish": 1}
EDITED = ("freeze", "lift", "halt", "resume")
"""Here a person edits the run at any moment, so the write that is under way just then may meet a newer version."""
RESTING = ("frozen", "new operator", "halted", "finished")


@pytest.fixture
def step_s() -> float:
    return 0.5


async def test_no_stage_of_a_life_writes_more_than_it_must(place: Cluster) -> None:
    await place.leading_operator()
    stages = await Life(place).tell(steady_s=22, frozen_s=11, rest_s=3)
    for stage in stages:
        print(f"\n{stage.name}: {stage.changes} changes, {dict(stage.writes)} in {stage.seconds:.0f} s", end="")
        print("", *sorted(stage.said), sep="\n    ", end="")
    for stage in stages:
        assert_within_limits(stage)
    status = place.status(RUN)
    assert (status["attempt"], status["rollbacks"]["total"], status["restarts"]["total"]) == (3, 1, 1)
    assert place.condition(RUN, "Complete")["status"] == "True"
    assert len(place.events(RUN, "Complete")) == 1
    assert {agent.split("/")[0] for agent in writers(place)} <= {USER_AGENT, f"{USER_AGENT}-lease", *OTHERS}


def assert_within_limits(stage: Stage) -> None:
    assert stage.conflicts <= (1 if stage.name in EDITED else 0), stage
    if stage.name in RESTING:
        assert not stage.writes, stage
        return
    others = Counter(
        {kind: n for kind, n in stage.writes.items() if kind not in ("patch espertrainingruns/status", "create events")}
    )
    touches = others.pop(TOUCH, 0)
    assert touches <= (OBJECTS.get(stage.name) is SIGNAL), stage
    assert others == OBJECTS.get(stage.name, {}), stage
    progress = 1 + stage.seconds // PROGRESS_PERIOD_S
    assert stage.statuses <= stage.changes + BESIDES.get(stage.name, 0) + progress, stage
    assert stage.events <= EVENTS.get(stage.name, 0), stage


def writers(place: Cluster) -> set[str]:
    """User agents of everybody who wrote here; Kopf must not be one of them."""
    return {
        event["userAgent"]
        for event in place.plane.audit()
        if event.get("objectRef", {}).get("namespace") == place.namespace and event["verb"] in VERBS
    }
