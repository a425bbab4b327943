"""Pods and Jobs of the laptop with real processes: order, probes, restarts, exit codes, and nothing left behind."""

import asyncio
import json
import os
import signal
import textwrap

import pytest
from esper_leyline.paths import PathLayout
from esper_runtime.local.jobs import Jobs
from esper_runtime.local.objects import Objects
from esper_runtime.local.pod import LocalPod, Place
from esper_runtime.local.process import of_pod
from esper_runtime.local.state import StateDir

SIDECAR = textwrap.dedent(
    """
    import http.server, os, pathlib, signal, sys
    run, name = pathlib.Path(os.environ["ESPER_RUN_DIR"]), sys.argv[1]
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
        def log_message(self, *_): pass
    def stop(*_):
        with open(run / "order", "a") as f: f.write(f"-{name} ")
        os._exit(0)
    signal.signal(signal.SIGTERM, stop)
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    with open(run / "order", "a") as f: f.write(f"+{name} ")
    (run / f"{name}.port").write_text(str(server.server_port))
    server.serve_forever()
    """
)
PROBE = {"httpGet": {"path": "/readyz", "port": 0}, "periodSeconds": 1, "failureThreshold": 10}


def sidecar(name, run):
    return {
        "name": name,
        "restartPolicy": "Always",
        "command": ["python", "-c", SIDECAR, name],
        "env": [{"name": "ESPER_RUN_DIR", "value": str(run)}],
        "volumeMounts": [{"name": "run", "mountPath": str(run)}],
        "startupProbe": PROBE,
    }


def main(code, run, **fields):
    return {
        "name": "tolaria",
        "command": ["python", "-c", textwrap.dedent(code)],
        "env": [{"name": "ESPER_RUN_DIR", "value": str(run)}, {"name": "WORD", "value": "/dev/termination-log"}],
        "terminationMessagePath": "/dev/termination-log",
        "volumeMounts": [{"name": "run", "mountPath": str(run)}],
        **fields,
    }


class Bench:
    """A place for pods in a temporary directory."""

    def __init__(self, tmp_path):
        self.state = StateDir(tmp_path / "state")
        self.state.create()
        self.run = tmp_path / "run"
        self.changed = asyncio.Event()
        self.objects = Objects(self.state)
        self.place = Place(
            namespace="default",
            layout=PathLayout(run=str(self.run)),
            scratch=tmp_path / "scratch",
            logs=self.state.logs,
            working_directory=tmp_path,
            objects=self.objects,
            own_claim="r-checkpoints",
        )

    def template(self, code, *, sidecars=(), volumes=(), **fields):
        return {
            "metadata": {"labels": {"a": "b"}},
            "spec": {
                "terminationGracePeriodSeconds": 5,
                "initContainers": [sidecar(name, self.run) for name in sidecars],
                "containers": [main(code, self.run, **fields)],
                "volumes": [{"name": "run", "emptyDir": {"medium": "Memory"}}, *volumes],
            },
        }

    def pod(self, code, **fields):
        template = self.template(code, **fields)
        return LocalPod(name="p", template=template, owner={}, place=self.place, changed=self.changed.set)

    def log(self, pod="p", container="tolaria"):
        return (self.state.logs / pod / f"{container}.log").read_text()

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await asyncio.wait([asyncio.create_task(self.changed.wait())], timeout=0.05)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def container_status(pod, name="tolaria"):
    status = pod.manifest()["status"]
    return next(c for c in (*status["initContainerStatuses"], *status["containerStatuses"]) if c["name"] == name)


async def test_sidecars_start_in_order_and_end_in_reverse(bench):
    code = "import os; print(open(os.environ['ESPER_RUN_DIR'] + '/order').read())"
    pod = bench.pod(code, sidecars=("one", "two"))
    await pod.run()
    assert bench.log() == "+one +two \n"
    assert (bench.run / "order").read_text() == "+one +two -two -one "
    assert pod.manifest()["status"]["phase"] == "Succeeded"


async def test_exit_code_and_last_word_are_told(bench):
    pod = bench.pod("import os, sys; open(os.environ['WORD'], 'w').write('why'); sys.exit(71)")
    await pod.run()
    ended = container_status(pod)["state"]["terminated"]
    assert (ended["exitCode"], ended["message"], ended["reason"]) == (71, "why", "Error")
    assert pod.manifest()["status"]["phase"] == "Failed"


async def test_a_killed_container_has_128_plus_the_signal(bench):
    pod = bench.pod("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    await pod.run()
    assert pod.exit_codes() == {"tolaria": 137}


async def test_a_dead_sidecar_comes_back(bench):
    pod = bench.pod("import time; time.sleep(60)", sidecars=("one",))
    running = asyncio.create_task(pod.run())
    await bench.until(lambda: pod.manifest()["status"]["phase"] == "Running")
    os.kill(pod._sidecars[0].pid, signal.SIGKILL)
    await bench.until(lambda: container_status(pod, "one")["restartCount"] == 1)
    await bench.until(lambda: container_status(pod, "one")["ready"])
    assert container_status(pod, "one")["lastState"]["terminated"]["exitCode"] == 137
    pod.delete()
    await running


async def test_deletion_gives_the_grace_and_takes_143(bench):
    code = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
    print("up", flush=True)
    time.sleep(60)
    """
    pod = bench.pod(code)
    running = asyncio.create_task(pod.run())
    await bench.until(lambda: (bench.state.logs / "p/tolaria.log").exists() and bench.log() == "up\n")
    pod.delete()
    await running
    assert pod.exit_codes() == {"tolaria": 143}
    assert bench.log() == "up\nsaved\n"


async def test_a_second_deletion_without_grace_kills(bench):
    pod = bench.pod("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)\n"
                    "time.sleep(60)")  # fmt: skip
    running = asyncio.create_task(pod.run())
    await bench.until(lambda: (bench.state.logs / "p/tolaria.log").exists() and bench.log())
    pod.delete(grace_s=60)
    await asyncio.sleep(0)
    pod.delete(grace_s=0)
    await asyncio.wait_for(running, 5)
    assert pod.exit_codes() == {"tolaria": 137}


async def test_even_a_daemon_does_not_outlive_its_pod(bench):
    code = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    os.wait()
    """
    pod = bench.pod(code)
    await pod.run()
    assert pod.exit_codes() == {"tolaria": 0}
    assert of_pod(pod.uid) == []


async def test_memory_volumes_are_new_in_every_pod(bench):
    code = """
    import os, pathlib
    seen = pathlib.Path(os.environ["ESPER_RUN_DIR"], "seen")
    print(seen.exists())
    seen.write_text("x")
    """
    for _ in range(2):
        await bench.pod(code).run()
    assert bench.log() == "False\nFalse\n"


async def test_environment_and_volumes_arrive(bench):
    bench.objects.put({"kind": "Secret", "metadata": {"name": "s"}, "stringData": {"k": "secret"}})
    bench.objects.put({"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"k": "text", "other": "x"}})
    pod = bench.pod(
        "import os, json; print(json.dumps(dict(os.environ, shown=open(os.environ['FILE']).read(),"
        f" files=os.listdir('{bench.place.scratch}/volumes/conf'))))",
        env=[
            {"name": "A", "value": "1"},
            {"name": "B", "value": "$(A)2"},
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}},
            {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "z", "optional": True}}},
            {"name": "FILE", "value": "/conf/renamed"},
        ],
        volumes=[{"name": "conf", "configMap": {"name": "c", "items": [{"key": "k", "path": "renamed"}]}}],
        volumeMounts=[{"name": "conf", "mountPath": "/conf"}],
    )
    await pod.run()
    seen = json.loads(bench.log())
    assert (seen["A"], seen["B"], seen["NAME"], seen["LABEL"], seen["SECRET"]) == ("1", "12", "p", "b", "secret")
    assert seen["shown"] == "text"
    assert [f for f in seen["files"] if not f.startswith("..")] == ["renamed"]
    assert "NONE" not in seen
    assert seen["ESPER_POD_UID"] == pod.uid
    assert "ESPER_TEST_LEAK" not in seen


async def test_a_job_replaces_a_drained_pod_and_fails_on_a_crash(bench):
    policy = {"rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [143]}}]}
    code = f"""
    import os, pathlib, sys
    count = pathlib.Path({str(bench.state.checkpoints)!r}, "count")
    number = int(count.read_text()) if count.exists() else 0
    count.write_text(str(number + 1))
    sys.exit(143 if number == 0 else 70)
    """
    pods = []
    jobs = Jobs(bench.place, changed=bench.changed.set, on_pod=lambda pod, begins: pods.append((pod.name, begins)))
    manifest = {
        "metadata": {"name": "r-a1"},
        "spec": {"podFailurePolicy": policy, "template": bench.template(code)},
    }
    jobs.create(manifest)
    jobs.create(manifest)  # a second creation changes nothing
    await bench.until(lambda: jobs.manifests()[0]["status"]["conditions"])
    [condition] = jobs.manifests()[0]["status"]["conditions"]
    assert (condition["type"], condition["reason"]) == ("Failed", "BackoffLimitExceeded")
    assert "tolaria exited with 70" in condition["message"]
    assert [begins for _, begins in pods] == [True, False, True, False]
    await jobs.stop()
    jobs.collect()
    assert jobs.manifests() == []
