"""Runs that came past the CRD: an older or a tampered one lets everything through. The operator judges again by itself,
on a real API server that would store anything."""

from collections.abc import AsyncIterator
from copy import deepcopy
from typing import Any

import pytest
import pytest_asyncio
from esper_operator.api import crd

from tests.apiserver.operators import Cluster, cluster, run_manifest
from tests.support import hostile, specs
from tests.support.controlplane import running
from tests.support.hostile import HostileSpec

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
SHAPES: dict[str, Any] = {
    "no spec": None,
    "a spec of no fields": {},
    "text for a section": {"runtime": "all of it", "checkpoint": {}},
    "a list for a section": {**specs.minimal(), "workers": [1, 2, 3]},
    "a number for text": {**specs.minimal(), "runtime": {"entrypoint": 5}},
    "text for a number": {**specs.minimal(), "restart": {"maxRestarts": "many"}},
}


def permissive() -> dict[str, Any]:
    """The CRD without a schema, rules or anything else that would say no."""
    manifest = deepcopy(crd.manifest())
    (version,) = manifest["spec"]["versions"]
    version["schema"] = {
        "openAPIV3Schema": {
            **ANYTHING,
            "properties": {"spec": {"x-kubernetes-preserve-unknown-fields": True}, "status": ANYTHING},
        }
    }
    version.pop("selectableFields")
    return manifest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wild(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """An API server of its own with that CRD, and an operator."""
    with running(tmp_path_factory.mktemp("wild")) as plane:
        plane.install_crd(permissive())
        async with cluster(plane, tmp_path_factory.mktemp("operator"), with_redis=False) as made:
            await made.leading_operator()
            yield made


def store(wild: Cluster, name: str, spec: Any) -> None:
    manifest = {**run_manifest(name), "spec": spec}
    if spec is None:
        del manifest["spec"]
    reply = wild.plane.create(wild.path(), manifest, query="fieldValidation=Ignore")
    assert reply.ok, reply.message


async def refused(wild: Cluster, name: str) -> str:
    """Waits for the condition; its message."""
    await wild.sees(name, lambda s: s.get("conditions"), "a word about it")
    accepted = wild.condition(name, "Accepted")
    assert accepted["status"] == "False", accepted
    assert accepted["reason"] in ("InvalidSpec", "Unsupported")
    assert not wild.children("jobs", name)
    assert not wild.children("configmaps", name)
    return str(accepted["message"])


@pytest.mark.parametrize("case", hostile.SPECS, ids=lambda case: case.name)
async def test_a_hostile_spec_makes_no_job_and_says_which_field(wild: Cluster, case: HostileSpec) -> None:
    name = "run" if "keys" in str(case.patch) and not case.by_api_server else f"run-{hostile.SPECS.index(case)}"
    store(wild, name, specs.with_patch(case.patch))
    said = await refused(wild, name)
    assert said.startswith("spec.")
    assert len(said) <= 4096


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_spec_of_another_shape_makes_no_job_and_says_which_field(wild: Cluster, shape: str) -> None:
    name = f"shape-{list(SHAPES).index(shape)}"
    store(wild, name, SHAPES[shape])
    assert (await refused(wild, name)).startswith("spec")


async def test_a_status_that_somebody_made_up_is_put_right(wild: Cluster) -> None:
    store(wild, "liar", specs.minimal())
    await wild.until(lambda: wild.created("jobs", "liar"), "its Job")
    lies = {"status": {"phase": "Succeeded", "attempt": "seven", "history": "none", "conditions": 5, "more": [1]}}
    assert wild.plane.merge(wild.path("liar", "status"), lies).ok
    status = await wild.sees("liar", lambda s: s.get("attempt") == 1 and s["phase"] != "Succeeded", "the truth")
    assert isinstance(status["history"], list)
    assert wild.created("jobs", "liar") == {"liar-a1": 1}


async def test_nothing_was_tried_twice_and_one_event_was_said_for_each(wild: Cluster) -> None:
    """Of the hostile runs above: what is refused is left alone until somebody changes it."""
    store(wild, "last", {**specs.minimal(), "runtime": {"entrypoint": "nonsense"}})
    await refused(wild, "last")
    await wild.until(lambda: wild.events("last", "InvalidSpec"), "the Event")
    names = [item["metadata"]["name"] for item in wild.items(wild.path())]
    bad = [name for name in names if wild.condition(name, "Accepted")["status"] == "False"]
    for name in bad:
        assert len(wild.events(name)) == 1, wild.events(name)
    assert wild.operator.running
    assert not wild.operator.said("a bug")


async def test_a_run_that_is_mended_starts_with_the_right_crd(wild: Cluster) -> None:
    """The stored objects are older than the schema; the API server and the operator go on with them."""
    store(wild, "mended", {**specs.minimal(), "workers": {"pod": {"hostNetwork": True}}})
    assert "spec.workers.pod.hostNetwork" in await refused(wild, "mended")
    wild.plane.install_crd(crd.manifest())
    wild.set_spec("mended", workers={"pod": {"hostNetwork": None}})
    await wild.until(lambda: wild.created("jobs", "mended"), "its Job")
    assert wild.condition("mended", "Accepted")["status"] == "True"
