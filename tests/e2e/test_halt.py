"""Stopping a run in every way, with and without Redis."""

import time
from collections.abc import Callable

import pytest
import yaml

from . import cluster as kit

Start = Callable[..., kit.RunHandle]
LONG = {"config": {"epochs": 500}}
SMALL = {"resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}}
"""Two of them fit on a node with two cores."""


def begin(start: Start, name: str) -> kit.RunHandle:
    run = start("examples/digits.yaml", name=name, runtime=LONG, workers=SMALL)
    run.wait_phase("Running", timeout_s=120)
    run.wait_step(20)
    return run


def test_freeze_keeps_the_pod_and_stops_stepping(start: Start) -> None:
    run = begin(start, "frozen")
    pod = run.pod()
    run.patch({"emergencyStop": "Freeze"})
    status = run.wait_phase("Halted", timeout_s=30)
    assert status["halt"]["acknowledged"] == 1
    page = "import struct;print(struct.unpack('<8Q',open('/run/esper/trainer.page','rb').read(64))[1])"
    step = int(run.python(page))
    time.sleep(3)  # what is tested: that time passes and no step does
    assert int(run.python(page)) == step
    assert run.pod() == pod
    run.patch({"emergencyStop": "None"})
    run.wait("steps after the freeze", lambda s: s["phase"] == "Running" and s["progress"]["step"] > step, 60)
    assert run.pod() == pod
    assert run.status["attempt"] == 1

    run.patch({"emergencyStop": "Kill"})
    status = run.wait_phase("Halted", timeout_s=60)
    assert status["halt"]["mode"] == "Kill"
    kit.until("the pod to end", lambda: all(p["status"]["phase"] != "Running" for p in run.pods()), timeout_s=60)


def test_a_halt_arrives_without_redis(start: Start, release: kit.Cluster) -> None:
    run = begin(start, "no-redis")
    with kit.redis_away(release):
        step = run.status["progress"]["step"]
        run.wait("progress although Redis is away", lambda s: s["progress"]["step"] > step, 60)
        run.patch({"emergencyStop": "Checkpoint"})
        status = run.wait_phase("Halted", timeout_s=60)
        halt = status["halt"]
        print(f"halt without Redis: acknowledged after {halt['milliseconds']} ms")
        assert (halt["acknowledged"], halt["expected"]) == (1, 1)
        assert halt["milliseconds"] <= 2000
        assert halt["savedStep"] > 0
    run.patch({"emergencyStop": "None"})
    run.wait("training again", lambda s: s["phase"] == "Running" and s["progress"]["step"] > halt["savedStep"], 120)


def test_suspend_releases_the_pods_and_keeps_the_state(start: Start) -> None:
    run = begin(start, "suspended")
    run.wait("a checkpoint", lambda s: s.get("checkpoint", {}).get("latestVerifiedStep"), 120)
    run.patch({"suspend": True})
    run.wait_phase("Suspended", timeout_s=120)
    kit.until("no pod", lambda: not run.pods(), timeout_s=60)
    saved = run.status["checkpoint"]["latestVerifiedStep"]
    run.patch({"suspend": False})
    status = run.wait("training again", lambda s: s["phase"] == "Running" and s["progress"]["step"] > saved, 120)
    assert status["lastRecovery"]["toStep"] >= saved
    run.kubectl("delete", "etr", run.name, "--wait=true")


def test_a_run_created_halted_starts_halted(start: Start) -> None:
    run = start("examples/digits.yaml", name="born-halted", emergencyStop="Checkpoint")
    status = run.wait_phase("Halted", timeout_s=30)
    assert (status["halt"]["acknowledged"], status["halt"]["expected"]) == (0, 0)
    assert run.pods() == []


@pytest.mark.timeout(300)
def test_a_broadcast_stops_the_runs_it_names(start: Start, release: kit.Cluster) -> None:
    named = [begin(start, name) for name in ("vision", "sight")]
    for run in named:
        run.kubectl("label", "etr", run.name, "team=vision")
    other = begin(start, "text")
    broadcast = yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "esper-emergency", "namespace": kit.SYSTEM},
            "data": {
                "maintenance": "mode: Freeze\nselector: team=vision\nreason: cooling\n",
                "bad": "mode: [\n",
            },
        }
    )
    release.kubectl("apply", "-f", "-", stdin=broadcast)
    try:
        for run in named:
            halt = run.wait_phase("Halted", timeout_s=30)["halt"]
            assert (halt["source"], halt["mode"], halt["acknowledged"]) == ("Broadcast", "Freeze", 1)
        step = other.status["progress"]["step"]
        assert other.wait("its steps", lambda s: s["progress"]["step"] > step, 60)["phase"] == "Running"
    finally:
        release.kubectl("-n", kit.SYSTEM, "delete", "configmap", "esper-emergency")
    for run in named:
        run.wait_phase("Running", timeout_s=30)
