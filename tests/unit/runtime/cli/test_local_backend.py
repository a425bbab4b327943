"""Commands about runs on this machine: found by name, changed under the lock, read without a runner."""

import threading

import pytest
from esper_runtime.cli.backend import BackendError, NotFound, Place, choose
from esper_runtime.cli.local_backend import LocalBackend, tail_offset
from esper_runtime.local.state import StateDir


@pytest.fixture
def root(tmp_path):
    return tmp_path / ".esper"


def make(root, name="digits", namespace="default", **spec):
    state = StateDir.of(namespace, name, below=root)
    state.create()
    metadata = {"name": name, "namespace": namespace, "generation": 1, "uid": "u"}
    state.write_new({"metadata": metadata, "spec": spec})
    return state


def test_runs_are_found_by_name(root):
    make(root)
    assert LocalBackend(root=root).get("digits")["metadata"]["uid"] == "u"
    with pytest.raises(NotFound, match="other: no such run below"):
        LocalBackend(root=root).get("other")


def test_a_name_in_two_namespaces_needs_the_namespace(root):
    make(root)
    make(root, namespace="team")
    with pytest.raises(BackendError, match="default, team: choose one with --namespace"):
        LocalBackend(root=root).get("digits")
    assert LocalBackend(root=root, namespace="team").get("digits")["metadata"]["namespace"] == "team"
    assert len(LocalBackend(root=root, namespace="team").runs(all_namespaces=False)) == 1
    assert len(LocalBackend(root=root, namespace="team").runs(all_namespaces=True)) == 2


def test_a_state_directory_can_be_named(root, tmp_path):
    state = make(root)
    assert LocalBackend(state=state.root).get("digits")
    with pytest.raises(NotFound, match="the run there is not 'other'"):
        LocalBackend(state=state.root).get("other")
    with pytest.raises(NotFound, match="no run lives here"):
        LocalBackend(state=tmp_path / "none").get("digits")


def test_a_patch_changes_only_what_it_names(root):
    make(root, suspend=False, emergencyStop="None")
    changed = LocalBackend(root=root).patch_spec("digits", {"emergencyStop": "Freeze"})
    assert changed["spec"] == {"suspend": False, "emergencyStop": "Freeze"}
    assert changed["metadata"]["generation"] == 2


def test_a_watch_sees_each_change(root):
    state = make(root, n=0)
    watch = LocalBackend(root=root).watch("digits")
    assert next(watch)["spec"]["n"] == 0
    writer = threading.Thread(target=lambda: state.change_spec(lambda spec: spec.update(n=1)))
    writer.start()
    assert next(r for r in watch if r["spec"]["n"] == 1)
    writer.join()


def test_logs_come_from_the_newest_pod(root):
    state = make(root)
    for pod, text in (("p1", "old\n"), ("p2", "one\ntwo\nthree\n")):
        (state.logs / pod).mkdir()
        (state.logs / pod / "tolaria.log").write_text(text)
    backend = LocalBackend(root=root)
    assert b"".join(backend.logs("digits", container="tolaria", follow=False, tail=None)) == b"one\ntwo\nthree\n"
    assert b"".join(backend.logs("digits", container="tolaria", follow=False, tail=2)) == b"two\nthree\n"
    assert b"".join(backend.logs("digits", container="tolaria", follow=True, tail=1)) == b"three\n"
    with pytest.raises(BackendError, match="container tamiyo has no log yet; there are logs of tolaria"):
        list(backend.logs("digits", container="tamiyo", follow=False, tail=None))


@pytest.mark.parametrize(("lines", "rest"), [(0, ""), (1, "c"), (2, "b\nc"), (3, "a\nb\nc"), (9, "a\nb\nc")])
def test_a_tail_may_end_without_a_newline(tmp_path, lines, rest):
    path = tmp_path / "log"
    path.write_text("a\nb\nc")
    assert path.read_text()[tail_offset(path, lines) :] == rest


def test_local_is_chosen_when_the_run_is_here(root, monkeypatch, tmp_path):
    make(root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert choose(Place(), "digits").is_local
    assert choose(Place(local=True), "absent").is_local
    with pytest.raises(BackendError, match=r"no run 'absent' below .esper .*, and no cluster to ask"):
        choose(Place(), "absent")
    with pytest.raises(BackendError, match="leave out --cluster"):
        choose(Place(state=tmp_path, local=False), "digits")
