"""The operator dies, is upgraded, is removed: training never notices."""

from collections.abc import Callable

import pytest

from . import cluster as kit

Start = Callable[..., kit.RunHandle]


def operator_back(cluster: kit.Cluster) -> None:
    cluster.kubectl("-n", kit.SYSTEM, "rollout", "status", "deployment/esper-operator", "--timeout=120s")


@pytest.mark.timeout(900)
def test_a_killed_operator_changes_nothing(start: Start, release: kit.Cluster) -> None:
    """Killed around the rollback, during the halt and around completion; the end equals a run without."""
    run = start(
        "examples/digits-nan.yaml",
        name="orphan",
        runtime={"config": {"epochs": 40}},
        faultInjection=[{"kind": "NonFiniteLoss", "step": 200}],
    )
    run.wait_phase("Running", timeout_s=120)
    kit.kill_operator(release)
    operator_back(release)
    status = run.wait("the rollback", lambda s: s.get("rollbacks", {}).get("total") == 1, timeout_s=180)
    history = [(e.get("from"), e["to"]) for e in status["history"]]
    assert history.count(("Running", "RollingBack")) == 1

    run.patch({"emergencyStop": "Checkpoint"})
    kit.kill_operator(release)
    status = run.wait_phase("Halted", timeout_s=120)
    assert status["halt"]["acknowledged"] == 1
    saved = status["halt"]["savedStep"]
    operator_back(release)
    run.patch({"emergencyStop": "None"})
    run.wait("training again", lambda s: s["phase"] == "Running" and s["progress"]["step"] > saved, 180)

    run.wait("most of the run", lambda s: s["progress"]["percentage"] >= 85 or s["phase"] == "Succeeded", 300)
    kit.kill_operator(release)
    run.kubectl("wait", "etr", run.name, "--for=condition=Complete", "--timeout=300s", timeout_s=320)
    status = run.status
    assert status["rollbacks"]["total"] == 1
    assert status["attempt"] == 2
    rolled = [e for e in status["history"] if e["to"] == "RollingBack"]
    assert len(rolled) == 1
    jobs = run.kubectl("get", "jobs", "-l", f"esper.dev/run={run.name}", "-o", "name").split()
    assert jobs == [f"job.batch/{run.name}-a2"]
    operator_back(release)


def test_an_upgrade_touches_no_running_job(start: Start, release: kit.Cluster) -> None:
    run = start("examples/digits.yaml", name="upgraded", runtime={"config": {"epochs": 500}})
    run.wait_phase("Running", timeout_s=120)
    words = ("get", "job", f"{run.name}-a1", "-o", "jsonpath={.metadata.uid} {.metadata.generation}")
    before, pod = run.kubectl(*words), run.pod()
    step = run.status["progress"]["step"]
    release.install("--set", "log.level=DEBUG")
    operator_back(release)
    run.wait("progress after the upgrade", lambda s: s["progress"]["step"] > step + 50, 90)
    assert run.kubectl(*words) == before
    assert run.pod() == pod
    assert run.status["restarts"]["total"] == 0


def test_the_operator_stays_small(release: kit.Cluster) -> None:
    pods = release.json("-n", kit.SYSTEM, "get", "pods", "-l", "app.kubernetes.io/component=operator")["items"]
    live = [p for p in pods if not p["metadata"].get("deletionTimestamp")]
    text = release.kubectl("-n", kit.SYSTEM, "exec", live[0]["metadata"]["name"], "--", "cat", "/proc/1/status")
    rss = int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")))
    print(f"operator RSS: {rss / 1024:.0f} MiB")
    assert rss / 1024 <= 120
