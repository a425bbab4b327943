"""Carrying a plan out: in order, at most once, and nothing of somebody else's."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from functools import wraps
from inspect import signature
from typing import Any

import pytest
from esper_leyline import labels
from esper_leyline.phases import EmergencyStop, HaltSource
from esper_leyline.reasons import RunReason
from esper_operator.apply import Applier
from esper_operator.kube.api import CONFIG_MAPS, JOBS, PODS, RUNS, SECRETS, SERVICES, Object
from esper_operator.kube.errors import Forbidden, Invalid, KubeError, Transient
from esper_operator.model import Applied, Deletion, Plan, SignalOrder, Verdict
from esper_operator.signals import Signals
from esper_operator.testing.builders import Scene, a_run, pod_manifest
from esper_operator.testing.fakeapi import FakeApi, Request

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RESOURCES = {r.kind: r for r in (RUNS, JOBS, PODS, SECRETS, CONFIG_MAPS, SERVICES)}
CHILDREN = {
    "Secret digits-keys", "Secret digits-bus", "ConfigMap digits-config", "ConfigMap digits-emergency",
    "PersistentVolumeClaim digits-checkpoints", "Service digits",
}  # fmt: skip


class Bench:
    """An Applier over an API server in memory."""

    def __init__(self) -> None:
        self.api = FakeApi(now=lambda: NOW)
        self.learned: list[Object] = []
        self.scene = replace(a_run(), settings=replace(a_run().settings, bus_url="redis://bus:6379"))
        self.restart()

    def restart(self) -> None:
        """A new operator: it remembers nothing."""
        self.signals = Signals(
            self.api,
            seed=self.scene.settings.key_seed,
            generation=1,
            term=lambda: 1,
            now=lambda: NOW,
            monotonic=lambda: 0.0,
        )
        self.applier = Applier(self.api, self.signals, on_job=self.learned.append)

    async def apply(self, scene: Scene | None = None, plan: Plan | None = None) -> Applied:
        seen = (scene or self.scene).seen()
        return await self.applier.apply(seen, plan or (scene or self.scene).plan())

    def written(self) -> list[str]:
        found = [f"{r.verb} {r.kind} {r.name}" for r in self.api.writes]
        self.api.requests.clear()
        return found

    def refuse(self, kind: str, error: KubeError) -> None:
        def before(request: Request) -> None:
            if request.writes and request.kind == kind:
                raise error

        self.api.before = before

    def leave_behind(self, kind: str, name: str, owner: Object | None) -> None:
        metadata: Object = {"namespace": self.scene.namespace, "name": name}
        if owner is not None:
            metadata["ownerReferences"] = [owner]
        version = "batch/v1" if kind == "Job" else "v1"
        self.api.add({"apiVersion": version, "kind": kind, "metadata": metadata})


def of_run(uid: str, name: str = "digits") -> Object:
    return {"kind": labels.KIND, "name": name, "uid": uid, "controller": True}


def with_bench(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Gives the test its Bench, inside an event loop."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            await test(Bench(), *args, **kwargs)

        asyncio.run(main())

    parameters = list(signature(test).parameters.values())[1:]
    run.__signature__ = signature(test).replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


@with_bench
async def test_the_job_comes_last_and_nothing_is_written_twice(bench: Bench) -> None:
    assert await bench.apply() == Applied()
    written = bench.written()
    assert written[-1] == "create Job digits-a1"
    assert {name.split(" ", 1)[1] for name in written[:-1]} == CHILDREN
    assert [job["metadata"]["name"] for job in bench.learned] == ["digits-a1"]
    converged = bench.scene.with_job(1)
    await bench.apply(converged)
    assert bench.written() == []
    bench.restart()
    await bench.apply(converged.having(status={"observedGeneration": 1, "attempt": 1}))
    assert bench.written() == []


@with_bench
async def test_only_what_changed_is_written(bench: Bench) -> None:
    await bench.apply()
    bench.written()
    await bench.apply(bench.scene.with_job(1).edited(health={"progressTimeoutSeconds": 99}))
    assert bench.written() == ["apply ConfigMap digits-config"]


@with_bench
async def test_what_somebody_changed_or_deleted_is_mended_at_the_next_doubt(bench: Bench) -> None:
    await bench.apply()
    namespace = bench.scene.namespace
    bench.api.edit(CONFIG_MAPS, namespace, "digits-config", lambda raw: raw["data"].update({"run.json": "{}"}))
    bench.api.remove(SERVICES, namespace, "digits")
    bench.written()
    bench.applier.doubt(bench.scene.uid)
    await bench.apply(bench.scene.with_job(1).having(status={"observedGeneration": 1, "attempt": 1}))
    assert sorted(bench.written()) == ["apply ConfigMap digits-config", "apply Service digits"]


@with_bench
async def test_a_signal_in_the_emergency_config_map_is_not_overwritten(bench: Bench) -> None:
    await bench.apply()
    namespace = bench.scene.namespace
    bench.api.edit(CONFIG_MAPS, namespace, "digits-emergency", lambda raw: raw.update(data={"signal": "x"}))
    bench.restart()
    await bench.apply(bench.scene.with_job(1))
    assert bench.api.find(CONFIG_MAPS, namespace, "digits-emergency")["data"] == {"signal": "x"}  # type: ignore[index]


def keys_of(bench: Bench) -> Object:
    found = bench.api.find(SECRETS, bench.scene.namespace, "digits-keys")
    assert found is not None
    return found


@with_bench
async def test_a_rotation_writes_the_keys_of_a_run_once_and_an_older_operator_leaves_them(bench: Bench) -> None:
    def of(generation: int) -> Scene:
        settings = replace(bench.scene.settings, key_generation=generation)
        scene = replace(bench.scene, settings=settings).with_job(1)
        return scene.having(status={"observedGeneration": 1, "attempt": 1})

    await bench.apply()
    first = keys_of(bench)["data"]
    for generation in (2, 2, 1):
        bench.restart()
        bench.written()
        await bench.apply(of(generation))
        written = [each for each in bench.written() if "digits-keys" in each]
        assert (written == ["create Secret digits-keys", "apply Secret digits-keys"]) == (
            keys_of(bench)["data"] != first
        )
        first = keys_of(bench)["data"]
    assert keys_of(bench)["metadata"]["annotations"][labels.KEY_GENERATION] == "2"


# --- objects that are not ours ---


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Service", "digits"), ("ConfigMap", "digits-config"), ("ConfigMap", "digits-emergency"),
        ("Secret", "digits-keys"), ("Secret", "digits-bus"), ("Job", "digits-a1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("owner", [None, of_run("somebody", "other")], ids=["nobody's", "another run's"])
@with_bench
async def test_an_object_of_somebody_else_is_not_touched(bench: Bench, kind: str, name: str, owner: Object) -> None:
    bench.leave_behind(kind, name, owner)
    before = bench.api.find(RESOURCES[kind], bench.scene.namespace, name)
    result = await bench.apply()
    assert result.refused == (f"{kind} {name}: it exists and does not belong to this run: delete it, or rename the run")
    assert result.waiting == ""
    assert bench.api.find(RESOURCES[kind], bench.scene.namespace, name) == before
    if kind != "Job":
        assert bench.api.all(JOBS) == []


@pytest.mark.parametrize(("kind", "name"), [("Service", "digits"), ("Secret", "digits-keys"), ("Job", "digits-a1")])
@with_bench
async def test_what_an_earlier_run_of_the_name_left_is_waited_for(bench: Bench, kind: str, name: str) -> None:
    bench.leave_behind(kind, name, of_run("uid-of-the-earlier-run"))
    result = await bench.apply()
    assert result == Applied(waiting=f"waiting until {kind} {name} of the earlier run of this name is gone")
    assert bench.learned == []
    bench.api.remove(RESOURCES[kind], bench.scene.namespace, name)
    assert await bench.apply() == Applied()
    assert [job["metadata"]["name"] for job in bench.learned] == ["digits-a1"]


@with_bench
async def test_a_claim_that_outlived_its_run_is_used_again(bench: Bench) -> None:
    bench.leave_behind("PersistentVolumeClaim", "digits-checkpoints", None)
    assert await bench.apply() == Applied()


@with_bench
async def test_a_job_that_is_there_already_is_adopted_when_it_is_ours(bench: Bench) -> None:
    bench.leave_behind("Job", "digits-a1", of_run(bench.scene.uid))
    assert await bench.apply() == Applied()
    assert [job["metadata"]["name"] for job in bench.learned] == ["digits-a1"]


# --- refusals and failures ---


@pytest.mark.parametrize("error", [Forbidden("exceeded quota: jobs"), Invalid("not like this")])
@pytest.mark.parametrize(("kind", "name"), [("Job", "digits-a1"), ("Service", "digits")])
@with_bench
async def test_a_refusal_is_in_the_result_and_names_the_object(
    bench: Bench, kind: str, name: str, error: KubeError
) -> None:
    bench.refuse(kind, error)
    assert await bench.apply() == Applied(refused=f"{kind} {name}: {error}")
    assert bench.api.all(JOBS) == []
    bench.api.before = lambda _: None
    assert await bench.apply() == Applied()


@with_bench
async def test_a_refusal_without_end_is_cut(bench: Bench) -> None:
    bench.refuse("Job", Forbidden("x" * 100_000))
    assert len((await bench.apply()).refused) == 1024


@with_bench
async def test_a_stop_is_sent_and_a_job_deleted_although_children_fail(bench: Bench) -> None:
    await bench.apply()
    job = bench.learned[0]["metadata"]
    plan = Plan(
        verdict=Verdict(RunReason.HALT_REQUESTED, ""),
        children=bench.scene.edited(health={"progressTimeoutSeconds": 99}).plan().children,
        signal=SignalOrder(mode=EmergencyStop.KILL, source=HaltSource.SPEC, reason="", attempt=1),
        deletions=(Deletion(kind="Job", name=job["name"], uid=job["uid"]),),
    )

    def before(request: Request) -> None:
        if request.verb == "apply":
            raise Transient("overloaded")

    bench.api.before = before
    bench.written()
    with pytest.raises(Transient):
        await bench.apply(plan=plan)
    assert bench.written()[-2:] == ["patch ConfigMap digits-emergency", "delete Job digits-a1"]


# --- deletions and touches ---


@with_bench
async def test_only_that_very_job_is_deleted(bench: Bench) -> None:
    await bench.apply()
    other = Deletion(kind="Job", name="digits-a1", uid="of another one")
    gone = Deletion(kind="Job", name="digits-a7", uid="x")
    await bench.apply(plan=Plan(verdict=Verdict(RunReason.SUSPENDED, ""), deletions=(other, gone)))
    assert [job["metadata"]["name"] for job in bench.api.all(JOBS)] == ["digits-a1"]


@with_bench
async def test_pods_with_an_older_configuration_are_touched_and_no_others(bench: Bench) -> None:
    scene = bench.scene.reconciled()
    for number, (state, digest) in enumerate([("training", "old"), ("training", "new"), ("pending", "old")]):
        raw = pod_manifest(scene, state, attempt=1, number=number, config_hash=digest)
        bench.api.add({"apiVersion": "v1", "kind": "Pod", **raw})
        scene = scene.having(pods=(*scene.pods, raw))
    bench.written()
    await bench.apply(scene, Plan(verdict=Verdict(RunReason.CONFIG_CHANGED, ""), touch_pods="new"))
    assert bench.written() == [f"patch Pod {scene.pods[0]['metadata']['name']}"]
