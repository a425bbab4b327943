"""The operator's loop over an API server in memory and in virtual time: what it asks, writes, says and survives."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from esper_leyline import labels
from esper_operator.kube.api import CLAIMS, EVENTS, JOBS, PODS, RUNS, SECRETS, SERVICES, Object
from esper_operator.kube.errors import Conflict, Forbidden, KubeError, NotLeader, Throttled, Transient
from esper_operator.model import RunKey
from esper_operator.testing.fakeapi import Request
from esper_operator.worker import PROGRESS_PERIOD_S, ProgressPace

from tests.support.operatorworld import NAMESPACE, Running, World
from tests.support.virtualtime import run_virtual


def in_world(scenario: Callable[[World, Running], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        running = Running(world, world.api)
        try:
            await scenario(world, running)
        finally:
            await running.cancel()
            await world.close()

    run_virtual(main())


def events(world: World, kind: str = "") -> list[str]:
    return [e["reason"] for e in world.api.all(EVENTS) if kind in ("", e["type"])]


def message(world: World, name: str, kind: str) -> str:
    conditions = world.status(name).get("conditions", [])
    return str(next((c["message"] for c in conditions if c["type"] == kind), ""))


def requests(world: World, verb: str, kind: str) -> list[Request]:
    return [r for r in world.api.requests if (r.verb, r.kind) == (verb, kind)]


def counted(running: Running, name: str, **wanted: str) -> float:
    value = running.operator.reconciler.metrics.registry.get_sample_value(name, wanted)
    return value or 0.0


# --- writes ---


def test_one_status_write_per_transition_and_one_progress_write_in_ten_seconds() -> None:
    async def scenario(world: World, running: Running) -> None:
        world.create_run("digits", steps=60)
        await world.until(lambda: world.phase("digits") == "Succeeded")
        transitions = len(world.status("digits")["history"])
        writes = len(requests(world, "apply_status", "EsperTrainingRun"))
        assert transitions == 4
        assert counted(running, "esper_status_writes_total", cause="transition") <= transitions + 2  # checkpoint, halt
        assert counted(running, "esper_status_writes_total", cause="progress") <= 60 / PROGRESS_PERIOD_S
        assert writes <= transitions + 2 + 6

    in_world(scenario)


@pytest.mark.parametrize("spec", [{"emergencyStop": "Freeze"}, {"emergencyStop": "Checkpoint"}, {"suspend": True}])
def test_a_run_that_rests_costs_no_request(spec: dict[str, Any]) -> None:
    async def scenario(world: World, running: Running) -> None:
        world.create_run("digits", steps=1000)
        await world.until(lambda: world.status("digits").get("progress", {}).get("step", 0) >= 1)
        world.set_spec("digits", **spec)
        await world.until(lambda: world.phase("digits") in ("Halted", "Suspended"))
        await asyncio.sleep(20)
        world.api.requests.clear()
        await asyncio.sleep(300)
        assert [r for r in world.api.requests if r.kind != "Lease"] == []

    in_world(scenario)


def test_progress_of_many_runs_is_spread_over_twenty_writes_a_second() -> None:
    now = 100.0
    pace = ProgressPace(lambda: now)
    keys = [RunKey("team", f"run-{n}") for n in range(400)]
    waits = [pace.reserve(key) for key in keys]
    assert waits[:3] == pytest.approx([0.0, 0.05, 0.10])
    assert waits[-1] == pytest.approx(399 * 0.05)
    assert pace.reserve(keys[7]) == pytest.approx(waits[7])  # its slot is kept for it
    now = 130.0
    pace.wrote(keys[7])
    assert pace.due_in_s(keys[7]) == PROGRESS_PERIOD_S
    assert pace.reserve(keys[7]) >= PROGRESS_PERIOD_S
    pace.forget(keys[7])
    assert pace.due_in_s(keys[7]) == 0


# --- what only other objects show ---


def earlier_service() -> Object:
    owner = {"kind": labels.KIND, "name": "digits", "uid": "of the earlier run", "controller": True}
    metadata = {"namespace": NAMESPACE, "name": "digits", "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata}


def test_a_run_applied_again_starts_when_the_earlier_one_is_gone_and_alarms_nobody() -> None:
    async def scenario(world: World, _: Running) -> None:
        world.api.add(earlier_service())
        world.create_run("digits", steps=3)
        await world.until(lambda: "earlier run" in message(world, "digits", "PodsReady"))
        await asyncio.sleep(5)
        assert (world.phase("digits"), world.api.all(JOBS), events(world)) == ("Pending", [], [])
        assert message(world, "digits", "PodsReady") == (
            "waiting until Service digits of the earlier run of this name is gone"
        )
        world.api.remove(SERVICES, NAMESPACE, "digits")
        await world.until(lambda: world.api.all(JOBS), limit_s=1.2, what="a Job")
        await world.until(lambda: world.phase("digits") == "Succeeded")
        await asyncio.sleep(1)
        assert events(world, "Warning") == []

    in_world(scenario)


def test_the_secret_of_another_run_is_not_mounted_and_ones_own_is() -> None:
    def mounting(name: str) -> Object:
        return {"pod": {"volumes": [{"name": "s", "mountPath": "/data", "secretName": name}]}}

    async def scenario(world: World, _: Running) -> None:
        world.create_run("victim", steps=200)
        await world.until(lambda: world.phase("victim") == "Running")
        world.create_run("thief", workers=mounting("victim-keys"))
        world.create_run("early", workers=mounting("later-keys"))
        await world.until(lambda: world.condition("thief", "Accepted") == "False/InvalidSpec")
        await world.until(lambda: world.condition("early", "Accepted") == "False/InvalidSpec")
        assert "spec.workers.pod.volumes[0].secretName: victim-keys holds credentials of run victim" in message(
            world, "thief", "Accepted"
        )
        assert {job["metadata"]["name"] for job in world.api.all(JOBS)} == {"victim-a1"}
        own = {"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": NAMESPACE, "name": "later-keys"}}
        world.api.add(own)
        await world.until(lambda: world.phase("early") == "Running", what="its own Secret is mounted")
        before = len(requests(world, "get", "Secret"))
        await world.until(lambda: world.phase("early") == "Succeeded")
        assert len(requests(world, "get", "Secret")) == before

    in_world(scenario)


@pytest.mark.parametrize("storage", [{"claimTemplate": {"size": "1Gi"}}, {"claimName": "mine"}])
def test_the_claim_is_looked_at_while_a_pod_waits_for_a_place(storage: Object) -> None:
    name = storage.get("claimName", "digits-checkpoints")

    async def scenario(world: World, _: Running) -> None:
        world.start_pods = False
        if name == "mine":
            claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
            world.api.add({**claim, "metadata": {"namespace": NAMESPACE, "name": name}})
        world.create_run("digits", checkpoint={"storage": storage})
        await world.until(lambda: world.pods("digits"))
        world.api.edit(CLAIMS, NAMESPACE, name, lambda raw: raw.update(status={"phase": "Pending"}))
        said = "pod has unbound immediate PersistentVolumeClaims"
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
        pod = world.pods("digits")[0]["metadata"]["name"]
        world.api.edit(PODS, NAMESPACE, pod, lambda raw: raw["status"].update(conditions=[scheduled]))
        await world.until(lambda: world.condition("digits", "PodsReady") == "False/ClaimPending", limit_s=20)
        assert f"claim {name}" in message(world, "digits", "PodsReady")

    in_world(scenario)


def test_of_two_runs_on_one_claim_the_second_waits_for_the_end_of_the_first() -> None:
    async def scenario(world: World, _: Running) -> None:
        shared = {"storage": {"claimName": "shared", "subPath": "a/b"}}
        same = {"storage": {"claimName": "shared", "subPath": "a//b"}}
        other = {"storage": {"claimName": "shared", "subPath": "c"}}
        world.create_run("first", steps=20, checkpoint=shared)
        await world.until(lambda: world.phase("first") == "Running")
        world.create_run("second", steps=3, checkpoint=same)
        world.create_run("third", steps=3, checkpoint=other)
        await world.until(lambda: world.condition("second", "Accepted") == "False/CheckpointClaimInUse")
        assert "in use by run default/first" in message(world, "second", "Accepted")
        await world.until(lambda: world.phase("third") == "Succeeded")
        assert world.phase("second") == "Pending"
        await world.until(lambda: world.phase("first") == "Succeeded")
        await world.until(lambda: world.phase("second") == "Succeeded", what="the claim is free")
        assert world.status("first")["restarts"]["total"] == world.status("second")["restarts"]["total"] == 0

    in_world(scenario)


# --- errors ---


@contextmanager
def failing(world: World, error: KubeError, *, kind: str = "Job", times: int = 1) -> Iterator[list[Request]]:
    """The next writes of that kind fail."""
    failed: list[Request] = []

    def before(request: Request) -> None:
        if request.writes and request.kind == kind and len(failed) < times:
            failed.append(request)
            raise error

    world.api.before = before
    yield failed
    world.api.before = lambda _: None


@pytest.mark.parametrize(
    ("error", "kind", "result", "within_s"),
    [
        (Transient("overloaded"), "Job", "transient", 5),
        (Throttled("slowly", retry_after_s=7.0), "Job", "throttled", 12),
        (NotLeader("the Lease is not held"), "Job", "not_leader", 5),
        (Conflict("modified"), "EsperTrainingRun", "conflict", 5),
        (Forbidden("no rights"), "EsperTrainingRun", "invalid", 65),
    ],
)
def test_every_error_leads_to_another_look(error: KubeError, kind: str, result: str, within_s: float) -> None:
    async def scenario(world: World, running: Running) -> None:
        with failing(world, error, kind=kind, times=3) as failed:
            world.create_run("digits", steps=3)
            await world.until(lambda: failed)
            await world.until(lambda: world.phase("digits") == "Succeeded", limit_s=3 * within_s + 10)
        assert counted(running, "esper_reconcile_total", result=result) >= 1
        assert counted(running, "esper_reconcile_total", result="bug") == 0
        assert world.status("digits")["attempt"] == 1

    in_world(scenario)


def test_a_bug_in_one_run_stops_no_other_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World, running: Running) -> None:
        def before(request: Request) -> None:
            if request.writes and request.name.startswith("broken"):
                raise ZeroDivisionError("a bug")

        world.api.before = before
        world.create_run("broken", steps=3)
        world.create_run("digits", steps=3)
        await world.until(lambda: world.phase("digits") == "Succeeded")
        assert counted(running, "esper_reconcile_total", result="bug") >= 2
        world.api.before = lambda _: None
        await world.until(lambda: world.phase("broken") == "Succeeded", what="it is tried again")

    in_world(scenario)
    assert any("a bug: the reconcile of default/broken failed" in r.getMessage() for r in caplog.records)


def test_a_refused_job_is_asked_for_again_ever_more_rarely() -> None:
    async def scenario(world: World, _: Running) -> None:
        with failing(world, Forbidden("exceeded quota: jobs"), times=10) as failed:
            world.create_run("digits", steps=3)
            await world.until(lambda: world.condition("digits", "PodsReady") == "False/PodRefused")
            assert message(world, "digits", "PodsReady").startswith(
                "the API server refused Job digits-a1: exceeded quota: jobs"
            )
            await world.until(lambda: len(failed) == 4, limit_s=60)
            assert [e for e in events(world, "Warning")] == ["PodRefused"]
        await world.until(lambda: world.phase("digits") == "Succeeded", limit_s=120)

    in_world(scenario)


def test_a_run_that_is_deleted_leaves_nothing_in_memory() -> None:
    async def scenario(world: World, running: Running) -> None:
        world.create_run("digits", steps=1000)
        await world.until(lambda: world.phase("digits") == "Running")
        world.api.remove(RUNS, NAMESPACE, "digits")
        await asyncio.sleep(5)
        reconciler = running.operator.reconciler
        assert len(running.operator.runs) == 0
        assert running.operator.queue.idle
        assert running.operator.queue.next_timer_s() is None
        assert reconciler.applier._written == {}
        assert reconciler.signals._ledgers == {}
        assert reconciler.intake._inboxes == {}
        assert world.api.all(JOBS) == world.api.all(SECRETS) == []

    in_world(scenario)
