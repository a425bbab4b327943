"""The cluster that the e2e tests run on, and the few things they do to it.

KUBECONFIG given: that cluster, and images under ESPER_E2E_IMAGE_TAG must be pullable there. Otherwise a kind cluster
is made from $KIND_NODE_IMAGE (or kind's own default), and the images are built from this repository and loaded.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

ROOT = Path(__file__).resolve().parents[2]
NAME = "esper-e2e"
SYSTEM = "esper-system"
IMAGES = ("operator", "sidecar", "runtime", "valkey")
T = TypeVar("T")


class Failed(AssertionError):
    """A command or a wait failed; the text says what was seen last."""


def command(*words: str, stdin: str | None = None, timeout_s: float = 120, check: bool = True, **env: str) -> str:
    """Runs a command; its standard output. Failed with all it printed when it exits non-zero."""
    done = subprocess.run(
        words, input=stdin, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **env}, cwd=ROOT
    )
    if check and done.returncode:
        raise Failed(f"{' '.join(words)} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def until(what: str, seen: Callable[[], T | None], *, timeout_s: float, every_s: float = 0.2) -> T:
    """Polls `seen` until it gives something true; Failed after timeout_s, naming `what`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = seen()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Failed(f"waited {timeout_s:.0f} s for {what}; last seen: {found!r}")
        time.sleep(every_s)


@dataclass
class Cluster:
    """kubectl and helm against one cluster."""

    kubeconfig: Path
    tag: str
    own: bool
    """Made by these tests."""
    loaded: set[str] = field(default_factory=set)

    def kubectl(self, *words: str, stdin: str | None = None, timeout_s: float = 120, check: bool = True) -> str:
        return command(
            "kubectl", *words, stdin=stdin, timeout_s=timeout_s, check=check, KUBECONFIG=str(self.kubeconfig)
        )

    def helm(self, *words: str, timeout_s: float = 300, check: bool = True) -> str:
        return command("helm", *words, timeout_s=timeout_s, check=check, KUBECONFIG=str(self.kubeconfig))

    def json(self, *words: str) -> dict[str, Any]:
        return dict(json.loads(self.kubectl(*words, "-o", "json")))

    def helm_values(self) -> list[str]:
        images = {
            "image": f"esper/operator:{self.tag}",
            "sidecar.image": f"esper/sidecar:{self.tag}",
            "runtime.image": f"esper/runtime:{self.tag}",
            "valkey.image": f"esper/valkey:{self.tag}",
        }
        values = []
        for key, image in images.items():
            repository, tag = image.rsplit(":", 1)
            values += ["--set", f"{key}.repository={repository}", "--set-string", f"{key}.tag={tag}"]
        return [*values, "--set", "faultInjection.enabled=true", "--set", "valkey.maxMemory=24mb"]

    def install(self, *extra: str) -> None:
        chart = str(ROOT / "charts/esper")
        self.helm(
            *(
                "upgrade",
                "--install",
                "esper",
                chart,
                "-n",
                SYSTEM,
                "--create-namespace",
                "--wait",
                "--timeout",
                "180s",
            ),
            *self.helm_values(),
            *extra,
        )


def chart_version() -> str:
    return str(yaml.safe_load((ROOT / "charts/esper/Chart.yaml").read_text())["appVersion"])


def content_tag() -> str:
    """A tag that names what the images are made of."""
    files = ("Dockerfile", "docker", "proto", "operator", "runtime")
    listed = command("git", "ls-files", "-co", "--exclude-standard", *files).split()
    digest = command("sha256sum", *[f for f in listed if (ROOT / f).is_file()])
    return command("sha256sum", stdin=digest)[:12]


def make() -> Cluster:
    """The cluster of this session, with the images on it."""
    given = os.environ.get("KUBECONFIG")
    if given:
        return Cluster(Path(given), os.environ.get("ESPER_E2E_IMAGE_TAG", chart_version()), own=False)
    if os.environ.get("ESPER_E2E_KEEP") and (kept := _kept()):
        cluster = kept
    else:
        kubeconfig = Path(os.environ.get("TMPDIR", "/tmp")) / f"{NAME}.kubeconfig"
        # A cluster of an interrupted run may still be listed: docker brings its node back.
        command("kind", "delete", "cluster", "--name", NAME, timeout_s=120)
        image = os.environ.get("KIND_NODE_IMAGE")
        command(
            *("kind", "create", "cluster", "--name", NAME, "--kubeconfig", str(kubeconfig), "--wait", "180s"),
            *(("--image", image) if image else ()),
            timeout_s=400,
        )
        cluster = Cluster(kubeconfig, "", own=True)
    cluster.tag = content_tag()
    command("scripts/images", cluster.tag, timeout_s=1500)
    for name in IMAGES:
        _load(f"esper/{name}:{cluster.tag}")
    return cluster


def _kept() -> Cluster | None:
    if NAME not in command("kind", "get", "clusters").split():
        return None
    kubeconfig = Path(os.environ.get("TMPDIR", "/tmp")) / f"{NAME}.kubeconfig"
    kubeconfig.write_text(command("kind", "get", "kubeconfig", "--name", NAME))
    return Cluster(kubeconfig, "", own=True)


def _load(image: str) -> None:
    node = f"{NAME}-control-plane"
    there = command("docker", "exec", node, "ctr", "-n", "k8s.io", "images", "ls", "-q", check=False)
    if f"docker.io/{image}" not in there.split():
        command("kind", "load", "docker-image", image, "--name", NAME, timeout_s=600)


def remove(cluster: Cluster) -> None:
    if cluster.own and not os.environ.get("ESPER_E2E_KEEP"):
        command("kind", "delete", "cluster", "--name", NAME, timeout_s=120)


@dataclass
class RunHandle:
    """One EsperTrainingRun of a test."""

    cluster: Cluster
    namespace: str
    name: str

    def kubectl(self, *words: str, **options: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *words, **options)

    def get(self) -> dict[str, Any]:
        return dict(json.loads(self.kubectl("get", "etr", self.name, "-o", "json")))

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.get().get("status", {}))

    def phase(self) -> str:
        return str(self.status.get("phase", ""))

    def patch(self, spec: dict[str, Any]) -> None:
        self.kubectl("patch", "etr", self.name, "--type", "merge", "-p", json.dumps({"spec": spec}))

    def wait_phase(self, *phases: str, timeout_s: float = 120) -> dict[str, Any]:
        """The status once its phase is one of `phases`."""
        return self.wait(f"{self.name} to be {' or '.join(phases)}", lambda s: s.get("phase") in phases, timeout_s)

    def wait(self, what: str, holds: Callable[[dict[str, Any]], Any], timeout_s: float = 120) -> dict[str, Any]:
        last: dict[str, Any] = {}

        def seen() -> dict[str, Any] | None:
            last.clear()
            last.update(self.status)
            return dict(last) if holds(last) else None

        try:
            return until(what, seen, timeout_s=timeout_s)
        except Failed as error:
            raise Failed(f"{error}\nstatus: {json.dumps(last, indent=1)}") from error

    def wait_step(self, step: int, timeout_s: float = 180) -> dict[str, Any]:
        return self.wait(
            f"{self.name} to reach step {step}", lambda s: s.get("progress", {}).get("step", 0) >= step, timeout_s
        )

    def pods(self) -> list[dict[str, Any]]:
        listed = self.kubectl("get", "pods", "-l", f"esper.dev/run={self.name}", "-o", "json")
        return list(json.loads(listed)["items"])

    def pod(self) -> str:
        """Name of the one live pod."""
        live = [
            p for p in self.pods() if not p["metadata"].get("deletionTimestamp") and p["status"]["phase"] == "Running"
        ]
        if len(live) != 1:
            raise Failed(f"{self.name} has {len(live)} live pods, expected one")
        return str(live[0]["metadata"]["name"])

    def exec(self, *words: str, container: str = "tolaria", pod: str | None = None, check: bool = True) -> str:
        return self.kubectl("exec", pod or self.pod(), "-c", container, "--", *words, check=check)

    def python(self, code: str, *, container: str = "tolaria", check: bool = True) -> str:
        return self.exec("python", "-c", code, container=container, check=check)

    def kill_trainer(self) -> None:
        """SIGKILL to the trainer process, by PID from supervisor.page's second word."""
        self.python(
            "import os,signal,struct;"
            "words=struct.unpack('<8Q',open('/run/esper/supervisor.page','rb').read(64));"
            "os.kill(words[2],signal.SIGKILL)"
        )

    def events(self) -> list[dict[str, Any]]:
        listed = json.loads(self.kubectl("get", "events.events.k8s.io", "-o", "json"))["items"]
        return [e for e in listed if e.get("regarding", {}).get("name") == self.name]

    def wait_event(self, reason: str, timeout_s: float = 30) -> dict[str, Any]:
        """The first Event of that reason; Events are written after the status that they explain."""

        def seen() -> dict[str, Any] | None:
            return next((event for event in self.events() if event["reason"] == reason), None)

        return until(f"Event {reason} of {self.name}", seen, timeout_s=timeout_s)

    def condition(self, kind: str) -> dict[str, Any]:
        return next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})


def manifest(path: str, *, name: str | None = None, **spec: Any) -> tuple[str, str]:
    """An example as YAML text, its run renamed and its spec merged over; (text, run name)."""
    documents = list(yaml.safe_load_all((ROOT / path).read_text()))
    run = next(d for d in documents if d["kind"] == "EsperTrainingRun")
    run["metadata"]["name"] = name or run["metadata"]["name"]
    _merge(run["spec"], spec)
    return yaml.safe_dump_all(documents), run["metadata"]["name"]


def _merge(into: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def collect(cluster: Cluster, namespace: str, folder: Path) -> None:
    """Everything a person needs to see why a test failed: resources, events, logs of every container."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, words in {
        "runs.yaml": ("get", "etr", "-o", "yaml"),
        "objects.yaml": ("get", "jobs,pods,pvc,cm,svc", "-o", "yaml"),
        "events.txt": ("get", "events", "--sort-by=.metadata.creationTimestamp"),
        "pods.txt": ("describe", "pods"),
    }.items():
        (folder / name).write_text(cluster.kubectl("-n", namespace, *words, check=False))
    for where in (namespace, SYSTEM):
        pods = json.loads(cluster.kubectl("-n", where, "get", "pods", "-o", "json", check=False) or '{"items": []}')
        for pod in pods["items"]:
            for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
                for previous in ("false", "true"):
                    text = cluster.kubectl(
                        *("-n", where, "logs", pod["metadata"]["name"], "-c", container["name"]),
                        f"--previous={previous}",
                        check=False,
                    )
                    if text:
                        suffix = ".previous" if previous == "true" else ""
                        (folder / f"{where}.{pod['metadata']['name']}.{container['name']}{suffix}.log").write_text(text)


@contextlib.contextmanager
def redis_away(cluster: Cluster) -> Iterator[None]:
    """Valkey scaled to zero, and back afterwards."""
    workload = ("-n", SYSTEM, "statefulset/esper-valkey")
    cluster.kubectl("scale", "--replicas=0", *workload)
    until(
        "Valkey to be gone",
        lambda: not cluster.json("-n", SYSTEM, "get", "pods", "-l", "app.kubernetes.io/component=valkey")["items"],
        timeout_s=60,
    )
    try:
        yield
    finally:
        cluster.kubectl("scale", "--replicas=1", *workload)
        cluster.kubectl("-n", SYSTEM, "rollout", "status", "statefulset/esper-valkey", "--timeout=90s")


def node(cluster: Cluster, script: str, *, check: bool = True) -> str:
    """A shell command on the node of a cluster of ours, as root, who sees the processes of all containers."""
    assert cluster.own
    return command("docker", "exec", f"{NAME}-control-plane", "sh", "-c", script, check=check)


def kill_operator(cluster: Cluster) -> None:
    """As in the issue: gone without a goodbye."""
    cluster.kubectl(
        *("-n", SYSTEM, "delete", "pod", "-l", "app.kubernetes.io/component=operator"),
        *("--grace-period=0", "--force", "--wait=false"),
    )
