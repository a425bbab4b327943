"""The Job and its pod: golden manifests for whole specs, and the promises that they must keep one by one."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from esper_leyline import env, labels, ports
from esper_leyline.paths import GID, UIDS, PathLayout
from esper_operator import build
from esper_operator.api import restricted
from esper_operator.model import Settings

from tests.support import specs

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
UPDATE = "ESPER_UPDATE_GOLDEN"
GPU = {
    "workers": {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}},
        "pod": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]},
    },
    "scheduling": {"queueName": "team-queue"},
}
SPECS = {"minimal": specs.minimal(), "everything": specs.buildable(), "gpu-queue": specs.with_patch(GPU)}


def job(
    patch: dict[str, Any] | None = None, *, attempt: int = 1, settings: Settings = specs.SETTINGS
) -> dict[str, Any]:
    return build.job(specs.run(specs.with_patch(patch or {})), attempt, settings)


def pod_spec(patch: dict[str, Any] | None = None, settings: Settings = specs.SETTINGS) -> dict[str, Any]:
    found: dict[str, Any] = job(patch, settings=settings)["spec"]["template"]["spec"]
    return found


def containers(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in (*spec["initContainers"], *spec["containers"])}


def environment(container: dict[str, Any]) -> dict[str, Any]:
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names)), "a name twice is refused by server-side apply"
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", SPECS)
def test_the_job_is_as_agreed(name: str) -> None:
    """ESPER_UPDATE_GOLDEN=1 writes the files anew; read the difference before you commit it."""
    path = GOLDEN / f"job-{name}.yaml"
    built = build.job(specs.run(SPECS[name]), 2, specs.SETTINGS)
    if os.environ.get(UPDATE):
        path.write_text(yaml.safe_dump(built, sort_keys=False, width=120))
    assert built == yaml.safe_load(path.read_text()), f"{path.name} differs; {UPDATE}=1 writes it anew"


@pytest.mark.parametrize("name", SPECS)
def test_the_job_is_valid_kubernetes_and_restricted(name: str) -> None:
    run = specs.run(SPECS[name])
    kubernetes_validate.validate(build.job(run, 1, specs.SETTINGS), "1.34", strict=True)
    assert restricted.check(build.job(run, 1, specs.SETTINGS)["spec"]["template"]) == ()


def test_a_drained_pod_is_replaced_and_any_other_failure_ends_the_attempt() -> None:
    found = job()["spec"]
    assert found["backoffLimit"] == 0
    assert found["podReplacementPolicy"] == "Failed"
    disrupted, drained, failed = found["podFailurePolicy"]["rules"]
    assert (disrupted["action"], disrupted["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    on_drained = {"containerName": "tolaria", "operator": "In", "values": [143]}
    assert (drained["action"], drained["onExitCodes"]) == ("Ignore", on_drained)
    assert (failed["action"], failed["onExitCodes"]["operator"]) == ("FailJob", "NotIn")


def test_one_indexed_pod_per_worker() -> None:
    found = job({"workers": {"count": 4}})["spec"]
    assert (found["completionMode"], found["completions"], found["parallelism"]) == ("Indexed", 4, 4)


def test_workers_know_where_the_first_one_is() -> None:
    spec = pod_spec({"workers": {"count": 4}})
    variables = environment(containers(spec)["tolaria"])
    assert spec["subdomain"] == "run"
    assert variables["MASTER_ADDR"] == "run-a1-0.run"
    assert variables["MASTER_PORT"] == str(ports.RENDEZVOUS)
    assert "MASTER_ADDR" not in environment(containers(pod_spec())["tolaria"])


def test_a_queue_gets_a_suspended_job_with_its_label() -> None:
    found = job(GPU)
    assert found["metadata"]["labels"][labels.QUEUE_NAME] == "team-queue"
    assert found["spec"]["suspend"] is True
    assert labels.QUEUE_NAME not in found["spec"]["template"]["metadata"]["labels"]
    assert "suspend" not in job()["spec"]


def test_names_carry_the_attempt() -> None:
    found = job(attempt=7)
    assert found["metadata"]["name"] == "run-a7"
    assert found["spec"]["template"]["metadata"]["labels"][labels.ATTEMPT] == "7"
    assert environment(containers(found["spec"]["template"]["spec"])["tamiyo"])[env.ATTEMPT] == "7"


@pytest.mark.row("K63")
def test_sidecars_are_native_and_in_order() -> None:
    spec = pod_spec()
    assert [c["name"] for c in spec["initContainers"]] == ["weatherlight", "kasmina", "tamiyo"]
    for sidecar in spec["initContainers"]:
        assert sidecar["restartPolicy"] == "Always"
        assert sidecar["command"] == ["python", "-m", f"esper_runtime.{sidecar['name']}"]
        assert sidecar["image"] == "esper/sidecar:test"
        assert sidecar["startupProbe"]["httpGet"]["path"] == "/livez"
        assert sidecar["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert sidecar["livenessProbe"]["httpGet"]["port"] == int(environment(sidecar)[env.HTTP_PORT])
    assert [c["name"] for c in spec["containers"]] == ["tolaria"]


def test_kubectl_logs_finds_the_trainer() -> None:
    annotations = job()["spec"]["template"]["metadata"]["annotations"]
    assert annotations["kubectl.kubernetes.io/default-container"] == "tolaria"


@pytest.mark.row("K63")
def test_every_container_has_a_user_of_its_own_and_the_common_group() -> None:
    spec = pod_spec()
    assert spec["securityContext"]["fsGroup"] == GID
    assert {name: c["securityContext"]["runAsUser"] for name, c in containers(spec).items()} == UIDS
    assert {c["securityContext"]["runAsGroup"] for c in containers(spec).values()} == {GID}


@pytest.mark.row("K63")
def test_each_container_mounts_only_its_own_secrets() -> None:
    spec = pod_spec({"runtime": {"codeConfigMapName": "code"}})
    by_container = {name: set(mounts(c)) - {"run", "tmp", "config"} for name, c in containers(spec).items()}
    assert by_container == {
        "weatherlight": {"keys-weatherlight", "bus", "emergency"},
        "kasmina": {"keys-kasmina"},
        "tamiyo": {"keys-tamiyo"},
        "tolaria": {"shm", "checkpoints", "code"},
    }
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    items = {name: [i["key"] for i in volumes[f"keys-{name}"]["secret"]["items"]] for name in labels.SIDECARS}
    assert items == {
        "weatherlight": ["report.key", "operator.pub"],
        "kasmina": ["tamiyo.pub"],
        "tamiyo": ["tamiyo.key"],
    }


def test_only_who_owns_it_may_write_to_it() -> None:
    for container in containers(pod_spec()).values():
        writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        extra = {"shm", "checkpoints"} if container["name"] == "tolaria" else set()
        assert writable == {"run", "tmp"} | extra


def test_the_emergency_record_is_mounted_so_that_the_kubelet_refreshes_it() -> None:
    (mount,) = [m for m in containers(pod_spec())["weatherlight"]["volumeMounts"] if m["name"] == "emergency"]
    assert "subPath" not in mount


def test_memory_volumes_have_their_sizes() -> None:
    volumes = {v["name"]: v for v in pod_spec({"workers": {"sharedMemorySize": "3Gi"}})["volumes"]}
    assert volumes["run"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Mi"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}


def test_a_run_without_redis_still_starts() -> None:
    (bus,) = [v for v in pod_spec()["volumes"] if v["name"] == "bus"]
    assert bus["secret"]["optional"] is True


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, {"requests": {"cpu": "500m", "memory": "1Gi"}}),
        ({"limits": {"memory": "4Gi"}}, {"requests": {"cpu": "500m"}, "limits": {"memory": "4Gi"}}),
        ({"requests": {"cpu": "2"}}, {"requests": {"cpu": "2", "memory": "1Gi"}}),
        (
            {"limits": {"nvidia.com/gpu": 2, "cpu": "4", "memory": "8Gi"}},
            {"requests": {}, "limits": {"nvidia.com/gpu": "2", "cpu": "4", "memory": "8Gi"}},
        ),
    ],
)
def test_the_trainer_gets_what_is_asked_and_a_little_where_nothing_is(
    resources: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert containers(pod_spec({"workers": {"resources": resources}}))["tolaria"]["resources"] == expected


def test_a_run_fits_a_small_node() -> None:
    requests = [c["resources"]["requests"] for c in containers(pod_spec()).values()]
    cpu = sum(int(r["cpu"].removesuffix("m")) for r in requests)
    assert cpu <= 600


def test_own_image_and_its_pull_policy_are_the_trainers_only() -> None:
    found = containers(pod_spec({"runtime": {"image": "mine:1", "imagePullPolicy": "Always"}}))
    assert (found["tolaria"]["image"], found["tolaria"]["imagePullPolicy"]) == ("mine:1", "Always")
    assert (found["tamiyo"]["image"], found["tamiyo"]["imagePullPolicy"]) == ("esper/sidecar:test", "IfNotPresent")


def test_the_operators_image_follows_the_operators_pull_policy() -> None:
    settings = replace(specs.SETTINGS, image_pull_policy="Always", image_pull_secrets=("one", "two"))
    spec = pod_spec({"workers": {"pod": {"imagePullSecrets": [{"name": "two"}, {"name": "three"}]}}}, settings)
    assert {c["imagePullPolicy"] for c in containers(spec).values()} == {"Always"}
    assert spec["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}, {"name": "three"}]


def test_the_users_variables_come_last_and_may_replace_a_default() -> None:
    variables = [
        {"name": "HOME", "value": "/scratch"},
        {"name": "TOKEN", "secretKeyRef": {"name": "s", "key": "k"}},
        {"name": "MODE", "configMapKeyRef": {"name": "m", "key": "k"}},
    ]
    found = environment(containers(pod_spec({"runtime": {"env": variables}}))["tolaria"])
    assert list(found)[-3:] == ["HOME", "TOKEN", "MODE"]
    assert found["HOME"] == "/scratch"
    assert found["TOKEN"] == {"secretKeyRef": {"name": "s", "key": "k"}}
    assert found["MODE"] == {"configMapKeyRef": {"name": "m", "key": "k"}}


def test_the_users_labels_never_replace_ours() -> None:
    run = specs.run(specs.with_patch({"workers": {"pod": {"labels": {"team": "a"}, "annotations": {"b": "c"}}}}))
    metadata = build.job(run, 1, specs.SETTINGS)["spec"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["labels"][labels.RUN_UID] == specs.UID
    assert metadata["annotations"]["b"] == "c"


def test_the_users_volumes_never_meet_ours() -> None:
    volumes = [{"name": name, "mountPath": f"/{name}-data", "emptyDirSize": "1Mi"} for name in ("run", "tmp", "config")]
    spec = pod_spec({"workers": {"pod": {"volumes": volumes}}})
    names = [volume["name"] for volume in spec["volumes"]]
    assert len(names) == len(set(names))
    assert {"data-run", "data-tmp", "data-config"} <= set(names)


def test_every_variable_that_the_operator_sets_is_reserved() -> None:
    for container in containers(pod_spec({"workers": {"count": 2}, "runtime": {"codeConfigMapName": "c"}})).values():
        for name in environment(container):
            free_to_replace = ("HOME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
            assert name in env.RESERVED or name in free_to_replace


def test_the_trainer_is_told_everything() -> None:
    found = environment(containers(pod_spec({"runtime": {"codeConfigMapName": "c"}}))["tolaria"])
    expected = {
        env.RUN: "run",
        env.NAMESPACE: "team",
        env.RUN_UID: specs.UID,
        env.ATTEMPT: "1",
        env.WORLD_SIZE: "1",
        env.GRACE_SECONDS: "120",
        env.CONFIG_FILE: "/etc/esper/config/run.json",
        env.RUN_DIR: "/run/esper",
        env.SHM_DIR: "/dev/shm",
        env.CHECKPOINT_DIR: "/checkpoints",
        env.CODE_DIR: "/etc/esper/code",
        env.TERMINATION_LOG: "/dev/termination-log",
        env.HTTP_PORT: str(ports.TOLARIA_HTTP),
    }
    assert {name: found[name] for name in expected} == expected
    assert found[env.RANK]["fieldRef"]["fieldPath"] == f"metadata.annotations['{labels.COMPLETION_INDEX}']"
    assert env.KEYS_DIR not in found


def test_a_laptops_layout_is_honoured_everywhere() -> None:
    names = ("run", "shm", "checkpoints", "config", "code", "keys", "bus", "emergency", "tmp", "termination_log")
    layout = PathLayout(**{name: f"/laptop/{name}" for name in names})
    settings = replace(specs.SETTINGS, layout=layout, http_ports_fixed=False)
    spec = pod_spec(
        {"runtime": {"codeConfigMapName": "c"}, "checkpoint": {"storage": {"mountPath": "/state"}}}, settings
    )
    for container in containers(spec).values():
        assert all(path.startswith("/laptop/") for path in mounts(container).values())
        variables = environment(container)
        paths = [v for k, v in variables.items() if isinstance(v, str) and v.startswith("/") and k != "HOME"]
        assert all(path.startswith("/laptop/") for path in paths)
        assert variables[env.HTTP_PORT] == "0"
        assert "ports" not in container
        assert container["terminationMessagePath"] == "/laptop/termination_log"


def test_checkpoints_lie_where_the_user_says() -> None:
    storage = {"mountPath": "/state", "subPath": "team/run"}
    tolaria = containers(pod_spec({"checkpoint": {"storage": storage}}))["tolaria"]
    (mount,) = [m for m in tolaria["volumeMounts"] if m["name"] == "checkpoints"]
    assert mount == {"name": "checkpoints", "mountPath": "/state", "subPath": "team/run"}
    assert environment(tolaria)[env.CHECKPOINT_DIR] == "/state"


def test_the_pod_has_no_way_to_the_api() -> None:
    spec = pod_spec()
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert "serviceAccountName" not in spec
