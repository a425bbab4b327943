"""`esper halt -l` and `--all` on this machine; on a cluster tests/apiserver/test_operator_many.py does it."""

import pytest
import yaml
from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.local_backend import LocalBackend
from esper_runtime.cli.many import Wanted, halt_many, resume_broadcast
from esper_runtime.local.state import StateDir


@pytest.fixture
def backend(tmp_path):
    for namespace, name, labels in (
        ("default", "one", {"team": "vision"}),
        ("default", "two", {"team": "speech"}),
        ("other", "three", {"team": "vision"}),
    ):
        state = StateDir.of(namespace, name, below=tmp_path / ".esper")
        state.create()
        metadata = {"name": name, "namespace": namespace, "uid": name, "labels": labels}
        state.write_new({"metadata": metadata, "spec": {}})
    return LocalBackend(root=tmp_path / ".esper", namespace="default")


def halt(backend, selector="", *, dry_run=False, namespaces=("default",), all_namespaces=False):
    halt_many(
        backend,
        Wanted(selector=selector, namespaces=namespaces, mode="Checkpoint"),
        operator_namespace="",
        dry_run=dry_run,
        wait_s=0.0,
        all_namespaces=all_namespaces,
    )


def stopped(backend):
    runs = backend.runs(all_namespaces=True)
    return {run["metadata"]["name"] for run in runs if run["spec"].get("emergencyStop") == "Checkpoint"}


@pytest.mark.parametrize(
    ("selector", "names"), [("team=vision", {"one"}), ("team in (speech)", {"two"}), ("", {"one", "two"})]
)
def test_those_that_match_are_stopped_and_named(backend, capsys, selector, names):
    halt(backend, selector, dry_run=True)
    said = capsys.readouterr().err
    assert stopped(backend) == set()
    assert {line.split("/")[1].split()[0] for line in said.splitlines() if line.startswith("would stop")} == names
    halt(backend, selector)
    assert stopped(backend) == names


def test_a_selector_that_is_none_stops_nothing(backend):
    with pytest.raises(BackendError, match="-l team=="):
        halt(backend, "team==(")
    assert stopped(backend) == set()


def test_a_stop_that_stops_nothing_is_an_error(backend):
    with pytest.raises(BackendError, match="nothing was stopped"):
        halt(backend, "team=nobody")


def test_a_dry_run_promises_nothing_about_runs_to_come(backend, capsys):
    """Which is true of a broadcast alone."""
    halt(backend, dry_run=True)
    assert "2 of the runs that there are now\n" in capsys.readouterr().err


def test_there_are_no_broadcasts_on_this_machine(backend):
    with pytest.raises(BackendError, match="`esper resume NAME`"):
        resume_broadcast(backend, "cli-1", operator_namespace="")


def test_the_same_wish_is_the_same_broadcast():
    wish = Wanted(selector="team=vision", namespaces=("a",), mode="Kill", reason="fire")
    assert wish.id == Wanted(selector="team=vision", namespaces=("a",), mode="Kill").id
    assert wish.id != Wanted(selector="team=vision", namespaces=("b",), mode="Kill").id
    document = yaml.safe_load(wish.document())
    assert document == {"mode": "Kill", "selector": "team=vision", "namespaces": ["a"], "reason": "fire"}
