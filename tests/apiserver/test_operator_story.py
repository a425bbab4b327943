"""A run from apply to its end on a real API server: transitions, rollback, suspension, crash, deletion, broadcast."""

import pytest
from esper_leyline import labels

from tests.apiserver.operators import Cluster

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]


async def test_a_run_trains_rolls_back_and_succeeds(colony: Cluster) -> None:
    colony.create_run("digits", steps=20, nan_at=7)
    status = await colony.phase("digits", "Succeeded")
    moves = [(e.get("from"), e["to"], e["reason"]) for e in status["history"]]
    rolled = moves.index(("Running", "RollingBack", "NonFiniteLoss"))
    assert moves[rolled + 1] == ("RollingBack", "Running", "RolledBack")
    assert [to for _, to, _ in moves if to not in ("Pending", "Starting")] == [
        "Running", "RollingBack", "Running", "Succeeded",
    ]  # fmt: skip
    assert (status["rollbacks"]["total"], status["progress"]["step"], status["attempt"]) == (1, 20, 1)
    recovery = status["lastRecovery"]
    assert (recovery["kind"], recovery["cause"]) == ("InProcess", "NonFiniteLoss")
    assert (recovery["fromStep"], recovery["toStep"]) == (7, 6)
    assert (recovery["detectMilliseconds"], recovery["recoverMilliseconds"]) == (1, 20)
    assert colony.condition("digits", "Complete")["status"] == "True"
    assert colony.condition("digits", "RolledBack")["status"] == "True"
    await colony.until(lambda: colony.events("digits", "Complete"), "the last Event")
    for reason in ("JobCreated", "Training", "RolledBack", "Complete"):
        assert len(colony.events("digits", reason)) == 1, reason
    colony.assert_nothing_doubled("digits")


async def test_suspend_releases_the_pods_and_goes_on(colony: Cluster) -> None:
    colony.create_run("rest", steps=40)
    await colony.stepped("rest", 12)
    colony.set_spec("rest", suspend=True)
    await colony.phase("rest", "Suspended")
    await colony.until(
        lambda: not colony.children("pods", "rest") and not colony.children("jobs", "rest"), "no pods, no Job"
    )
    saved = colony.node.training("rest").saved_step
    assert saved >= 12
    colony.set_spec("rest", suspend=False)
    status = await colony.phase("rest", "Succeeded")
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["counted"]) == (2, 0, 0)
    assert status["progress"]["step"] == 40
    assert colony.node.steps_of("rest", 2) == 40 - saved
    colony.assert_nothing_doubled("rest")


async def test_a_crash_leads_to_the_next_attempt(colony: Cluster) -> None:
    colony.create_run("crash", steps=30, restart={"initialBackoffSeconds": 0})
    await colony.stepped("crash", 8)
    (pod,) = colony.node.pod_names("crash")
    await colony.node.crash(pod, 70)
    status = await colony.phase("crash", "Succeeded")
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["counted"]) == (2, 1, 1)
    failure = status["lastFailure"]
    assert (failure["podName"], failure["containerName"]) == (pod, labels.TOLARIA)
    assert (failure["exitCode"], failure["rank"]) == (70, 0)
    assert colony.transitions("crash").count("Restarting") == 1
    colony.assert_nothing_doubled("crash")


async def test_a_deleted_run_leaves_only_its_claim(colony: Cluster) -> None:
    retained = {"claimTemplate": {"size": "1Gi", "whenDeleted": "Retain"}}
    colony.create_run("gone", steps=1000, checkpoint={"storage": retained})
    await colony.stepped("gone", 3)
    colony.delete_run("gone")
    kinds = ("jobs", "pods", "services", "configmaps", "secrets")
    await colony.until(lambda: not any(colony.children(kind, "gone") for kind in kinds), "children are gone")
    (claim,) = colony.children("persistentvolumeclaims", "gone")
    assert (claim["metadata"]["name"], claim["metadata"].get("ownerReferences")) == ("gone-checkpoints", None)


async def test_a_run_takes_its_claim_along_when_it_is_told_to(colony: Cluster) -> None:
    owned = {"claimTemplate": {"size": "1Gi", "whenDeleted": "Delete"}}
    colony.create_run("whole", steps=1000, checkpoint={"storage": owned})
    await colony.stepped("whole", 1)
    uid = colony.uid("whole")
    (claim,) = colony.children("persistentvolumeclaims", "whole")
    assert [owner["uid"] for owner in claim["metadata"]["ownerReferences"]] == [uid]
    colony.delete_run("whole")

    def leaving() -> bool:
        claims = colony.children("persistentvolumeclaims", "whole")
        return all("deletionTimestamp" in c["metadata"] for c in claims)  # protected while a pod may use it

    await colony.until(leaving, "the claim goes too")


async def test_a_broadcast_halts_the_runs_that_it_selects(colony: Cluster) -> None:
    for name in ("red", "blue"):
        colony.create_run(name, steps=1000)
    assert colony.plane.merge(colony.path("red"), {"metadata": {"labels": {"team": "red"}}}).ok
    await colony.stepped("red", 3)
    await colony.stepped("blue", 3)
    broadcast = {
        "metadata": {"name": labels.EMERGENCY_CONFIG_MAP},
        "data": {
            "red": "mode: Freeze\nselector: {matchLabels: {team: red}}\nreason: a test\n",
            "broken": "mode: [",
        },
    }
    config_maps = f"/api/v1/namespaces/{colony.namespace}/configmaps"
    assert colony.plane.create(config_maps, broadcast).ok
    status = await colony.phase("red", "Halted")
    assert (status["halt"]["source"], status["halt"]["mode"], status["halt"]["acknowledged"]) == (
        "Broadcast", "Freeze", 1,
    )  # fmt: skip
    assert colony.status("blue")["phase"] == "Running"
    name = labels.EMERGENCY_CONFIG_MAP
    await colony.until(lambda: any("data.broken" in e["note"] for e in colony.events(name)), "an Event")
    assert colony.plane.request("DELETE", f"{config_maps}/{name}").ok
    await colony.phase("red", "Running")
