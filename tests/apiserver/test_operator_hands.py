"""What people do to runs and their objects while they train: edits, deletions, collisions. Each heals or says so."""

from typing import Any

import pytest
from esper_leyline import labels
from esper_operator.api import crd

from tests.apiserver.operators import Cluster, run_manifest

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

FOREVER = 100_000


def finish(colony: Cluster, run: str) -> None:
    """Lets the run end a few steps from now."""
    training = colony.node.training(run)
    training.total_steps = training.step + 3


def delete(colony: Cluster, kind: str, name: str) -> None:
    group = "apis/batch/v1" if kind == "jobs" else "api/v1"
    path = f"/{group}/namespaces/{colony.namespace}/{kind}/{name}"
    assert colony.plane.request("DELETE", path, {"propagationPolicy": "Background"}).ok


def names(colony: Cluster, kind: str, run: str) -> set[str]:
    return {item["metadata"]["name"] for item in colony.children(kind, run)}


# --- edits --------------------------------------------------------------------------------------------------------


async def test_an_edit_that_is_allowed_reaches_the_running_pod(colony: Cluster) -> None:
    colony.create_run("edited", steps=FOREVER)
    await colony.trains("edited", 1)
    (pod,) = colony.children("pods", "edited")
    before = pod["metadata"]["annotations"][labels.CONFIG_HASH]
    checkpoint = {"storage": {"claimTemplate": {"size": "1Gi"}}, "everySteps": 7}
    colony.set_spec("edited", checkpoint=checkpoint)

    def touched() -> bool:
        (now,) = colony.children("pods", "edited")
        config = colony.get("configmaps", labels.config_map_name("edited"))
        mark = now["metadata"]["annotations"][labels.CONFIG_HASH]
        same = mark == config["metadata"]["annotations"][labels.CONFIG_HASH] and '"everySteps":7' in config["data"][
            "run.json"
        ].replace(" ", "")
        return mark != before and same and now["metadata"]["uid"] == pod["metadata"]["uid"]

    await colony.until(touched, "the pod's mounts are refreshed")
    await colony.sees("edited", lambda s: s["observedGeneration"] == 2, "the generation is observed")
    assert colony.status("edited")["phase"] == "Running"
    assert len(colony.created("jobs", "edited")) == 1


async def test_an_edit_that_is_not_allowed_is_refused_with_its_reason(colony: Cluster) -> None:
    colony.create_run("fixed", steps=FOREVER)
    await colony.trains("fixed", 1)
    refused = colony.plane.merge(colony.path("fixed"), {"spec": {"runtime": {"entrypoint": "other:build"}}})
    assert refused.status == 422
    assert "`runtime` may only be changed while `suspend` is true" in refused.message
    assert colony.status("fixed")["phase"] == "Running"


# --- deletions ----------------------------------------------------------------------------------------------------


async def test_a_job_deleted_by_hand_is_made_again(colony: Cluster) -> None:
    """The same attempt goes on in another pod, once the first one is gone."""
    colony.create_run("jobless", steps=FOREVER)
    await colony.trains("jobless", 1)
    delete(colony, "jobs", "jobless-a1")
    await colony.until(lambda: len(colony.node.pod_names("jobless")) == 2, "another pod")
    await colony.trains("jobless", 1)
    finish(colony, "jobless")
    status = await colony.phase("jobless", "Succeeded")
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["counted"]) == (1, 1, 0)
    assert "Restarting" in colony.transitions("jobless")
    assert colony.created("jobs", "jobless") == {"jobless-a1": 2}


async def test_children_deleted_by_hand_are_there_again_before_the_next_pod_needs_them(colony: Cluster) -> None:
    colony.create_run("robbed", steps=FOREVER, restart={"initialBackoffSeconds": 0})
    await colony.trains("robbed", 1)
    secrets, maps = names(colony, "secrets", "robbed"), names(colony, "configmaps", "robbed")
    assert {labels.keys_secret_name("robbed"), labels.bus_secret_name("robbed")} <= secrets
    assert {labels.config_map_name("robbed"), labels.emergency_config_map_name("robbed")} <= maps
    for kind, found in (("secrets", secrets), ("configmaps", maps), ("services", {"robbed"})):
        for name in found:
            delete(colony, kind, name)
    (pod,) = colony.node.pod_names("robbed")
    await colony.node.crash(pod, 70)
    await colony.trains("robbed", 2)
    assert names(colony, "secrets", "robbed") == secrets
    assert names(colony, "configmaps", "robbed") == maps
    assert names(colony, "services", "robbed") == {"robbed"}
    finish(colony, "robbed")
    await colony.phase("robbed", "Succeeded")


async def test_a_halt_makes_the_emergency_config_map_again(colony: Cluster) -> None:
    colony.create_run("deaf", steps=FOREVER)
    await colony.trains("deaf", 1)
    for mode in ("Freeze", "Freeze", "Checkpoint"):
        delete(colony, "configmaps", labels.emergency_config_map_name("deaf"))
        colony.set_spec("deaf", emergencyStop=mode)
        status = await colony.phase("deaf", "Halted")
        assert (status["halt"]["mode"], status["halt"]["acknowledged"]) == (mode, 1)
        owner = colony.get("configmaps", labels.emergency_config_map_name("deaf"))["metadata"]["ownerReferences"]
        assert [o["uid"] for o in owner] == [colony.uid("deaf")]
        if mode == "Freeze":
            delete(colony, "configmaps", labels.emergency_config_map_name("deaf"))
            colony.set_spec("deaf", emergencyStop="None")
            await colony.phase("deaf", "Running")
    (pod,) = colony.node.pod_names("deaf")
    assert [s.seq for s in colony.node.signals_of(pod)] == [1, 2, 3, 4, 5]


async def test_a_freeze_is_lifted_although_its_record_and_its_operator_are_gone(colony: Cluster) -> None:
    colony.create_run("thaws", steps=FOREVER)
    await colony.trains("thaws", 1)
    colony.set_spec("thaws", emergencyStop="Freeze")
    await colony.phase("thaws", "Halted")
    colony.operator.kill()
    delete(colony, "configmaps", labels.emergency_config_map_name("thaws"))
    colony.set_spec("thaws", emergencyStop="None")
    await colony.leading_operator()
    step = colony.node.training("thaws").step
    await colony.stepped("thaws", step + 2)
    assert (await colony.phase("thaws", "Running"))["attempt"] == 1


async def test_a_pod_deleted_by_hand_is_replaced(colony: Cluster) -> None:
    colony.create_run("podless", steps=FOREVER)
    await colony.trains("podless", 1)
    (first,) = colony.node.pod_names("podless")
    delete(colony, "pods", first)
    await colony.until(lambda: len(colony.node.pod_names("podless")) == 2, "its Job makes another")
    step = colony.node.training("podless").step
    await colony.stepped("podless", step + 3)
    status = await colony.phase("podless", "Running")
    assert (status["attempt"], status["restarts"]["counted"]) == (1, 0)


# --- collisions and refusals --------------------------------------------------------------------------------------


async def test_an_object_of_somebody_else_is_named_and_left_alone(colony: Cluster) -> None:
    path = f"/api/v1/namespaces/{colony.namespace}/configmaps"
    theirs = {"metadata": {"name": labels.config_map_name("taken")}, "data": {"theirs": "yes"}}
    assert colony.plane.create(path, theirs).ok
    colony.create_run("taken", steps=5)

    def said(status: dict[str, Any]) -> bool:
        messages = [c["message"] for c in status.get("conditions", []) if c["status"] == "False"]
        return any("taken-config" in m and "delete it, or rename the run" in m for m in messages)

    await colony.sees("taken", said, "a condition that names it")
    assert not colony.created("jobs", "taken")
    assert colony.get("configmaps", "taken-config")["data"] == {"theirs": "yes"}
    delete(colony, "configmaps", "taken-config")
    await colony.phase("taken", "Succeeded")


async def test_the_second_run_on_a_claim_waits_for_the_first(colony: Cluster) -> None:
    storage = {"checkpoint": {"storage": {"claimName": "shared", "subPath": "same"}}}
    colony.create_run("first", steps=FOREVER, **storage)
    await colony.trains("first", 1)
    colony.create_run("second", steps=5, **storage)
    await colony.sees("second", lambda s: s.get("reason") == "CheckpointClaimInUse", "the refusal")
    accepted = colony.condition("second", "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "CheckpointClaimInUse")
    assert f"{colony.namespace}/first" in accepted["message"]
    assert "subPath" in accepted["message"]
    assert not colony.created("jobs", "second")
    finish(colony, "first")
    await colony.phase("first", "Succeeded")
    await colony.phase("second", "Succeeded")


async def test_two_workers_are_refused_for_now(colony: Cluster) -> None:
    colony.create_run("pair", workers={"count": 2})
    await colony.sees("pair", lambda s: s.get("reason") == "Unsupported", "the refusal")
    accepted = colony.condition("pair", "Accepted")
    assert accepted["status"] == "False"
    assert "spec.workers.count" in accepted["message"]
    assert "set it to 1" in accepted["message"]
    assert not colony.created("jobs", "pair")
    colony.set_spec("pair", suspend=True)
    colony.set_spec("pair", workers={"count": 1})
    colony.set_spec("pair", suspend=False)
    await colony.trains("pair", 1)


async def test_runs_of_other_namespaces_are_left_alone(colony: Cluster) -> None:
    elsewhere = colony.plane.namespace("elsewhere")
    path = colony.path().replace(colony.namespace, elsewhere)
    assert colony.plane.create(path, run_manifest("far")).ok
    colony.create_run("near", steps=5)
    await colony.phase("near", "Succeeded")
    (far,) = colony.plane.request("GET", path).body["items"]
    assert "status" not in far
    agents = {
        event["userAgent"]
        for event in colony.plane.audit()
        if event.get("objectRef", {}).get("namespace") == elsewhere and event["objectRef"].get("apiGroup") != ""
    }
    assert not [agent for agent in agents if agent.startswith(("esper", "kopf"))]


async def test_runs_work_again_once_a_crd_that_was_deleted_is_back(colony: Cluster) -> None:
    """Kopf does not survive that and the process ends with it; the next one waits for the CRD."""
    colony.create_run("doomed", steps=FOREVER)
    await colony.trains("doomed", 1)
    name = crd.manifest()["metadata"]["name"]
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
    first = colony.operator
    assert colony.plane.request("DELETE", path).ok
    await colony.until(lambda: colony.plane.request("GET", path).status == 404, "the CRD is gone")
    await colony.until(lambda: not first.running, "the operator ends")
    assert first.process.returncode == 1
    second = colony.start_operator()
    await colony.until(lambda: second.said("their CRD is not installed"), "the next one says what it waits for")
    assert "caches: not filled yet" in second.get("/readyz")
    colony.plane.install_crd(crd.manifest())
    colony.create_run("after", steps=5)
    await colony.phase("after", "Succeeded")
    assert second.running
