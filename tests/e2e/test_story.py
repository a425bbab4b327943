"""The story of the README, line by line, on a cluster."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import cluster as kit

Start = Callable[..., kit.RunHandle]


def transitions(status: dict[str, Any]) -> list[tuple[str, str]]:
    return [(entry.get("from", ""), entry["to"]) for entry in status.get("history", [])]


@pytest.mark.timeout(2400)
def test_a_run_trains_survives_halts_and_resumes(start: Start, tmp_path: Path) -> None:
    run = start("examples/digits-nan.yaml")

    # 1. It trains.
    status = run.wait_phase("Running", timeout_s=120)
    assert ("Pending", "Starting") in transitions(status)
    assert ("Starting", "Running") in transitions(status)
    columns = run.kubectl("get", "esperruns", run.name).split("\n")
    print("\n".join(columns))
    assert columns[0].split() == ["NAME", "PHASE", "EPOCH", "STEP", "PROGRESS", "ATTEMPT", "ROLLBACKS", "READY", "AGE"]
    wide = run.kubectl("get", "esperruns", run.name, "-o", "wide").split("\n")[0].split()
    assert {"LOSS", "CHECKPOINT"} <= set(wide)
    first = run.wait("a first loss", lambda s: s.get("progress", {}).get("loss"))
    first_loss = float(first["progress"]["loss"])

    # 2. The loss turns NaN: rolled back in the process, visible although nobody could watch it live.
    status = run.wait("the rollback", lambda s: s.get("rollbacks", {}).get("total") == 1, timeout_s=180)
    assert ("Running", "RollingBack") in transitions(status)
    assert ("RollingBack", "Running") in transitions(status)
    recovery = status["lastRecovery"]
    assert recovery["kind"] == "InProcess"
    assert recovery["cause"] == "NonFiniteLoss"
    assert recovery["toStep"] < recovery["fromStep"]
    assert recovery["recoverMilliseconds"] < 1000
    assert run.condition("RolledBack")["status"] == "True"
    run.wait_event("RolledBack")
    rolled_back = [e for e in run.events() if e["reason"] == "RolledBack"]
    assert len(rolled_back) == 1

    # 3. L1: the trainer dies, the pod stays.
    pod = run.pod()
    before = run.status["progress"]["step"]
    run.kill_trainer()
    status = run.wait("a restart in place", lambda s: s.get("restarts", {}).get("inPlace") == 1)
    status = run.wait("steps after it", lambda s: s["phase"] == "Running" and s["progress"]["step"] > before)
    assert run.pod() == pod
    assert status["lastRecovery"]["kind"] == "InPlace"
    assert status["attempt"] == 1

    # 3. L2: the pod goes, another takes over from the checkpoint.
    status = run.wait("a verified checkpoint", lambda s: s.get("checkpoint", {}).get("latestVerifiedStep", 0) > 0)
    saved = status["checkpoint"]["latestVerifiedStep"]
    run.kubectl("delete", "pod", pod, "--wait=false")
    run.wait("another pod", lambda s: [p for p in run.pods() if p["metadata"]["name"] != pod], 120)
    status = run.wait(
        "training in the other pod",
        lambda s: s["phase"] == "Running" and s.get("lastRecovery", {}).get("kind") in ("PodReplaced", "NewAttempt"),
        timeout_s=180,
    )
    assert status["progress"]["step"] >= saved
    assert status["lastRecovery"]["toStep"] >= saved
    assert status["restarts"]["total"] >= 2
    failure = status["lastFailure"]
    assert failure["containerName"] == "tolaria"
    assert failure["podName"].startswith(f"{run.name}-a")
    assert failure["exitCode"] != 0

    # 4. A person stops it, and lets it go on.
    run.patch({"emergencyStop": "Checkpoint"})
    status = run.wait_phase("Halted", timeout_s=120)
    assert ("Running", "Halting") in transitions(status)
    assert ("Halting", "Halted") in transitions(status)
    halt = status["halt"]
    assert (halt["mode"], halt["source"]) == ("Checkpoint", "Spec")
    assert (halt["acknowledged"], halt["expected"]) == (1, 1)
    assert halt["milliseconds"] <= 2000
    saved = halt["savedStep"]
    run.patch({"emergencyStop": "None"})
    status = run.wait(
        "training after the halt", lambda s: s["phase"] == "Running" and s["progress"]["step"] > saved, 180
    )
    assert status["lastRecovery"]["toStep"] == saved

    # 8. It ends, and its model comes home.
    run.kubectl("wait", "etr", run.name, "--for=condition=Complete", "--timeout=1200s", timeout_s=1220)
    resource = run.get()
    status = resource["status"]
    print(run.kubectl("get", "esperruns", run.name, "-o", "wide"))
    print(run.kubectl("get", "etr", run.name, "-o", "yaml"))
    assert status["phase"] == "Succeeded"
    assert status["progress"]["percentage"] == 100
    metrics = {m["name"]: float(m["value"]) for m in status["progress"]["metrics"]}
    assert metrics["validation_accuracy"] >= 0.95
    assert float(status["progress"]["loss"]) < first_loss
    assert status["checkpoint"]["bestStep"] > 0
    assert status["rollbacks"]["total"] == 1, "nothing was counted twice"
    out = tmp_path / "out"
    esper = str(kit.ROOT / ".venv/bin/esper")
    kubeconfig = str(run.cluster.kubeconfig)
    kit.command(esper, "fetch", run.name, str(out), "-n", run.namespace, "--cluster", KUBECONFIG=kubeconfig)
    assert json.loads((out / "model.json").read_text())
    assert (out / "model.safetensors").stat().st_size > 1000
    readers = [p for p in run.pods() if p["metadata"]["name"].find("fetch") >= 0]
    assert readers == [], "the reader pod is gone"


def test_the_finished_run_can_be_deleted_and_keeps_only_its_claim(start: Start) -> None:
    run = start("examples/digits.yaml", name="short", runtime={"config": {"epochs": 2}})
    run.kubectl("wait", "etr", run.name, "--for=condition=Finished", "--timeout=200s", timeout_s=220)
    assert run.phase() == "Succeeded"
    run.kubectl("delete", "etr", run.name, "--wait=true", timeout_s=120)
    kinds = "jobs,pods,services,configmaps,secrets"

    def left() -> bool:
        return run.kubectl("get", kinds, "-l", f"esper.dev/run={run.name}", "-o", "name").strip() == ""

    kit.until("the children to be collected", left, timeout_s=120)
    claims = run.kubectl("get", "pvc", "-o", "name").split()
    assert claims == [f"persistentvolumeclaim/{run.name}-checkpoints"]


def test_helm_test_passes(release: kit.Cluster) -> None:
    assert "Phase:          Succeeded" in release.helm("test", "esper", "-n", kit.SYSTEM)


def test_the_operator_image_is_small(release: kit.Cluster) -> None:
    if not release.own:
        pytest.skip("the images of a given cluster are not on this machine")
    size = int(kit.command("docker", "image", "inspect", "-f", "{{.Size}}", f"esper/operator:{release.tag}"))
    print(f"operator image: {size / 1e6:.0f} MB unpacked")
    assert size <= 300e6
    history = subprocess.run(
        ["docker", "run", "--rm", "--entrypoint", "sh", f"esper/runtime:{release.tag}", "-c", "command -v cc gcc g++"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert history.stdout.strip() == "", "a compiler is left in the runtime image"
