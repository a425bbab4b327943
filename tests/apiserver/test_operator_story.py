"""A run from apply to its end on a real API server: transitions, halts, suspension, deletion, dead operators."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from esper_leyline import labels
from esper_operator.api import crd

from tests.apiserver.operators import Cluster, cluster, moment
from tests.support.controlplane import ControlPlane
from tests.support.waiting import until

pytestmark = [pytest.mark.apiserver, pytest.mark.slow, pytest.mark.timeout(240)]

JOBS = "/apis/batch/v1/namespaces/{}/jobs"
PODS = "/api/v1/namespaces/{}/pods"


@pytest.fixture
async def place(control_plane_with_controllers: ControlPlane, tmp_path: Path) -> AsyncIterator[Cluster]:
    control_plane_with_controllers.install_crd(crd.manifest())
    async with cluster(control_plane_with_controllers, tmp_path) as made:
        yield made


def step(least: int):
    return lambda status: status.get("progress", {}).get("step", 0) >= least


def training(place: Cluster, run: str, least: int):
    """By the trainer's own count: the status shows progress only every 10 s."""
    return lambda: place.node.pod_names(run) and place.node.training(run).step >= least


async def test_a_run_trains_rolls_back_and_succeeds(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=30, nan_at=12)
    status = await place.phase("digits", "Succeeded")
    assert [p for p in place.transitions("digits") if p not in ("Pending", "Starting")] == [
        "Running", "RollingBack", "Running", "Succeeded",
    ]  # fmt: skip
    assert status["rollbacks"]["total"] == 1
    assert status["lastRecovery"]["kind"] == "InProcess"
    assert status["progress"]["step"] == 30
    events = place.items("/apis/events.k8s.io/v1/namespaces/{}/events")
    assert len([e for e in events if e["reason"] == "RolledBack"]) == 1


@pytest.mark.parametrize("redis", ["redis", "no-redis"])
async def test_a_halt_is_acknowledged_and_lifted(place: Cluster, redis: str) -> None:
    place.start_operator()
    place.create_run("digits", steps=60)
    await until(training(place, "digits", 5), 30)
    if redis == "no-redis":
        assert place.redis is not None
        place.redis.kill()
    place.set_spec("digits", emergencyStop="Checkpoint")
    status = await place.phase("digits", "Halted")
    halt = status["halt"]
    assert (halt["mode"], halt["source"], halt["acknowledged"], halt["expected"]) == ("Checkpoint", "Spec", 1, 1)
    assert halt["savedStep"] > 0
    print(f"\nhalt acknowledged {redis}: {halt['milliseconds']} ms")
    place.set_spec("digits", emergencyStop="None")
    status = await place.phase("digits", "Succeeded", 60)
    assert status["attempt"] == 2
    assert place.transitions("digits")[-5:-1].count("Halted") == 1
    assert status["progress"]["step"] == 60


async def test_freeze_keeps_the_pod_and_goes_on_in_place(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=60)
    await until(training(place, "digits", 5), 30)
    place.set_spec("digits", emergencyStop="Freeze")
    await place.phase("digits", "Halted")
    (pod,) = place.items(PODS)
    place.set_spec("digits", emergencyStop="None")
    status = await place.phase("digits", "Succeeded")
    assert status["attempt"] == 1
    assert [p["metadata"]["uid"] for p in place.items(PODS)] == [pod["metadata"]["uid"]]


async def test_suspend_releases_the_pods_and_goes_on(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=60)
    await until(training(place, "digits", 12), 30)
    place.set_spec("digits", suspend=True)
    await place.phase("digits", "Suspended")
    await until(lambda: not place.items(PODS), 15, "no pods")
    place.set_spec("digits", suspend=False)
    status = await place.phase("digits", "Succeeded")
    assert status["attempt"] == 2


async def test_a_crash_leads_to_the_next_attempt(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=40, restart={"initialBackoffSeconds": 0})
    await until(training(place, "digits", 8), 30)
    (pod,) = place.items(PODS)
    await place.node.crash(pod["metadata"]["name"], 70)
    status = await place.phase("digits", "Succeeded")
    assert status["attempt"] == 2
    assert status["restarts"]["counted"] == 1
    assert status["lastFailure"]["podName"] == pod["metadata"]["name"]
    assert status["lastFailure"]["exitCode"] == 70


async def test_a_deleted_run_leaves_only_its_claim(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=1000)
    await until(training(place, "digits", 3), 30)
    place.delete_run("digits")
    paths = (JOBS, PODS, "/api/v1/namespaces/{}/services", "/api/v1/namespaces/{}/configmaps")

    def left() -> list[str]:
        marked = [item for path in paths for item in place.items(path)]
        return [i["metadata"]["name"] for i in marked if labels.RUN in i["metadata"].get("labels", {})]

    await until(lambda: not left(), 30, "children are gone")
    assert [c["metadata"]["name"] for c in place.items("/api/v1/namespaces/{}/persistentvolumeclaims")] == [
        "digits-checkpoints"
    ]


async def test_a_broadcast_halts_the_runs_that_it_selects(place: Cluster) -> None:
    place.start_operator()
    for name in ("one", "two"):
        place.create_run(name, steps=1000)
    path = place.path("one")
    assert place.plane.merge(path, {"metadata": {"labels": {"team": "red"}}}).ok
    await until(training(place, "one", 3), 30)
    await until(training(place, "two", 3), 30)
    broadcast = {
        "metadata": {"name": labels.EMERGENCY_CONFIG_MAP},
        "data": {
            "red": "mode: Freeze\nselector: {matchLabels: {team: red}}\nreason: a test\n",
            "broken": "mode: [",
        },
    }
    assert place.plane.create(f"/api/v1/namespaces/{place.namespace}/configmaps", broadcast).ok
    status = await place.phase("one", "Halted")
    assert status["halt"]["source"] == "Broadcast"
    assert place.status("two")["phase"] == "Running"
    events = "/apis/events.k8s.io/v1/namespaces/{}/events"
    await until(lambda: any("data.broken" in e.get("note", "") for e in place.items(events)), 10, "an Event")


@pytest.mark.parametrize("moment_of_death", ["rollback", "halt", "completion"])
async def test_an_operator_killed_at_a_bad_moment_changes_nothing(place: Cluster, moment_of_death: str) -> None:
    first = place.start_operator()
    place.create_run("digits", steps=40, nan_at=10)
    await until(training(place, "digits", {"rollback": 9, "halt": 20, "completion": 39}[moment_of_death]), 30)
    if moment_of_death == "halt":
        place.set_spec("digits", emergencyStop="Checkpoint")
        await until(lambda: place.node.signals_seen, 10, "the signal arrived")
    first.kill()
    place.start_operator("two")
    if moment_of_death == "halt":
        status = await place.phase("digits", "Halted", 45)
        assert (status["halt"]["acknowledged"], status["halt"]["expected"]) == (1, 1)
        place.set_spec("digits", emergencyStop="None")
    status = await place.phase("digits", "Succeeded", 60)
    assert place.transitions("digits").count("RollingBack") == 1
    assert status["rollbacks"]["total"] == 1
    assert status["attempt"] == (2 if moment_of_death == "halt" else 1)
    assert status["restarts"]["total"] == 0
    assert status["progress"]["step"] == 40


async def test_the_history_has_the_runtimes_own_times(place: Cluster) -> None:
    place.start_operator()
    place.create_run("digits", steps=20, nan_at=7)
    status = await place.phase("digits", "Succeeded")
    begin = next(e for e in status["history"] if e["to"] == "RollingBack")
    end = status["history"][status["history"].index(begin) + 1]
    assert end["from"] == "RollingBack"
    assert abs((moment(end["time"]) - moment(begin["time"])).total_seconds()) < 0.05
