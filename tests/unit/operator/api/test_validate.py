"""Rules across fields: each refused with the field and the remedy, each let through when it holds."""

import datetime
import re
from typing import Any

import pytest
from esper_leyline.reasons import RunReason
from esper_operator.api.v1alpha1 import FieldError, Spec
from esper_operator.api.validate import CHECKS, validate
from esper_operator.model import Problem, RunKey, Settings

from tests.support import specs
from tests.support.specs import RULES, SETTINGS, RuleCase

KEY = RunKey("team", "run")


def problems(patch: dict[str, Any], *, name: str = "run", settings: Settings = SETTINGS) -> tuple[Problem, ...]:
    spec = Spec.parse(specs.with_patch(patch))
    return validate(spec, RunKey("team", name), settings)


def invalid(found: tuple[Problem, ...]) -> list[str]:
    return [str(problem) for problem in found if problem.reason is RunReason.INVALID_SPEC]


@pytest.mark.parametrize("case", [c for c in RULES if c.said_by_validate], ids=lambda c: c.id)
def test_every_creation_rule_of_the_crd_is_said_here_too(case: RuleCase) -> None:
    assert invalid(problems(case.accepted, name=case.accepted_name)) == []
    where = re.escape(case.path.replace("[]", "")).replace(r"\.", r"\.")
    try:
        refused = invalid(problems(case.refused, name=case.refused_name))
    except FieldError as error:
        refused = [str(error)]
    assert any(re.match(where, problem) for problem in refused), refused


def limits(**amounts: Any) -> dict[str, Any]:
    return {"workers": {"resources": {"limits": amounts}}}


def requests(**amounts: Any) -> dict[str, Any]:
    return {"workers": {"resources": {"requests": amounts}}}


def pod(**fields: Any) -> dict[str, Any]:
    return {"workers": {"pod": fields}}


def volumes(*mounts: dict[str, Any]) -> dict[str, Any]:
    return pod(volumes=[{"name": f"v{i}", "claimName": "data", **mount} for i, mount in enumerate(mounts)])


def node_affinity(**requirement: Any) -> dict[str, Any]:
    terms = [{"matchExpressions": [{"key": "zone", **requirement}]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    return pod(affinity={"nodeAffinity": required})


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "config too long": (
        {"runtime": {"config": {"a": "x" * 66_000}}}, "spec.runtime.config", "at most 65536 are allowed",
    ),
    "config not JSON": (
        {"runtime": {"config": {"when": datetime.date(2026, 1, 1)}}},
        "spec.runtime.config", "cannot be written as JSON",
    ),
    "config not a number": ({"runtime": {"config": {"a": float("nan")}}}, "spec.runtime.config", "as JSON"),
    "variable twice": (
        {"runtime": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}},
        "spec.runtime.env[1].name", "is there twice",
    ),
    "variable of torchrun": (
        {"runtime": {"env": [{"name": "MASTER_ADDR", "value": "1"}]}},
        "spec.runtime.env[0].name", "set by the operator",
    ),
    "the run's own keys as a variable": (
        {"runtime": {"env": [{"name": "A", "secretKeyRef": {"name": "run-keys", "key": "tamiyo.key"}}]}},
        "spec.runtime.env[0].secretKeyRef.name", "operator's credentials",
    ),
    "memory limit below the sum": (
        {"workers": {"resources": {"limits": {"memory": "2Gi"}}, "sharedMemorySize": "2Gi"}},
        "spec.workers.resources.limits.memory", "sharedMemorySize 2Gi + 512Mi for the trainer = 2560Mi",
    ),
    "negative limit": (limits(cpu="-1"), "spec.workers.resources.limits.cpu", "must be at least 0"),
    "absurd exponent": (limits(cpu="1e99"), "spec.workers.resources.limits.cpu", "exponent"),
    "unknown resource": (limits(gpu=1), "spec.workers.resources.limits.gpu", "nvidia.com/gpu"),
    "request above the limit": (
        {"workers": {"resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}}},
        "spec.workers.resources.requests.cpu", "greater than the limit 1",
    ),
    "device requested without a limit": (
        {"workers": {"resources": {"requests": {"nvidia.com/gpu": 1}}}},
        "spec.workers.resources.requests.nvidia.com/gpu", "must equal the limit",
    ),
    "no shared memory": ({"workers": {"sharedMemorySize": 0}}, "spec.workers.sharedMemorySize", "at least 1Mi"),
    "bad label key": (pod(labels={"not a key": "x"}), "spec.workers.pod.labels.not a key", "no valid key"),
    "endless label key": (pod(nodeSelector={"a" * 64: "x"}), "spec.workers.pod.nodeSelector.", "no valid key"),
    "label of the Job controller": (pod(labels={"job-name": "x"}), "spec.workers.pod.labels.job-name", "operator's"),
    "toleration without key": (
        pod(tolerations=[{"effect": "NoSchedule"}]), "spec.workers.pod.tolerations[0]", "operator: Exists",
    ),
    "toleration with a useless value": (
        pod(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
        "spec.workers.pod.tolerations[0]", "takes no value",
    ),
    "toleration for a time": (
        pod(tolerations=[{"key": "a", "operator": "Exists", "tolerationSeconds": 5}]),
        "spec.workers.pod.tolerations[0]", "NoExecute",
    ),
    "affinity In nothing": (node_affinity(operator="In"), "spec.workers.pod.affinity.nodeAffinity", "needs values"),
    "affinity Exists in something": (
        node_affinity(operator="Exists", values=["a"]), "spec.workers.pod.affinity.nodeAffinity", "takes no values",
    ),
    "affinity Gt text": (
        node_affinity(operator="Gt", values=["a"]), "spec.workers.pod.affinity.nodeAffinity", "a whole number",
    ),
    "affinity on a field that is none": (
        pod(
            affinity={
                "nodeAffinity": {
                    "preferredDuringSchedulingIgnoredDuringExecution": [
                        {"weight": 1, "preference": {"matchFields": [{"key": "spec.x", "operator": "Exists"}]}}
                    ]
                }
            }
        ),
        "spec.workers.pod.affinity.nodeAffinity.preferred", "metadata.name",
    ),
    "pod affinity In nothing": (
        pod(
            affinity={
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [
                        {"topologyKey": "zone", "labelSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}
                    ]
                }
            }
        ),
        "spec.workers.pod.affinity.podAntiAffinity.required", "needs values",
    ),
    "volume twice": (
        pod(
            volumes=[
                {"name": "a", "mountPath": "/a", "claimName": "x"},
                {"name": "a", "mountPath": "/b", "claimName": "y"},
            ]
        ),
        "spec.workers.pod.volumes[1].name", "is there twice",
    ),
    "the run's own keys as a volume": (
        volumes({"mountPath": "/k", "claimName": None, "secretName": "run-keys"}),
        "spec.workers.pod.volumes[0].secretName", "operator's credentials",
    ),
    "the way to Redis as a volume": (
        volumes({"mountPath": "/k", "claimName": None, "secretName": "run-bus"}),
        "spec.workers.pod.volumes[0].secretName", "operator's credentials",
    ),
    "empty directory of no size": (
        volumes({"mountPath": "/k", "claimName": None, "emptyDirSize": "0"}),
        "spec.workers.pod.volumes[0].emptyDirSize", "at least 1",
    ),
    "one volume inside another": (
        volumes({"mountPath": "/data"}, {"mountPath": "/data/more"}),
        "spec.workers.pod.volumes[1].mountPath", "side by side",
    ),
    "a volume on the checkpoints": (
        volumes({"mountPath": "/checkpoints"}), "spec.workers.pod.volumes[0].mountPath", "side by side",
    ),
    "a claim of no size": (
        {"checkpoint": {"storage": {"claimTemplate": {"size": "-1Gi"}}}},
        "spec.checkpoint.storage.claimTemplate.size", "at least 1",
    ),
    "resuming from itself": (
        {"checkpoint": {"storage": {"claimTemplate": None, "claimName": "c"}, "resumeFrom": {"runName": "run"}}},
        "spec.checkpoint.resumeFrom.runName", "this run itself",
    ),
    "a learning rate of zero": (
        {"rollback": {"learningRateScale": "0.0"}}, "spec.rollback.learningRateScale", "end all learning",
    ),
    "a threshold of zero": (
        {"health": {"lossSpike": {"threshold": "0"}}}, "spec.health.lossSpike.threshold", "above 0",
    ),
    "a channel twice": ({"emergency": {"channels": ["Redis", "Redis"]}}, "spec.emergency.channels", "twice"),
    "an exit code twice": (
        {"restart": {"exitCodes": [{"action": "Fail", "values": [3, 3]}]}},
        "spec.restart.exitCodes[0].values", "twice",
    ),
    "a fault at a rank that is none": (
        {"faultInjection": [{"kind": "Crash", "step": 1, "rank": 1}]}, "spec.faultInjection[0].rank", "0 to 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("patch", "field", "words"), REFUSED.values(), ids=REFUSED)
def test_a_bad_value_is_refused(patch: dict[str, Any], field: str, words: str) -> None:
    found = invalid(problems(patch))
    assert len(found) == 1, found
    assert found[0].startswith(field)
    assert words in found[0]


ACCEPTED: dict[str, dict[str, Any]] = {
    "the sum exactly": {"workers": {"resources": {"limits": {"memory": "2560Mi"}}, "sharedMemorySize": "2Gi"}},
    "a GPU": limits(**{"nvidia.com/gpu": 1}),
    "huge pages": limits(**{"hugepages-2Mi": "128Mi"}),
    "volumes side by side": volumes({"mountPath": "/data"}, {"mountPath": "/data2"}),
    "volume names of our own": pod(volumes=[{"name": "run", "mountPath": "/mine", "claimName": "x"}]),
    "any taint": pod(tolerations=[{"operator": "Exists"}]),
    "greater than": node_affinity(operator="Gt", values=["3"]),
    "another secret": volumes({"mountPath": "/k", "claimName": None, "secretName": "other-keys"}),
    "HOME": {"runtime": {"env": [{"name": "HOME", "value": "/scratch"}]}},
    "64 KiB of config": {"runtime": {"config": {"a": "x" * (65_536 - len('{"a": ""}'))}}},
}


@pytest.mark.parametrize("patch", ACCEPTED.values(), ids=ACCEPTED)
def test_a_good_value_is_let_through(patch: dict[str, Any]) -> None:
    assert problems(patch) == ()


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "spec.workers.count": {"workers": {"count": 2}},
    "spec.workers.elastic": {"workers": {"elastic": {"minCount": 1, "maxCount": 2}}},
    "spec.workers.processesPerWorker": {"workers": {"processesPerWorker": 2}},
    "spec.scheduling.gang": {"scheduling": {"gang": "Volcano"}},
    "spec.checkpoint.memory.mode": {"checkpoint": {"memory": {"mode": "Replicated"}}},
    "spec.restart.avoidFailedNodes": {"restart": {"avoidFailedNodes": "Always"}},
}


@pytest.mark.parametrize(("field", "patch"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_what_is_not_there_yet_is_refused_and_says_so(field: str, patch: dict[str, Any]) -> None:
    (problem,) = problems(patch)
    assert problem.field == field
    assert problem.reason is RunReason.UNSUPPORTED
    assert "this version does not do that yet" in problem.message


def test_faults_need_the_operators_permission() -> None:
    patch = {"faultInjection": [{"kind": "Crash", "step": 1}]}
    assert problems(patch) == ()
    strict = Settings(runtime_image="r", sidecar_image="s", fault_injection=False)
    (problem,) = problems(patch, settings=strict)
    assert problem.reason is RunReason.FAULT_INJECTION_DISABLED
    assert "faultInjection.enabled=true" in problem.message


def test_all_problems_are_reported_at_once() -> None:
    patch = specs.merged(limits(cpu="-1"), {"workers": {"count": 3}, "rollback": {"learningRateScale": "0"}})
    assert len(problems(patch)) == 3


def test_a_run_of_this_version_with_everything_set_is_valid() -> None:
    assert validate(Spec.parse(specs.buildable()), KEY, SETTINGS) == ()


def test_every_check_can_fail() -> None:
    """No check is dead: each finds something in one of the tables above."""
    patches = [patch for patch, _, _ in REFUSED.values()] + list(UNSUPPORTED.values())
    patches += [case.refused for case in RULES if case.said_by_validate]
    patches.append({"faultInjection": [{"kind": "Crash", "step": 1, "rank": 9}]})
    idle = set(CHECKS)
    for patch in patches:
        try:
            spec = Spec.parse(specs.with_patch(patch))
        except FieldError:
            continue
        idle = {check for check in idle if not list(check(spec, RunKey("team", "Bad"), SETTINGS))}
    assert idle == set()
