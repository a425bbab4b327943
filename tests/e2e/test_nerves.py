"""Redis, the sidecars, the keys and the API server go, come back and change; training and halts do not mind."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from . import cluster as kit

Start = Callable[..., kit.RunHandle]
Trouble = Callable[[kit.Cluster], AbstractContextManager[None]]
LONG = {"config": {"epochs": 5000}}
SMALL = {"resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}}
SIDECARS = ("weatherlight", "kasmina", "tamiyo")
LOGIN = (
    'REDISCLI_AUTH="$(cat /etc/valkey-auth/password)" valkey-cli --user operator --tls --cacert /etc/valkey-tls/ca.crt'
)
API_AWAY_S = 60.0
OF_KEYS = ('reason="unknown_key_id"', 'reason="invalid_signature"')
"""A command may be refused because the run is halted, and none because of its key."""
AT_WORST_MS = 5000
"""On a node that does much else. The figures of a quiet one are printed by bench_cluster."""


@pytest.fixture
def ours(release: kit.Cluster) -> kit.Cluster:
    if not release.own:
        pytest.skip("breaks processes on a node of ours")
    return release


@pytest.fixture
def run(start: Start, ours: kit.Cluster) -> kit.RunHandle:
    made = start("examples/digits.yaml", name="nerves", runtime=LONG, workers=SMALL)
    made.wait_phase("Running", timeout_s=120)
    made.wait_step(20)
    return made


def goes_on(run: kit.RunHandle, what: str) -> None:
    step = run.status["progress"]["step"]
    run.wait(f"steps {what}", lambda s: s["progress"]["step"] > step, 60)


def halts_and_goes_on(run: kit.RunHandle, what: str) -> int:
    """Freeze and back; milliseconds until every process had acknowledged."""
    run.patch({"emergencyStop": "Freeze"})
    status = run.wait(f"the halt {what}", lambda s: s["phase"] == "Halted" and s["halt"]["acknowledged"] == 1, 60)
    halt = status["halt"]
    run.patch({"emergencyStop": "None"})
    run.wait(f"training after the halt {what}", lambda s: s["phase"] == "Running", 60)
    goes_on(run, f"after the halt {what}")
    print(f"halt {what}: acknowledged after {halt['milliseconds']} ms")
    return int(halt["milliseconds"])


def never_restarted(run: kit.RunHandle, pod: str) -> None:
    status = run.status
    assert (status["attempt"], status["restarts"]["total"], run.pod()) == (1, 0, pod)


# --- Redis ---


def valkey(cluster: kit.Cluster, script: str, *, pod: int = 0, check: bool = True) -> str:
    words = ("-n", kit.SYSTEM, "exec", f"esper-valkey-{pod}", "--", "sh", "-c", script)
    return cluster.kubectl(*words, check=check)


@contextmanager
def killed(cluster: kit.Cluster) -> Iterator[None]:
    kit.node(cluster, "pkill -KILL valkey-server")
    yield


@contextmanager
def frozen(cluster: kit.Cluster) -> Iterator[None]:
    kit.node(cluster, "pkill -STOP valkey-server")
    try:
        yield
    finally:
        kit.node(cluster, "pkill -CONT valkey-server")


@contextmanager
def out_of_memory(cluster: kit.Cluster) -> Iterator[None]:
    """Its policy is noeviction: every write is refused until somebody makes room."""
    ballast = f'head -c 1000000 /dev/zero | tr "\\0" x | {LOGIN} -x XADD oona.ballast "*" e'
    said = valkey(cluster, f"for n in $(seq 40); do {ballast}; done 2>&1 | grep -m1 OOM")
    assert "OOM" in said
    try:
        yield
    finally:
        valkey(cluster, f"{LOGIN} DEL oona.ballast")


@contextmanager
def failed_over(cluster: kit.Cluster) -> Iterator[None]:
    """To a server that has neither streams nor users, and back to the old one."""
    workload = ("-n", kit.SYSTEM, "statefulset/esper-valkey")
    cluster.kubectl("scale", "--replicas=2", *workload)
    cluster.kubectl("-n", kit.SYSTEM, "rollout", "status", "statefulset/esper-valkey", "--timeout=90s")
    try:
        serve(cluster, pod=1)
        kit.node(cluster, "pkill -KILL -o valkey-server")  # the older of the two
        yield
    finally:
        serve(cluster, pod=0)
        cluster.kubectl("scale", "--replicas=1", *workload)
        serve(cluster, pod=None)


def serve(cluster: kit.Cluster, *, pod: int | None) -> None:
    """Points the Service at one of the servers; None: at whichever is there."""
    name = None if pod is None else f"esper-valkey-{pod}"
    body = {"spec": {"selector": {"statefulset.kubernetes.io/pod-name": name}}}
    cluster.kubectl("-n", kit.SYSTEM, "patch", "service", "esper-valkey", "--type=merge", "-p", json.dumps(body))


@pytest.mark.timeout(600)
def test_redis_killed_frozen_full_and_failed_over(run: kit.RunHandle, ours: kit.Cluster) -> None:
    pod = run.pod()
    troubles: dict[str, Trouble] = {
        "with Redis killed": killed,
        "with Redis frozen": frozen,
        "with Redis out of memory": out_of_memory,
        "with Redis failed over": failed_over,
    }
    for what, trouble in troubles.items():
        with trouble(ours):
            took_ms = halts_and_goes_on(run, what)
        assert took_ms <= AT_WORST_MS
        goes_on(run, f"after {what}")
    never_restarted(run, pod)
    kit.until("Redis again", lambda: "PONG" in valkey(ours, f"{LOGIN} ping", check=False), timeout_s=60)
    assert not [e["note"] for e in run.events() if e["reason"] in ("SignalRejected", "ReportRejected")]


# --- sidecars ---


@pytest.mark.timeout(600)
def test_sidecars_die_one_by_one_and_all_at_once(run: kit.RunHandle, ours: kit.Cluster) -> None:
    pod = run.pod()
    for name in SIDECARS:
        kill_worker(run, name)
        goes_on(run, f"after the death of {name}'s worker")
    halts_and_goes_on(run, "after each sidecar's worker has died")
    everyone = "|".join(f"esper_runtime[.]{name}" for name in SIDECARS)  # not the shell that asks for it
    kit.node(ours, f"pkill -KILL -f '{everyone}'")
    began = time.monotonic()
    goes_on(run, "while all sidecars are away")
    run.patch({"emergencyStop": "Freeze"})
    status = run.wait("the halt", lambda s: s["phase"] == "Halted" and s["halt"]["acknowledged"] == 1, 60)
    print(f"halt while all sidecars were away: {time.monotonic() - began:.1f} s after their death, {status['halt']}")
    kit.until("all sidecars again", lambda: restarted(run) == set(SIDECARS), timeout_s=60)
    run.wait("every process to acknowledge", lambda s: not s["halt"].get("missing"), 30)
    run.patch({"emergencyStop": "None"})
    run.wait("training again", lambda s: s["phase"] == "Running", 60)
    goes_on(run, "after all sidecars have died")
    never_restarted(run, pod)


def kill_worker(run: kit.RunHandle, name: str) -> None:
    """The process below the container's first one."""
    code = (
        "import os,pathlib,signal;"
        "own=os.getpid();"
        "kids=pathlib.Path('/proc/1/task/1/children').read_text().split();"
        "[os.kill(int(k),signal.SIGKILL) for k in kids if int(k)!=own]"
    )
    run.python(code, container=name)


def restarted(run: kit.RunHandle) -> set[str]:
    """Sidecars whose container runs again after a death."""
    (pod,) = [p for p in run.pods() if p["metadata"]["name"] == run.pod()]
    statuses: list[dict[str, Any]] = [
        *pod["status"].get("initContainerStatuses", ()),
        *pod["status"]["containerStatuses"],
    ]
    return {s["name"] for s in statuses if s["name"] in SIDECARS and s["restartCount"] > 0 and s.get("ready")}


# --- keys ---


@pytest.mark.timeout(600)
def test_keys_are_rotated_while_a_run_trains(run: kit.RunHandle, release: kit.Cluster) -> None:
    pod = run.pod()
    words = ("get", "secret", f"{run.name}-keys", "-o", "jsonpath={.metadata.annotations} {.data}")
    before = run.kubectl(*words)
    generation = next_generation(release)
    release.install("--set", f"keys.generation={generation}")
    halts_and_goes_on(run, "signed by a key that the pod had not yet been given as the one in force")
    kit.until("the run's new keys", lambda: run.kubectl(*words) != before, timeout_s=60)
    assert f'"esper.dev/key-generation":"{generation}"' in run.kubectl(*words)
    said = ("logs", pod, "-c", "weatherlight")
    kit.until(
        "the pod to read them", lambda: "report.key has changed" in run.kubectl(*said), timeout_s=180, every_s=1.0
    )
    halts_and_goes_on(run, "under the new keys")
    never_restarted(run, pod)
    assert not [e["note"] for e in run.events() if e["reason"] in ("SignalRejected", "ReportRejected")]
    rejected = [line for line in metrics_of(run, "kasmina") if any(reason in line for reason in OF_KEYS)]
    assert rejected
    assert all(line.endswith(" 0.0") for line in rejected), rejected


def next_generation(cluster: kit.Cluster) -> int:
    found = cluster.json("-n", kit.SYSTEM, "get", "secret", "esper-operator-seed")
    return int(found["metadata"]["annotations"]["esper.dev/key-generation"]) + 1


def metrics_of(run: kit.RunHandle, container: str) -> list[str]:
    code = (
        "import os,urllib.request;"
        "print(urllib.request.urlopen('http://127.0.0.1:'+os.environ['ESPER_HTTP_PORT']+'/metrics').read().decode())"
    )
    return run.python(code, container=container).splitlines()


# --- the API server ---


@pytest.mark.timeout(600)
def test_sixty_seconds_without_an_api_server_cost_no_step(run: kit.RunHandle, ours: kit.Cluster) -> None:
    pod = run.pod()
    (uid,) = [p["metadata"]["uid"] for p in run.pods()]
    page = f"/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/run/trainer.page"

    def step() -> int:
        return int(kit.node(ours, f"od -An -t u8 -j 8 -N 8 {page}").split()[0])

    steps = []
    kit.node(ours, "pkill -STOP kube-apiserver")
    try:
        began = time.monotonic()
        while time.monotonic() - began < API_AWAY_S:
            steps.append(step())
            time.sleep(2.0)  # what is tested: that steps go on all the while
    finally:
        kit.node(ours, "pkill -CONT kube-apiserver")
    back, reached = time.monotonic(), step()
    assert steps == sorted(set(steps)), "steps stood still"
    kit.until("the status to catch up", lambda: caught_up(run, reached), timeout_s=60)
    behind_s = time.monotonic() - back
    print(f"{API_AWAY_S:.0f} s without an API server: {steps[-1] - steps[0]} steps; status {behind_s:.1f} s behind")
    never_restarted(run, pod)
    assert steps[0] < reached


def caught_up(run: kit.RunHandle, step: int) -> bool:
    """kubectl may fail for a moment after such a pause."""
    try:
        return bool(run.status["progress"]["step"] >= step)
    except kit.Failed:
        return False
