"""On a real cluster, kubelet and all: P14 of the goals, halts with and without Redis, and what Esper takes of it.

.venv/bin/python tests/bench/bench_cluster.py [--rounds 20] [--runs 20] [--pause-ms 20] [--only apply,halt,orders]

Uses the cluster and the images of the e2e tests (tests/e2e/cluster.py says which) and leaves both as they were. Every
instant is taken on this machine's clock: where something is killed, by the process that kills it, right before; where
the API server shows something, on arrival of the watch event. A node on another machine would need its clock compared.

"orders" is a person's order to stop (P9, the way through the API server): from sending the request, a patch of
spec.emergencyStop or a broadcast by ConfigMap esper-emergency, to a status in which every process of every pod has
answered; for one run, and for --runs at once. Those are small and pause in each step, since otherwise the node's cores
would be measured; with 20 ms each still takes a tenth of a core, of which two carry about eight. A longer pause leaves
room for more, and its half comes on top of every time. By what their sidecars request, a node of two cores takes
eleven; twenty fit on two nodes (a kind cluster with a worker, given as KUBECONFIG, and ESPER_E2E_IMAGE_TAG).
"""

import argparse
import contextlib
import json
import math
import os
import platform
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from kubernetes import client, config, watch

from tests.bench.common import tail
from tests.e2e import cluster as kit

NAMESPACE = "esper-bench"
ORDERS = "orders"
PATIENCE_S = 120.0
SETTLE_S = 20.0
Status = dict[str, Any]
QUICK_RESTARTS = {
    "maxRestarts": 1000,
    "initialBackoffSeconds": 1,
    "maxBackoffSeconds": 1,
}


class Watched:
    """Every change of the objects of one kind in the bench namespace, with the time of its arrival."""

    def __init__(self, listing: Callable[..., Any], *words: str) -> None:
        self._changes: queue.Queue[tuple[float, Any]] = queue.Queue(maxsize=10_000)
        self._watch: Any = watch.Watch()  # type: ignore[no-untyped-call]
        self._listing, self._words = listing, words
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            for change in self._watch.stream(self._listing, *self._words, timeout_seconds=300):
                self._changes.put((time.time(), change["object"]))

    def drop(self) -> None:
        """Forgets what has arrived so far."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._changes.get_nowait()

    def first(self, holds: Callable[[Any], bool]) -> float:
        """When an object for which `holds` is true first arrived; what came before it is dropped."""
        return next(at for at, found in self.changes() if holds(found))

    def changes(self) -> Iterator[tuple[float, Any]]:
        """As they arrive, for PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                yield self._changes.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise kit.Failed(f"no such change within {PATIENCE_S:.0f} s") from None


class Bench:
    """One cluster with Esper on it, its runs and pods watched."""

    def __init__(self, cluster: kit.Cluster) -> None:
        self.cluster = cluster
        api: Any = config.new_client_from_config(str(cluster.kubeconfig))  # type: ignore[no-untyped-call]
        custom = client.CustomObjectsApi(api).list_namespaced_custom_object
        self.runs = Watched(custom, "esper.dev", "v1alpha1", NAMESPACE, "espertrainingruns")
        self.pods = Watched(client.CoreV1Api(api).list_namespaced_pod, NAMESPACE)

    def start(self, name: str, **spec: Any) -> kit.RunHandle:
        text, _ = kit.manifest("examples/digits.yaml", name=name, **spec)
        self.cluster.kubectl("-n", NAMESPACE, "apply", "-f", "-", stdin=text)
        return kit.RunHandle(self.cluster, NAMESPACE, name)

    def long_run(self, name: str) -> kit.RunHandle:
        run = self.start(name, runtime={"config": {"epochs": 5000}}, restart=QUICK_RESTARTS)
        run.wait_phase("Running", timeout_s=180)
        return run

    def all_status(self, names: Sequence[str], holds: Callable[[Status], bool]) -> dict[str, float]:
        """When the status of each first was so."""
        found: dict[str, float] = {}
        for at, changed in self.runs.changes():
            name = changed["metadata"]["name"]
            if name in names and name not in found and holds(changed.get("status", {})):
                found[name] = at
                if len(found) == len(names):
                    break
        return found

    def status(self, name: str, holds: Callable[[Status], bool]) -> float:
        return self.runs.first(lambda o: o["metadata"]["name"] == name and holds(o.get("status", {})))


def apply_to_pod(bench: Bench, rounds: int) -> list[float]:
    """From the watch event of the new run, which is its earliest trace, to that of its pod; one run at a time."""
    return [_one_start(bench, f"apply-{number}") for number in range(rounds)]


def _one_start(bench: Bench, name: str) -> float:
    run = bench.start(name)
    created = bench.runs.first(lambda o: o["metadata"]["name"] == name)
    pod = bench.pods.first(lambda o: o.metadata.labels.get("esper.dev/run") == name)
    run.kubectl("delete", "etr", name, "--wait=true")
    kit.until("its pod to go", lambda: not run.pods(), timeout_s=90)
    return pod - created


KILL_TRAINER = (
    "import os,signal,struct,time;"
    "words=struct.unpack('<8Q',open('/run/esper/supervisor.page','rb').read(64));"
    "print(time.time(),flush=True);os.kill(words[2],signal.SIGKILL)"
)


def trainer_death(bench: Bench, rounds: int) -> list[float]:
    """From the SIGKILL of the trainer process to a status that says Restarting or counts the restart."""
    run = bench.long_run("trainer")
    took = [_one_death(bench, run, lambda: float(run.python(KILL_TRAINER))) for _ in range(rounds)]
    run.kubectl("delete", "etr", run.name, "--wait=true")
    return took


KILL_CONTAINER = """
container=$(ctr -n k8s.io containers ls -q \
  "labels.\\"io.kubernetes.container.name\\"==tolaria,labels.\\"io.kubernetes.pod.name\\"==$1" | tail -n 1)
pid=$(ctr -n k8s.io tasks ls | awk -v id="$container" '$1 == id {print $2}')
date +%s.%N
kill -9 $pid
"""


def container_death(bench: Bench, rounds: int) -> list[float]:
    """From the SIGKILL of the container's first process, sent on the node, to a status that says so."""
    run, node = bench.long_run("container"), f"{kit.NAME}-control-plane"

    def kill() -> float:
        return float(kit.command("docker", "exec", node, "sh", "-c", KILL_CONTAINER, "kill", run.pod()))

    took = [_one_death(bench, run, kill) for _ in range(rounds)]
    run.kubectl("delete", "etr", run.name, "--wait=true")
    return took


def _one_death(bench: Bench, run: kit.RunHandle, kill: Callable[[], float]) -> float:
    """Waits until `run` trains, kills, and says how long the resource took to show it."""
    status = run.wait("training", lambda s: s["phase"] == "Running", 180)
    status = run.wait_step(status["progress"]["step"] + 30)
    before = status["restarts"]["total"]
    bench.runs.drop()
    died = kill()
    shown = bench.status(run.name, lambda s: s["phase"] == "Restarting" or s["restarts"]["total"] > before)
    run.wait("the restart", lambda s: s["restarts"]["total"] > before and s["phase"] == "Running", 180)
    return shown - died


def halts(bench: Bench, rounds: int, name: str = "halts") -> list[float]:
    """From the answer to the patch of spec.emergencyStop to a status with every rank's acknowledgement."""
    run, took = bench.long_run(name), []
    for _ in range(rounds):
        status = run.wait("steps", lambda s: s["phase"] == "Running", 60)
        run.wait_step(status["progress"]["step"] + 30)
        bench.runs.drop()
        run.patch({"emergencyStop": "Freeze"})
        patched = bench.runs.first(lambda o: o["spec"].get("emergencyStop") == "Freeze")
        shown = bench.status(run.name, lambda s: s.get("halt", {}).get("acknowledged") == 1 and s["phase"] == "Halted")
        took.append(shown - patched)
        run.patch({"emergencyStop": "None"})
    run.kubectl("delete", "etr", run.name, "--wait=true")
    return took


def halts_without_redis(bench: Bench, rounds: int) -> list[float]:
    with kit.redis_away(bench.cluster):
        return halts(bench, rounds, "without-redis")  # the claim of a deleted run stays its own


# A person's order, for one run and for many

PACED = kit.ROOT / "tests/support/pacedcode.py"
PACED_CODE = "paced-code"
TINY = {
    "sharedMemorySize": "64Mi",
    "resources": {"requests": {"cpu": "5m", "memory": "384Mi"}, "limits": {"memory": "640Mi"}},
}
"""No room for a spare."""
LABEL = "esper-bench"
BROADCAST = "esper-emergency"
EPOCH_STEPS = 100
START_S = 60.0
FIT_S = 300.0
"""For those that did not train within START_S."""
Order = Callable[["Orders"], dict[str, float]]
"""Says when the request about each run was sent."""
Lift = Callable[["Orders"], object]


class Orders:
    """So many runs, and the two ways to stop them all and let them go again."""

    def __init__(self, bench: Bench, count: int, pause_s: float) -> None:
        self._bench = bench
        api: Any = config.new_client_from_config(str(bench.cluster.kubeconfig))  # type: ignore[no-untyped-call]
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        names = [f"order-{number}-of-{count}" for number in range(count)]
        self._start(names, pause_s)
        self.runs = self._fitting(names)

    def _start(self, names: list[str], pause_s: float) -> None:
        """One after the other: each imports PyTorch, and all share the cores."""
        kubectl = self._bench.cluster.kubectl
        made = kubectl(
            *("-n", NAMESPACE, "create", "configmap", PACED_CODE, f"--from-file=paced.py={PACED}"),
            *("--dry-run=client", "-o", "yaml"),
        )
        kubectl("-n", NAMESPACE, "apply", "-f", "-", stdin=made)
        paced = {"epochs": 100_000, "pause_s": pause_s, "steps_per_epoch": EPOCH_STEPS}
        runtime = {"entrypoint": "paced:build", "codeConfigMapName": PACED_CODE, "config": paced}
        for name in names:
            run = self._bench.start(name, runtime=runtime, workers=TINY)
            with contextlib.suppress(kit.Failed):  # looked at again when all have been started
                run.wait_phase("Running", timeout_s=START_S)
        kubectl("-n", NAMESPACE, "label", "etr", "--all", f"bench={LABEL}", "--overwrite")

    def _fitting(self, names: list[str]) -> list[str]:
        """Those that train; the others go, and it is said."""
        handles = {name: kit.RunHandle(self._bench.cluster, NAMESPACE, name) for name in names}
        deadline = time.monotonic() + FIT_S
        while (left := [n for n in names if handles[n].phase() != "Running"]) and time.monotonic() < deadline:
            time.sleep(1.0)
        for name in left:
            print(f"{name} does not train: {handles[name].status.get('reason', 'no status')}")
        if left:
            self._bench.cluster.kubectl("-n", NAMESPACE, "delete", "etr", *left)
            print(f"{len(left)} of {len(names)} runs found no place on the node within {FIT_S:.0f} s and are left out")
        fitting = [name for name in names if name not in left]
        assert fitting, "none of the runs trains"
        return fitting

    def patch_all(self) -> dict[str, float]:
        return self._patch("Freeze")

    def lift_all(self) -> dict[str, float]:
        return self._patch("None")

    def _patch(self, mode: str) -> dict[str, float]:
        body, began = {"spec": {"emergencyStop": mode}}, {}
        for name in self.runs:
            began[name] = time.time()
            self._custom.patch_namespaced_custom_object(
                "esper.dev", "v1alpha1", NAMESPACE, "espertrainingruns", name, body
            )
        return began

    def broadcast(self) -> dict[str, float]:
        text = f"mode: Freeze\nselector: bench={LABEL}\nreason: bench\n"
        body = client.V1ConfigMap(metadata=client.V1ObjectMeta(name=BROADCAST), data={LABEL: text})
        began = time.time()
        self._core.create_namespaced_config_map(kit.SYSTEM, body)
        return dict.fromkeys(self.runs, began)

    def lift_broadcast(self) -> None:
        self._core.delete_namespaced_config_map(BROADCAST, kit.SYSTEM)

    def measure(self, order: Order, lift: Lift, rounds: int) -> tuple[list[float], list[float]]:
        """Seconds for each run of each round, and until the last one of each round."""
        each: list[float] = []
        last: list[float] = []
        for _ in range(rounds):
            self._bench.runs.drop()
            began = order(self)
            answered = self._bench.all_status(self.runs, _answered)
            each += [answered[name] - began[name] for name in self.runs]
            last.append(max(answered.values()) - min(began.values()))
            lift(self)
            self._bench.all_status(self.runs, lambda status: status.get("phase") == "Running")
        return each, last

    def close(self) -> None:
        self._bench.cluster.kubectl("-n", NAMESPACE, "delete", "etr", "-l", f"bench={LABEL}", "--wait=true")


def _answered(status: Status) -> bool:
    halt = status.get("halt", {})
    return status.get("phase") == "Halted" and halt.get("acknowledged", 0) >= 1 and not halt.get("missing")


def orders(bench: Bench, rounds: int, runs: int, pause_s: float) -> None:
    for count in sorted({1, runs}):
        group = Orders(bench, count, pause_s)
        size = len(group.runs)
        time.sleep(SETTLE_S)
        print(f"{size} run(s), {pause_s * 1e3:.0f} ms a step, load {os.getloadavg()[0]:.1f}", flush=True)
        for title, order, lift in (
            ("patch", Orders.patch_all, Orders.lift_all),
            ("broadcast", Orders.broadcast, Orders.lift_broadcast),
        ):
            each, last = group.measure(order, lift, rounds)
            report(f"{title} -> all answers, {size} run(s)", "0.5 s", each)
            if size > 1:
                report(f"{title} -> the last of {size} runs", "1 s", last)
        group.close()


PARTS: dict[str, tuple[str, str, Callable[[Bench, int], list[float]]]] = {
    "apply": ("kubectl apply -> pod created", "0.5 s", apply_to_pod),
    "trainer": ("trainer process death -> CR", "0.5 s", trainer_death),
    "container": ("container death -> CR", "1 s", container_death),
    "halt": ("halt patch -> acknowledged", "0.5 s", halts),
    "halt-without-redis": ("halt patch -> acknowledged, no Redis", "1 s", halts_without_redis),
}


def report(name: str, goal: str, took: list[float]) -> None:
    ordered = sorted(took)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    print(tail(name, [seconds * 1e3 for seconds in took]))
    print(
        f"{name:38} n={len(took):3}  p50 {statistics.median(took) * 1e3:6.0f}  p95 {p95 * 1e3:6.0f}  "
        f"max {ordered[-1] * 1e3:6.0f} ms   goal p95 <= {goal}",
        flush=True,
    )


def footprint(cluster: kit.Cluster) -> None:
    """Sizes; the operator has been up for a while and has nothing to do."""
    time.sleep(SETTLE_S)
    (pod,) = cluster.json("-n", kit.SYSTEM, "get", "pods", "-l", "app.kubernetes.io/component=operator")["items"]
    memory = cluster.kubectl("-n", kit.SYSTEM, "exec", pod["metadata"]["name"], "--", "cat", "/proc/1/status")
    resident = int(next(line.split()[1] for line in memory.splitlines() if line.startswith("VmRSS"))) / 1024
    print(f"operator, idle: {resident:.0f} MiB resident   goal <= 120")
    if cluster.own:
        for name, goal in (("operator", "   goal <= 300"), ("sidecar", ""), ("runtime", "")):
            size = int(kit.command("docker", "image", "inspect", "-f", "{{.Size}}", f"esper/{name}:{cluster.tag}"))
            print(f"image {name}: {size / 1e6:.0f} MB unpacked{goal}")
    crd = yaml.safe_load((kit.ROOT / "crds/espertrainingruns.yaml").read_text())
    print(f"CRD, as JSON: {len(json.dumps(crd, separators=(',', ':'))) / 1000:.1f} KB   goal <= 60", flush=True)


@contextlib.contextmanager
def prepared() -> Iterator[Bench]:
    cluster = kit.make()
    try:
        cluster.install()
        cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=true", timeout_s=180)
        cluster.kubectl("create", "namespace", NAMESPACE)
        footprint(cluster)
        yield Bench(cluster)
        cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    finally:
        kit.remove(cluster)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20, help="of the orders to many")
    parser.add_argument("--pause-ms", type=float, default=20.0, help="in each of their steps")
    parser.add_argument("--only", default=",".join([*PARTS, ORDERS]), help="parts, separated by commas")
    arguments = parser.parse_args()
    commit = kit.command("git", "rev-parse", "--short", "HEAD").strip()
    print(f"{platform.machine()}, {os.cpu_count()} cores, commit {commit}, one node", flush=True)
    with prepared() as bench:
        for part in arguments.only.split(","):
            if part == ORDERS:
                orders(bench, arguments.rounds, arguments.runs, arguments.pause_ms / 1e3)
                continue
            name, goal, measure = PARTS[part]
            report(name, goal, measure(bench, arguments.rounds))


if __name__ == "__main__":
    main()
