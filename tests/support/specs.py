"""Specs for tests: the smallest one, ones with every field set, and a case for each rule of the CRD."""

import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from esper_operator.api.v1alpha1 import Spec, Status
from esper_operator.model import Run, RunKey, Settings

JsonDict = dict[str, Any]

SEED = bytes(range(32))
SETTINGS = Settings(
    runtime_image="esper/runtime:test",
    sidecar_image="esper/sidecar:test",
    key_seed=SEED,
    bus_url="redis://valkey.esper-system:6379/0",
    bus_username="pods",
    bus_password="open sesame",
    fault_injection=True,
)
UID = "0f5b4b0e-6a0e-4b62-9a5b-1f1d2c3b4a59"


def minimal() -> JsonDict:
    """All that a manifest needs."""
    return {
        "runtime": {"entrypoint": "package.module:build"},
        "checkpoint": {"storage": {"claimTemplate": {"size": "1Gi"}}},
    }


def merged(spec: JsonDict, patch: JsonDict) -> JsonDict:
    """`spec` with `patch` merged in, as kubectl's merge patch does: None removes, lists are replaced."""
    result = copy.deepcopy(spec)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def with_patch(patch: JsonDict) -> JsonDict:
    return merged(minimal(), patch)


def resource(spec: JsonDict, *, name: str = "run", namespace: str = "default") -> JsonDict:
    return {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "EsperTrainingRun",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def run(spec: JsonDict | None = None, *, name: str = "run", namespace: str = "team") -> Run:
    """A run as `observe` would give it."""
    return Run(
        key=RunKey(namespace, name),
        uid=UID,
        generation=1,
        resource_version="1",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        deleting=False,
        labels={},
        spec=Spec.parse(spec or minimal()),
        status=Status(),
    )


def _node_term() -> JsonDict:
    return {
        "matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a100", "h100"]}],
        "matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["broken-node"]}],
    }


def _pod_term() -> JsonDict:
    return {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {
            "matchLabels": {"team": "vision"},
            "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["batch"]}],
        },
        "namespaces": ["other"],
    }


def full() -> JsonDict:
    """Every field of the spec set, with `claimTemplate`."""
    return {
        "suspend": True,
        "managedBy": "esper.dev/operator",
        "emergencyStop": "Freeze",
        "activeDeadlineSeconds": 86400,
        "startupDeadlineSeconds": 600,
        "ttlSecondsAfterFinished": 3600,
        "runtime": {
            "image": "registry.example.com/team/image@sha256:" + "0" * 64,
            "imagePullPolicy": "Always",
            "entrypoint": "package.module:build",
            "config": {"epochs": 3, "layers": [1, 2], "nested": {"deep": None}},
            "codeConfigMapName": "code",
            "profiler": {"firstStep": 20, "activeSteps": 5, "everySteps": 100, "repeat": 2},
            "env": [
                {"name": "PLAIN", "value": "x"},
                {"name": "SECRET", "secretKeyRef": {"name": "secrets", "key": "token"}},
                {"name": "MAP", "configMapKeyRef": {"name": "maps", "key": "value"}},
            ],
        },
        "workers": {
            "count": 2,
            "processesPerWorker": 2,
            "elastic": {"minCount": 1, "maxCount": 4},
            "resources": {
                "limits": {"nvidia.com/gpu": 1, "memory": "8Gi"},
                "requests": {"cpu": "500m", "memory": "2Gi"},
            },
            "sharedMemorySize": "2Gi",
            "pod": {
                "labels": {"team": "vision"},
                "annotations": {"team.example.com/note": "hello"},
                "nodeSelector": {"pool": "gpu"},
                "tolerations": [
                    {
                        "key": "nvidia.com/gpu",
                        "operator": "Equal",
                        "value": "present",
                        "effect": "NoExecute",
                        "tolerationSeconds": 60,
                    }
                ],
                "affinity": {
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [_node_term()]},
                        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 5, "preference": _node_term()}],
                    },
                    "podAntiAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": [_pod_term()],
                        "preferredDuringSchedulingIgnoredDuringExecution": [
                            {"weight": 7, "podAffinityTerm": _pod_term()}
                        ],
                    },
                },
                "runtimeClassName": "nvidia",
                "imagePullSecrets": [{"name": "registry"}],
                "volumes": [
                    {
                        "name": "data",
                        "mountPath": "/data",
                        "subPath": "train/v1",
                        "readOnly": True,
                        "claimName": "data",
                    },
                    {"name": "map", "mountPath": "/map", "configMapName": "map"},
                    {"name": "secret", "mountPath": "/secret", "secretName": "secret"},
                    {"name": "scratch", "mountPath": "/scratch", "readOnly": False, "emptyDirSize": "1Gi"},
                ],
            },
        },
        "checkpoint": {
            "storage": {
                "claimTemplate": {
                    "storageClassName": "fast",
                    "accessMode": "ReadWriteOncePod",
                    "size": "10Gi",
                    "whenDeleted": "Delete",
                },
                "mountPath": "/state",
                "subPath": "team/run",
            },
            "everySteps": 100,
            "periodSeconds": 30,
            "memory": {"mode": "Replicated", "everySteps": 5, "snapshots": 4, "maxSize": "512Mi"},
            "verification": "Load",
            "retention": {
                "keepLatest": 2,
                "keepBest": 2,
                "keepEverySteps": 1000,
                "maxAgeSeconds": 604800,
                "maxSize": "50Gi",
                "metric": "accuracy",
                "mode": "Max",
            },
            "resumeFrom": {"runName": "earlier", "step": 100, "select": "LatestVerified"},
        },
        "health": {
            "heartbeatTimeoutSeconds": 30,
            "progressTimeoutSeconds": 300,
            "nonFiniteAction": "Halt",
            "lossSpike": {"action": "Ignore", "windowSteps": 50, "threshold": "4.5", "consecutiveSteps": 2},
            "gradientNorm": {"action": "Halt", "factor": "7.5", "consecutiveSteps": 4},
            "validation": {"action": "Rollback", "maxDrop": "0.1"},
        },
        "rollback": {
            "maxRollbacks": 5,
            "windowSeconds": 3600,
            "target": "LatestVerified",
            "learningRateScale": "0.5",
            "skipBatches": "None",
            "onExhausted": "Fail",
            "fastDeadlineMilliseconds": 250,
            "fullDeadlineSeconds": 5,
        },
        "restart": {
            "maxRestarts": 2,
            "resetAfterSeconds": 60,
            "initialBackoffSeconds": 1,
            "maxBackoffSeconds": 10,
            "strategy": "Recreate",
            "avoidFailedNodes": "Always",
            "disruptionsCount": True,
            "exitCodes": [{"action": "Fail", "values": [3, 4]}],
            "terminationGracePeriodSeconds": 30,
        },
        "emergency": {"channels": ["ConfigMap"], "acknowledgeTimeoutSeconds": 5},
        "faultInjection": [{"kind": "SlowStep", "step": 3, "rank": 0, "milliseconds": 50}],
        "scheduling": {"queueName": "team-queue", "priorityClassName": "high", "gang": "Kueue"},
        "succeedWhen": "FirstWorker",
    }


def full_with_claim() -> JsonDict:
    """The same on a claim that the user names."""
    return merged(full(), {"checkpoint": {"storage": {"claimTemplate": None, "claimName": "team-state"}}})


def buildable() -> JsonDict:
    """As much of it as this version does."""
    return merged(
        full_with_claim(),
        {
            "workers": {"count": 1, "processesPerWorker": "auto", "elastic": None},
            "checkpoint": {"memory": {"mode": "Local"}},
            "restart": {"avoidFailedNodes": "Never"},
            "scheduling": {"gang": "None"},
        },
    )


@dataclass(frozen=True)
class RuleCase:
    """One CEL rule: where it stands, how its message begins, and what it lets through and what not."""

    path: str
    message: str
    accepted: JsonDict
    refused: JsonDict
    before: JsonDict | None = None
    """For rules about edits: the spec that is stored before; the two others are edits of it."""
    accepted_name: str = "run"
    refused_name: str = "run"
    said_by_validate: bool = True
    """False for rules about edits: validate() sees no earlier spec, and `observe` judges by hashes."""

    @property
    def id(self) -> str:
        return f"{self.path}: {self.message}"


def _volume(**changes: Any) -> JsonDict:
    volume = {"name": "data", "mountPath": "/data", "claimName": "data"} | changes
    return {"workers": {"pod": {"volumes": [{k: v for k, v in volume.items() if v is not None}]}}}


def _env(**changes: Any) -> JsonDict:
    return {"runtime": {"env": [{"name": "MINE", "value": "x"} | changes]}}


def _storage(**changes: Any) -> JsonDict:
    return {"checkpoint": {"storage": changes}}


def _resume(source: JsonDict) -> JsonDict:
    return {"checkpoint": {"storage": {"claimTemplate": None, "claimName": "mine"}, "resumeFrom": source}}


def _managed(by: str | None) -> JsonDict:
    return {"managedBy": by}


_VOLUMES = "spec.workers.pod.volumes[]"

RULES = (
    RuleCase("metadata.name", "metadata.name must be at most", {}, {}, accepted_name="a" * 46, refused_name="a" * 47),
    RuleCase("metadata.name", "metadata.name must be an RFC 1035", {}, {}, accepted_name="a-1", refused_name="1-a"),
    RuleCase(
        "spec", "`managedBy` may not be added", {"suspend": True}, _managed("esper.dev/operator"),
        before={}, said_by_validate=False,
    ),
    RuleCase(
        "spec", "`runtime` may only be changed",
        {"runtime": {"config": {"epochs": 2}}, "suspend": True}, {"runtime": {"config": {"epochs": 2}}},
        before={"runtime": {"config": {"epochs": 1}}}, said_by_validate=False,
    ),
    RuleCase(
        "spec", "`workers` may only be changed",
        {"workers": {"sharedMemorySize": "2Gi"}, "emergencyStop": "Checkpoint"},
        {"workers": {"sharedMemorySize": "2Gi"}, "emergencyStop": "Freeze"},
        before={}, said_by_validate=False,
    ),
    RuleCase(
        "spec", "`checkpoint.storage` is immutable",
        {"checkpoint": {"periodSeconds": 5}}, _storage(claimTemplate={"size": "2Gi"}),
        before={}, said_by_validate=False,
    ),
    RuleCase(
        "spec.managedBy", "field is immutable", {"suspend": True}, _managed("kueue.x-k8s.io/multikueue"),
        before=_managed("esper.dev/operator"), said_by_validate=False,
    ),
    RuleCase("spec.managedBy", "must be 'esper.dev/operator'", _managed("esper.dev/operator"), _managed("me")),
    RuleCase("spec.runtime.env[]", "`name` may not begin with ESPER_", _env(name="ESPERANTO"), _env(name="ESPER_X")),
    RuleCase(
        "spec.runtime.env[]", "exactly one of `value`", _env(value=""),
        _env(secretKeyRef={"name": "secret", "key": "key"}),
    ),
    RuleCase(
        "spec.workers", "`count` must be between",
        {"workers": {"count": 2, "elastic": {"minCount": 1, "maxCount": 2}}},
        {"workers": {"count": 3, "elastic": {"minCount": 1, "maxCount": 2}}},
    ),
    RuleCase(
        "spec.workers.processesPerWorker", "must be 'auto'",
        {"workers": {"processesPerWorker": 64}}, {"workers": {"processesPerWorker": "many"}},
    ),
    RuleCase(
        "spec.workers.pod.labels", "labels of esper.dev/",
        {"workers": {"pod": {"labels": {"team": "a"}}}}, {"workers": {"pod": {"labels": {"esper.dev/run": "b"}}}},
    ),
    RuleCase(
        "spec.workers.pod.annotations", "annotations of esper.dev/",
        {"workers": {"pod": {"annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}}}},
        {"workers": {"pod": {"annotations": {"container.apparmor.security.beta.kubernetes.io/x": "unconfined"}}}},
    ),
    RuleCase(_VOLUMES, "exactly one of `claimName`", _volume(), _volume(secretName="x")),
    RuleCase(_VOLUMES, "`mountPath` may not be a system path", _volume(mountPath="/runs"), _volume(mountPath="/run/x")),
    RuleCase(
        _VOLUMES, "`mountPath` may not contain '.'", _volume(mountPath="/data/..x"), _volume(mountPath="/data/../etc")
    ),
    RuleCase(_VOLUMES, "`subPath` must be relative", _volume(subPath="a/b..c"), _volume(subPath="a/../../b")),
    RuleCase(
        "spec.checkpoint.storage", "exactly one of `claimName` and",
        _storage(claimTemplate=None, claimName="mine"), _storage(claimName="mine"),
    ),
    RuleCase(
        "spec.checkpoint.storage", "`mountPath` may not be a system path", _storage(mountPath="/state"),
        _storage(mountPath="/etc/esper"),
    ),
    RuleCase(
        "spec.checkpoint.storage", "`mountPath` may not contain '.'", _storage(mountPath="/state/.x"),
        _storage(mountPath="/state/./x"),
    ),
    RuleCase("spec.checkpoint.storage", "`subPath` must be relative", _storage(subPath="a"), _storage(subPath="/a")),
    RuleCase(
        "spec.checkpoint.resumeFrom", "`step` and `select: Best`",
        _resume({"runName": "a", "step": 1}),
        _resume({"runName": "a", "step": 1, "select": "Best"}),
    ),
    RuleCase(
        "spec.restart", "`initialBackoffSeconds` must not be greater",
        {"restart": {"initialBackoffSeconds": 300}}, {"restart": {"initialBackoffSeconds": 301}},
    ),
    RuleCase(
        "spec.faultInjection[]", "`kind: SlowStep` needs `milliseconds`",
        {"faultInjection": [{"kind": "SlowStep", "step": 1, "milliseconds": 5}]},
        {"faultInjection": [{"kind": "SlowStep", "step": 1}]},
    ),
)  # fmt: skip
