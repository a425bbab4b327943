"""Bad input and hostile hands: each is named, none loses anything."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from . import cluster as kit

Start = Callable[..., kit.RunHandle]
LONG = {"config": {"epochs": 500}}
CODE = """
from esper_runtime.workload import Workload

def wrong_type(config):
    return 42

def raises(config):
    return helper(config)

def helper(config):
    raise RuntimeError("the moon is in the wrong phase")
"""


def apply_code(run_namespace: str, cluster: kit.Cluster) -> None:
    code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "code"}, "data": {"mine.py": CODE}}
    cluster.kubectl("-n", run_namespace, "apply", "-f", "-", stdin=json.dumps(code))


def test_user_code_that_cannot_work_fails_with_its_own_words(
    start: Start, release: kit.Cluster, namespace: str
) -> None:
    apply_code(namespace, release)
    cases: dict[str, tuple[dict[str, Any], str, str]] = {
        "missing": ({"entrypoint": "no_such_module:build"}, "EntrypointNotFound", "no_such_module"),
        "wrong-type": ({"entrypoint": "mine:wrong_type", "codeConfigMapName": "code"}, "EntrypointWrongType", "int"),
        "raises": ({"entrypoint": "mine:raises", "codeConfigMapName": "code"}, "UserCodeError", "wrong phase"),
        "unknown-key": ({"config": {"epohcs": 3}}, "UnknownConfigKey", "epohcs"),
    }
    for name, (runtime, reason, words) in cases.items():
        run = start("examples/digits.yaml", name=name, runtime=runtime)
        status = run.wait_phase("Failed", timeout_s=120)
        failure = status["lastFailure"]
        assert failure["reason"] == reason, failure
        assert words in failure["message"], failure
        assert failure["exitCode"] == 71
        assert failure["podName"].startswith(f"{name}-a1")
        assert run.condition("Failed")["status"] == "True"
        assert status["restarts"]["total"] == 0, "no restart helps"
        run.kubectl("delete", "etr", name)


def test_what_the_cluster_cannot_give_is_a_condition_and_no_churn(start: Start) -> None:
    cases: dict[str, tuple[str, dict[str, Any], str, str]] = {
        "no-image": ("examples/own-image.yaml", {}, "PodsReady", "ImagePullFailed"),
        "gpu": ("examples/gpu.yaml", {}, "PodsReady", "Unschedulable"),
        "no-class": (
            "examples/digits.yaml",
            {"checkpoint": {"storage": {"claimTemplate": {"size": "1Gi", "storageClassName": "nowhere"}}}},
            "PodsReady",
            "ClaimPending",
        ),
    }
    runs = {name: start(path, name=name, **spec) for name, (path, spec, _, _) in cases.items()}
    for name, run in runs.items():
        kind, reason = cases[name][2:]

        def named(_: object, run: kit.RunHandle = run, kind: str = kind, reason: str = reason) -> bool:
            return bool(run.condition(kind).get("reason") == reason)

        run.wait(f"{name}: {kind} to say {reason}", named, 120)
        assert run.status["attempt"] == 1
        assert len(run.pods()) == 1
        print(name, run.condition(kind)["message"])


def test_a_second_run_on_the_same_claim_is_refused(start: Start) -> None:
    first = start("examples/digits.yaml", name="first", runtime=LONG)
    first.wait_phase("Running", timeout_s=120)
    storage = {"storage": {"claimTemplate": None, "claimName": "first-checkpoints"}}
    second = start("examples/digits.yaml", name="second", runtime=LONG, checkpoint=storage)
    second.wait("the refusal", lambda _: second.condition("Accepted").get("reason") == "CheckpointClaimInUse", 60)
    assert "first" in second.condition("Accepted")["message"]
    assert second.pods() == []
    # The claim outlives its run, and so does its word whose state it holds: the second layer.
    first.kubectl("delete", "etr", first.name, "--wait=true")
    failure = second.wait_phase("Failed", timeout_s=180)["lastFailure"]
    assert (failure["reason"], failure["exitCode"]) == ("CheckpointDirUnusable", 74)
    assert "belongs to run" in failure["message"]
    assert "subPath" in failure["message"], "the remedy"


def test_a_flipped_bit_is_found_and_named(start: Start) -> None:
    run = start(
        "examples/digits.yaml", name="flipped", runtime=LONG, checkpoint={"everySteps": 50, "periodSeconds": None}
    )
    run.wait("three checkpoints", lambda s: s.get("checkpoint", {}).get("count", 0) >= 3, 180)
    run.patch({"emergencyStop": "Freeze"})
    run.wait_phase("Halted", timeout_s=60)
    bad, newest = run.python(
        "import json,pathlib;"
        "f=sorted(pathlib.Path('/checkpoints').glob('*/a*/gen-*/manifest.json'))[-1];"
        "step=json.loads(f.read_text())['step'];f=f.with_name('model.safetensors');"
        "b=bytearray(f.read_bytes());b[-5]^=1;f.write_bytes(b);print(f.parent.name,step)"
    ).split()
    run.patch({"emergencyStop": "Kill"})
    kit.until("the pod to end", lambda: all(p["status"]["phase"] != "Running" for p in run.pods()), timeout_s=60)
    run.patch({"emergencyStop": "None"})
    status = run.wait("training again", lambda s: s["phase"] == "Running" and s["attempt"] == 2, 180)
    assert status["lastRecovery"]["toStep"] < int(newest)
    run.wait_event("CheckpointCorrupt")
    notes = [e["note"] for e in run.events() if e["reason"] == "CheckpointCorrupt"]
    assert any(bad in note for note in notes), notes


def test_forged_signals_are_ignored_and_counted(start: Start, release: kit.Cluster) -> None:
    run = start("examples/digits.yaml", name="forged", runtime=LONG)
    run.wait_phase("Running", timeout_s=120)
    uid = run.get()["metadata"]["uid"]
    login = 'REDISCLI_AUTH="$(cat /etc/valkey-auth/password)" valkey-cli --user operator'
    valkey = f'{login} --tls --cacert /etc/valkey-tls/ca.crt XADD oona.signals.{uid} "*" e garbage'
    release.kubectl("-n", kit.SYSTEM, "exec", "esper-valkey-0", "--", "sh", "-c", valkey)

    def rejected() -> list[str]:
        return [e["note"] for e in run.events() if e["reason"] == "SignalRejected"]

    notes = kit.until("the Event", rejected, timeout_s=60)
    print(notes)
    step = run.status["progress"]["step"]
    run.wait("progress", lambda s: s["progress"]["step"] > step, 60)


def test_more_than_a_restricted_pod_is_refused(release: kit.Cluster, namespace: str) -> None:
    text, name = kit.manifest("examples/digits.yaml", name="hostile")
    document = next(d for d in yaml.safe_load_all(text) if d["kind"] == "EsperTrainingRun")
    document["spec"]["workers"] = {"pod": {"hostNetwork": True, "serviceAccountName": "admin", "hostPath": "/"}}
    words = ("-n", namespace, "apply", "-f", "-")
    with pytest.raises(kit.Failed, match="unknown field"):
        release.kubectl(*words, stdin=json.dumps(document))
    release.kubectl(*words, "--validate=ignore", stdin=json.dumps(document))
    stored = kit.RunHandle(release, namespace, name).get()
    assert "hostNetwork" not in stored["spec"].get("workers", {}).get("pod", {}), "pruned by the structural schema"


def test_an_edit_that_may_not_take_effect_is_refused(start: Start) -> None:
    run = start("examples/digits.yaml", name="edited", runtime=LONG)
    run.wait_phase("Running", timeout_s=120)
    with pytest.raises(kit.Failed, match="may only be changed while"):
        run.patch({"runtime": {"config": {"epochs": 501}}})
    run.patch({"health": {"nonFiniteAction": "Halt"}})
    run.wait(
        "the trainer to read it",
        lambda _: any(e["reason"] == "ConfigChanged" for e in run.events()),
        90,
    )


def test_every_other_example_runs(start: Start) -> None:
    run = start("examples/code-from-configmap.yaml")
    run.kubectl("wait", "etr", run.name, "--for=condition=Finished", "--timeout=240s", timeout_s=260)
    assert run.phase() == "Succeeded", run.status
