"""A run from apply to its end on a real API server: transitions, rollback, suspension, crash, deletion, broadcast."""

import pytest
from esper_leyline import labels

from tests.apiserver.operators import Cluster, moment

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(240)]

JOBS = "/apis/batch/v1/namespaces/{}/jobs"
PODS = "/api/v1/namespaces/{}/pods"
CLAIMS = "/api/v1/namespaces/{}/persistentvolumeclaims"


async def test_a_run_trains_rolls_back_and_succeeds(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=20, nan_at=7)
    status = await place.phase("digits", "Succeeded")
    moves = [(e.get("from"), e["to"], e["reason"]) for e in status["history"]]
    rolled = moves.index(("Running", "RollingBack", "NonFiniteLoss"))
    assert moves[rolled + 1] == ("RollingBack", "Running", "RolledBack")
    assert [to for _, to, _ in moves if to not in ("Pending", "Starting")] == [
        "Running", "RollingBack", "Running", "Succeeded",
    ]  # fmt: skip
    assert {entry["attempt"] for entry in status["history"]} <= {0, 1}
    assert (status["rollbacks"]["total"], status["progress"]["step"], status["attempt"]) == (1, 20, 1)
    recovery = status["lastRecovery"]
    assert (recovery["kind"], recovery["cause"]) == ("InProcess", "NonFiniteLoss")
    assert (recovery["fromStep"], recovery["toStep"]) == (7, 6)
    assert (recovery["detectMilliseconds"], recovery["recoverMilliseconds"]) == (1, 20)
    assert place.condition("digits", "Complete")["status"] == "True"
    assert place.condition("digits", "RolledBack")["status"] == "True"
    await place.until(lambda: place.events("digits", "Complete"), "the last Event")
    for reason in ("JobCreated", "Training", "RolledBack", "Complete"):
        assert len(place.events("digits", reason)) == 1, reason
    place.assert_nothing_doubled("digits")


async def test_a_rollback_that_nobody_watched_has_the_runtimes_own_times(place: Cluster) -> None:
    first = place.start_operator()
    place.create_run("digits", steps=40, nan_at=20)
    await place.stepped("digits", 5)
    first.kill()
    await place.stepped("digits", 30)
    place.start_operator()
    status = await place.phase("digits", "Succeeded")
    begin = next((e for e in status["history"] if e["to"] == "RollingBack"), None)
    assert begin is not None, status["history"]
    end = status["history"][status["history"].index(begin) + 1]
    assert (end["from"], end["to"]) == ("RollingBack", "Running")
    assert 0 <= (moment(end["time"]) - moment(begin["time"])).total_seconds() < 1
    await place.until(lambda: place.events("digits", "RolledBack"), "the Event")
    (event,) = place.events("digits", "RolledBack")
    assert (moment(event["eventTime"]) - moment(begin["time"])).total_seconds() > 0.5, "recorded long after"
    times = [moment(entry["time"]) for entry in status["history"]]
    assert times == sorted(times)
    place.assert_nothing_doubled("digits")


async def test_suspend_releases_the_pods_and_goes_on(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=60)
    await place.stepped("digits", 12)
    place.set_spec("digits", suspend=True)
    await place.phase("digits", "Suspended")
    await place.until(lambda: not place.items(PODS) and not place.items(JOBS), "no pods, no Job")
    saved = place.node.training("digits").saved_step
    assert saved >= 12
    place.set_spec("digits", suspend=False)
    status = await place.phase("digits", "Succeeded")
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["counted"]) == (2, 0, 0)
    assert status["progress"]["step"] == 60
    place.assert_nothing_doubled("digits")


async def test_a_crash_leads_to_the_next_attempt(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=40, restart={"initialBackoffSeconds": 0})
    await place.stepped("digits", 8)
    (pod,) = place.items(PODS)
    await place.node.crash(pod["metadata"]["name"], 70)
    status = await place.phase("digits", "Succeeded")
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["counted"]) == (2, 1, 1)
    failure = status["lastFailure"]
    assert (failure["podName"], failure["containerName"]) == (pod["metadata"]["name"], labels.TOLARIA)
    assert (failure["exitCode"], failure["rank"]) == (70, 0)
    assert place.transitions("digits").count("Restarting") == 1
    place.assert_nothing_doubled("digits")


async def test_a_deleted_run_leaves_only_its_claim(place: Cluster) -> None:
    place.start_operator()
    retained = {"claimTemplate": {"size": "1Gi", "whenDeleted": "Retain"}}
    place.create_run("digits", steps=1000, checkpoint={"storage": retained})
    await place.stepped("digits", 3)
    place.delete_run("digits")
    kinds = ("services", "configmaps", "secrets", "pods")
    paths = (JOBS, *(f"/api/v1/namespaces/{{}}/{kind}" for kind in kinds))

    def left() -> list[str]:
        marked = [item for path in paths for item in place.items(path)]
        return [i["metadata"]["name"] for i in marked if labels.RUN in i["metadata"].get("labels", {})]

    await place.until(lambda: not left(), "children are gone")
    assert [c["metadata"]["name"] for c in place.items(CLAIMS)] == ["digits-checkpoints"]


async def test_a_broadcast_halts_the_runs_that_it_selects(place: Cluster) -> None:
    place.start_operator()
    for name in ("one", "two"):
        place.create_run(name, steps=1000)
    path = place.path("one")
    assert place.plane.merge(path, {"metadata": {"labels": {"team": "red"}}}).ok
    await place.stepped("one", 3)
    await place.stepped("two", 3)
    broadcast = {
        "metadata": {"name": labels.EMERGENCY_CONFIG_MAP},
        "data": {
            "red": "mode: Freeze\nselector: {matchLabels: {team: red}}\nreason: a test\n",
            "broken": "mode: [",
        },
    }
    config_maps = f"/api/v1/namespaces/{place.namespace}/configmaps"
    assert place.plane.create(config_maps, broadcast).ok
    status = await place.phase("one", "Halted")
    assert status["halt"]["source"] == "Broadcast"
    assert place.status("two")["phase"] == "Running"
    broken = labels.EMERGENCY_CONFIG_MAP
    await place.until(lambda: any("data.broken" in e["note"] for e in place.events(broken)), "an Event")
    assert place.plane.request("DELETE", f"{config_maps}/{broken}").ok
    await place.phase("one", "Running")
