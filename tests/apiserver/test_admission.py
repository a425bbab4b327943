"""What a real API server says to the CRD, to runs, and to the objects that are built of them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from esper_leyline.labels import API_VERSION, PLURAL
from esper_operator import build
from esper_operator.api import crd, restricted
from esper_operator.api.v1alpha1 import Spec
from esper_operator.api.validate import validate
from esper_operator.model import RunKey

from tests.support import hostile, specs
from tests.support.controlplane import ControlPlane, Reply
from tests.support.fields import Spoiled, spoiled
from tests.support.hostile import HostilePod, HostileSpec
from tests.support.specs import RULES, SETTINGS, RuleCase

pytestmark = pytest.mark.apiserver

ROOT = Path(__file__).resolve().parents[2]
RUNS = f"/apis/{API_VERSION}/namespaces"
SCHEMA = crd.manifest()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]


class Runs:
    """Runs of one namespace."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.plane = plane
        self.namespace = namespace
        self.path = f"{RUNS}/{namespace}/{PLURAL}"

    def create(self, spec: Any, *, name: str = "run", query: str = "dryRun=All&fieldValidation=Strict") -> Reply:
        return self.plane.create(self.path, specs.resource(spec, name=name, namespace=self.namespace), query=query)

    def store(self, spec: Any, *, name: str, query: str = "fieldValidation=Strict") -> Reply:
        return self.create(spec, name=name, query=query)

    def edit(self, name: str, patch: Any) -> Reply:
        return self.plane.merge(f"{self.path}/{name}", {"spec": patch})


@pytest.fixture(scope="module")
def plane(control_plane: ControlPlane) -> ControlPlane:
    control_plane.install_crd(crd.manifest())
    return control_plane


@pytest.fixture(scope="module")
def runs(plane: ControlPlane) -> Runs:
    return Runs(plane, plane.namespace("admission"))


# --- the CRD ---------------------------------------------------------------------------------------------------


def test_the_crd_is_structural_and_served(plane: ControlPlane) -> None:
    name = crd.manifest()["metadata"]["name"]
    found = plane.request("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}").body
    conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


def test_the_committed_file_installs_as_it_is(plane: ControlPlane) -> None:
    committed = yaml.safe_load((ROOT / "crds/espertrainingruns.yaml").read_text())
    plane.install_crd(committed)


def test_a_small_manifest_gets_the_same_defaults_as_the_operator_gives(runs: Runs) -> None:
    stored = runs.create(specs.minimal())
    assert stored.ok, stored.message
    assert Spec.parse(stored.body["spec"]) == Spec.parse(specs.minimal())


def test_runs_can_be_selected_by_phase_and_queue(runs: Runs) -> None:
    spec = specs.with_patch({"scheduling": {"queueName": "team"}})
    assert runs.store(spec, name="queued").ok
    listed = runs.plane.request("GET", f"{runs.path}?fieldSelector=spec.scheduling.queueName%3Dteam")
    assert [item["metadata"]["name"] for item in listed.body["items"]] == ["queued"]
    status = {"status": {"phase": "Queued"}}
    assert runs.plane.merge(f"{runs.path}/queued/status", status).ok
    listed = runs.plane.request("GET", f"{runs.path}?fieldSelector=status.phase%3DQueued")
    assert [item["metadata"]["name"] for item in listed.body["items"]] == ["queued"]


# --- fields and rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [specs.full(), specs.full_with_claim()], ids=["template", "claim"])
def test_a_spec_with_every_field_is_stored_unchanged(runs: Runs, document: dict[str, Any]) -> None:
    reply = runs.create(document)
    assert reply.ok, reply.message
    assert Spec.parse(reply.body["spec"]) == Spec.parse(document)


@pytest.mark.timeout(180)
def test_every_spoiled_field_is_refused_with_its_path(runs: Runs) -> None:
    started, count = time.monotonic(), 0
    claim = (case for case in spoiled(SCHEMA, specs.full_with_claim(), "spec") if "claimName" in case.path)
    for case in (*spoiled(SCHEMA, specs.full(), "spec"), *claim):
        reply = runs.create(case.document)
        assert not reply.ok, f"accepted: {case}"
        assert _names(reply, case), f"{case}: {reply.message[:500]}"
        count += 1
    print(f"{count} spoiled fields refused in {time.monotonic() - started:.1f} s")


def _names(reply: Reply, case: Spoiled) -> bool:
    """The API server names the field, or the list or map that it sits in."""
    parts = case.path.split(".")
    last = parts[-1].split("[")[0]
    return any(word in reply.message for word in (last, parts[-2] if len(parts) > 2 else last))


@pytest.mark.parametrize("case", [c for c in RULES if c.before is None], ids=lambda c: c.id)
def test_a_rule_lets_one_through_and_refuses_another(runs: Runs, case: RuleCase) -> None:
    accepted = runs.create(specs.with_patch(case.accepted), name=case.accepted_name)
    assert accepted.ok, accepted.message
    refused = runs.create(specs.with_patch(case.refused), name=case.refused_name)
    assert refused.status == 422
    assert case.message in refused.message


@pytest.mark.parametrize("case", [c for c in RULES if c.before is not None], ids=lambda c: c.id)
def test_a_rule_about_edits_lets_one_through_and_refuses_another(runs: Runs, case: RuleCase) -> None:
    name = f"edit-{RULES.index(case)}"
    assert case.before is not None
    assert runs.store(specs.with_patch(case.before), name=name).ok
    refused = runs.edit(name, case.refused)
    assert refused.status == 422
    assert case.message in refused.message
    accepted = runs.edit(name, case.accepted)
    assert accepted.ok, accepted.message


def test_a_changed_value_in_the_free_form_config_is_an_edit_of_runtime(runs: Runs) -> None:
    assert runs.store(specs.with_patch({"runtime": {"config": {"a": {"b": 1}}}}), name="config").ok
    refused = runs.edit("config", {"runtime": {"config": {"a": {"b": 2}}}})
    assert "`runtime` may only be changed" in refused.message
    refused = runs.edit("config", {"runtime": {"config": {"c": 1}}})
    assert "`runtime` may only be changed" in refused.message


@pytest.mark.parametrize(
    "patch",
    [
        {"health": {"heartbeatTimeoutSeconds": 90}},
        {"rollback": {"maxRollbacks": 9}},
        {"restart": {"maxRestarts": 3}},
        {"checkpoint": {"periodSeconds": 5, "retention": {"keepLatest": 9}}},
        {"suspend": True},
        {"emergencyStop": "Kill"},
        {"ttlSecondsAfterFinished": 5},
    ],
    ids=lambda patch: next(iter(patch)),
)
def test_what_may_change_while_training_may_change(runs: Runs, patch: dict[str, Any]) -> None:
    name = f"free-{next(iter(patch)).lower()}"
    assert runs.store(specs.minimal(), name=name).ok
    reply = runs.edit(name, patch)
    assert reply.ok, reply.message


# --- hostile values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in hostile.SPECS if c.by_api_server], ids=lambda c: c.name)
def test_the_api_server_refuses_a_hostile_spec(runs: Runs, case: HostileSpec) -> None:
    reply = runs.create(specs.with_patch(case.patch))
    assert not reply.ok
    assert reply.message


@pytest.mark.parametrize("case", [c for c in hostile.SPECS if c.unknown_field], ids=lambda c: c.name)
def test_without_strict_validation_nothing_hostile_is_stored(runs: Runs, case: HostileSpec) -> None:
    """Pruned; and what is left builds an admissible pod or is refused by validate()."""
    reply = runs.create(specs.with_patch(case.patch), query="dryRun=All&fieldValidation=Ignore")
    if not reply.ok:
        return
    spec = Spec.parse(reply.body["spec"])
    if validate(spec, RunKey("team", "run"), SETTINGS):
        return
    run = specs.run(reply.body["spec"])
    assert restricted.check(build.job(run, 1, SETTINGS)["spec"]["template"]) == ()


@pytest.mark.parametrize("case", [c for c in hostile.SPECS if not c.by_api_server], ids=lambda c: c.name)
def test_what_only_the_operator_can_judge_reaches_it(runs: Runs, case: HostileSpec) -> None:
    """Kept honest: once the API server refuses one of these, the table must say so."""
    assert runs.create(specs.with_patch(case.patch)).ok


# --- what is built ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restricted_namespace(plane: ControlPlane) -> str:
    return plane.namespace("restricted", {"pod-security.kubernetes.io/enforce": "restricted"})


def _pod_of(spec: dict[str, Any], namespace: str) -> dict[str, Any]:
    """The pod that a Job would make of its template."""
    template = build.job(specs.run(spec, namespace=namespace), 1, SETTINGS)["spec"]["template"]
    metadata = {**template["metadata"], "name": "pod", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("case", [*hostile.PODS, *hostile.HARMLESS], ids=lambda c: c.name)
def test_our_check_and_the_clusters_own_agree(plane: ControlPlane, restricted_namespace: str, case: HostilePod) -> None:
    pod = case.applied(_pod_of(specs.minimal(), restricted_namespace))
    reply = plane.create(f"/api/v1/namespaces/{restricted_namespace}/pods", pod, query="dryRun=All")
    ours = [problem for rule in restricted.STANDARD for problem in rule(pod)]
    if reply.ok:
        assert ours == []
    else:
        assert "violates PodSecurity" in reply.message, reply.message
        assert ours != [], reply.message
    assert reply.ok is not (case in hostile.PODS and case.by_standard)


@pytest.mark.parametrize("make", [specs.minimal, specs.buildable], ids=["minimal", "everything"])
def test_everything_built_is_taken_by_the_api_server(plane: ControlPlane, restricted_namespace: str, make: Any) -> None:
    run = specs.run(make(), namespace=restricted_namespace)
    children = [child.manifest for child in build.children(run, SETTINGS, "other-uid")]
    for manifest in (*children, build.job(run, 1, SETTINGS)):
        group = manifest["apiVersion"]
        root = "/api/v1" if group == "v1" else f"/apis/{group}"
        path = f"{root}/namespaces/{restricted_namespace}/{_plural(manifest['kind'])}"
        reply = plane.create(path, manifest, query="dryRun=All&fieldValidation=Strict")
        assert reply.ok, f"{manifest['kind']}: {reply.message}"


def _plural(kind: str) -> str:
    return {"PersistentVolumeClaim": "persistentvolumeclaims"}.get(kind, kind.lower() + "s")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_is_admitted(plane: ControlPlane, runs: Runs, path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "EsperTrainingRun":
            reply = runs.create(document["spec"], name=document["metadata"]["name"])
        else:
            where = f"/api/v1/namespaces/{runs.namespace}/{_plural(document['kind'])}"
            reply = plane.create(where, document, query="dryRun=All&fieldValidation=Strict")
        assert reply.ok, reply.message


def test_figure_crd_size(plane: ControlPlane) -> None:
    committed = json.dumps(crd.manifest(), separators=(",", ":"))
    print(f"CRD: {len(committed.encode())} bytes of JSON; KUBE_ASSETS={os.environ['KUBE_ASSETS']}")
    assert len(committed.encode()) <= 60 * 1024
