"""What the story leaves out: a run that halts by its own decision, an eviction, a full volume."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from . import cluster as kit

Start = Callable[..., kit.RunHandle]
LONG = {"config": {"epochs": 500}}
SMALL = {"resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}}
GID = 10000


@pytest.mark.row("T26", "T48")
def test_a_run_that_has_used_up_its_rollbacks_halts_itself(start: Start) -> None:
    """L4: rolled back as often as it may, then halted with a checkpoint of the last good state, and it says why."""
    run = start(
        "examples/digits.yaml",
        name="exhausted",
        runtime=LONG,
        workers=SMALL,
        rollback={"maxRollbacks": 1},
        faultInjection=[{"kind": "NonFiniteLoss", "step": 40}, {"kind": "NonFiniteGradient", "step": 90}],
    )
    status = run.wait_phase("Halted", timeout_s=240)
    print(json.dumps({key: status.get(key) for key in ("reason", "halt", "rollbacks", "lastRecovery")}, indent=1))
    assert [(e["to"], e["reason"]) for e in status["history"]][-2:] == [
        ("Halting", "RollbacksExhausted"),
        ("Halted", "Halted"),
    ]
    assert "rollback.maxRollbacks" in run.condition("Halted")["message"]
    assert (status["halt"]["source"], status["halt"]["acknowledged"]) == ("Runtime", 1)
    assert status["rollbacks"]["total"] == 1
    assert status["lastRecovery"]["kind"] == "InProcess"
    assert status["lastRecovery"]["tier"] == "Fast"
    assert 40 <= status["checkpoint"]["latestVerifiedStep"] < 90, "the last good state is on the volume"
    assert run.condition("Halted")["status"] == "True"
    kit.until("the pod to end", lambda: all(p["status"]["phase"] != "Running" for p in run.pods()), timeout_s=60)


@pytest.mark.row("T51")
def test_an_evicted_pod_saves_and_another_goes_on(start: Start) -> None:
    """As a node drain does it: through the eviction subresource, with the pod's own grace."""
    run = start("examples/digits.yaml", name="evicted", runtime=LONG, workers=SMALL)
    run.wait_phase("Running", timeout_s=120)
    step = run.wait_step(30)["progress"]["step"]
    pod = run.pod()
    evict(run, pod)
    status = run.wait(
        "training in another pod",
        lambda s: s["phase"] == "Running" and s.get("lastRecovery", {}).get("kind") == "PodReplaced",
        timeout_s=240,
    )
    print(json.dumps(status["lastRecovery"], indent=1))
    assert run.pod() != pod
    assert status["attempt"] == 1
    assert status["lastRecovery"]["toStep"] >= step, "the evicted pod saved inside its grace"
    assert status["restarts"]["counted"] == 0, "an eviction is nobody's fault"


def evict(run: kit.RunHandle, pod: str) -> None:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": run.namespace}}
    path = f"/api/v1/namespaces/{run.namespace}/pods/{pod}/eviction"
    run.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))


@pytest.mark.timeout(900)
def test_a_full_volume_stops_no_training_and_is_seen(start: Start, release: kit.Cluster, namespace: str) -> None:
    if not release.own:
        pytest.skip("needs a small volume on a node of ours")
    with small_volume(release, namespace, "small", megabytes=96) as directory:
        run = start(
            "examples/digits.yaml",
            name="full",
            runtime=LONG,
            workers=SMALL,
            checkpoint={"storage": {"claimTemplate": None, "claimName": "small"}, "periodSeconds": 2},
        )
        run.wait("a checkpoint", lambda s: s.get("checkpoint", {}).get("latestVerifiedStep", 0) > 0, 240)
        kit.node(release, f"dd if=/dev/zero of={directory}/ballast bs=1M count=200 2>/dev/null || true")
        status = run.wait("the failure to be seen", lambda s: s.get("checkpoint", {}).get("lastError"), 60)
        assert "No space left" in status["checkpoint"]["lastError"]
        run.wait_event("CheckpointVolumeFull")
        assert run.condition("Healthy")["status"] == "False"
        kept, step = status["checkpoint"]["latestVerifiedStep"], status["progress"]["step"]
        run.wait("steps although nothing can be saved", lambda s: s["progress"]["step"] > step + 20, 60)
        kit.node(release, f"rm {directory}/ballast")
        status = run.wait("a newer checkpoint", lambda s: s["checkpoint"]["latestVerifiedStep"] > kept, 120)
        assert not status["checkpoint"].get("lastError")
        run.kubectl("delete", "etr", run.name, "--wait=true", timeout_s=180)


@contextmanager
def small_volume(release: kit.Cluster, namespace: str, name: str, *, megabytes: int) -> Iterator[str]:
    """A PersistentVolume of so many megabytes on the node, and a claim for it; its directory on the node."""
    directory = f"/var/esper-e2e/{namespace}"
    kit.node(
        release, f"mkdir -p {directory} && mount -t tmpfs -o size={megabytes}m,mode=2770,gid={GID} tmpfs {directory}"
    )
    size = f"{megabytes}Mi"
    spec: dict[str, Any] = {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeMode": "Filesystem"}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{namespace}-{name}"[:63].strip("-")},
        "spec": {
            **spec,
            "capacity": {"storage": size},
            "hostPath": {"path": directory, "type": "Directory"},
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": namespace, "name": name},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {**spec, "resources": {"requests": {"storage": size}}, "volumeName": volume["metadata"]["name"]},
    }
    both = {"apiVersion": "v1", "kind": "List", "items": [volume, claim]}
    release.kubectl("apply", "-f", "-", stdin=json.dumps(both))
    try:
        yield directory
    finally:
        release.kubectl("-n", namespace, "delete", "pvc", name, "--wait=false", check=False)
        release.kubectl("delete", "pv", volume["metadata"]["name"], "--wait=false", check=False)
        kit.node(release, f"umount -l {directory}", check=False)


def test_a_new_run_goes_on_from_another_runs_checkpoint(start: Start) -> None:
    """Each has a claim of its own; the source's is mounted read-only, and the source may be finished."""
    source = start("examples/digits.yaml", name="source", runtime={"config": {"epochs": 2}}, workers=SMALL)
    source.kubectl("wait", "etr", source.name, "--for=condition=Complete", "--timeout=240s", timeout_s=260)
    last = source.status["progress"]["step"]
    heir = start(
        "examples/digits.yaml",
        name="heir",
        runtime={"config": {"epochs": 3}},
        workers=SMALL,
        checkpoint={"resumeFrom": {"runName": source.name}},
    )
    heir.kubectl("wait", "etr", heir.name, "--for=condition=Complete", "--timeout=240s", timeout_s=260)
    status = heir.status
    running = next(entry for entry in status["history"] if entry["to"] == "Running")
    print(json.dumps(running), status["progress"]["step"])
    assert running["step"] > last
    assert status["progress"]["step"] == last // 2 * 3
    assert source.status["checkpoint"]["count"] >= 1
