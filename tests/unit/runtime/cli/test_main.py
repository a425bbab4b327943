"""The command line: help, exit codes, and errors as one message with a remedy, never a traceback."""

import errno
import os
from importlib.metadata import entry_points

import pytest
import yaml
from esper_leyline.exitcodes import CliExit
from esper_runtime.cli.main import app, guarded
from esper_runtime.local.errors import ManifestError
from esper_runtime.local.state import StateDir

COMMANDS = (
    "run", "validate", "list", "status", "logs", "halt", "resume", "suspend", "fetch", "report", "checkpoint", "bus",
    "crd", "version",
)  # fmt: skip


@pytest.fixture
def esper(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty directory without a cluster; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))

    def call(*words):
        code = guarded(lambda: app(list(words), standalone_mode=False))
        return code, *capsys.readouterr()

    return call


def test_both_names_are_installed():
    installed = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert installed["esper"] == installed["kubectl-esper"] == "esper_runtime.cli.main:main"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(esper, command):
    code, out, err = esper(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")
    assert max(len(line) for line in out.splitlines()) <= 80


def test_the_list_of_commands_is_readable_in_one_look(esper):
    code, out, _ = esper("--help")
    assert code == 0
    assert "..." not in out.partition("Commands:")[2]  # nothing is cut off
    for command in COMMANDS:
        assert f"\n  {command} " in out


def test_exit_codes_are_in_the_help(esper):
    out = esper("run", "--help")[1]
    for code in CliExit:
        assert f"{int(code):>7}  " in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["list"], 1, "start one with `esper run MANIFEST`"),
        (["list", "--local"], 0, "no runs found"),
        (["status", "x"], 1, "no run 'x' below .esper"),
        (["status", "x", "--local"], 1, "x: no such run below .esper"),
        (["logs", "x", "--cluster"], 1, "give --kubeconfig, or set KUBECONFIG"),
        (["halt", "x", "--mode", "Now"], 2, "'Freeze', 'Checkpoint', 'Kill'"),
        (["run"], 2, "Missing argument 'MANIFEST'"),
        (["run", "gone.yaml"], 2, "gone.yaml: No such file or directory: give the path of a manifest"),
        (["run", "gone.yaml", "--mount", "data"], 2, "--mount data: write NAME=DIR"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(esper, words, code, said):
    found, out, err = esper(*words)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["a: [", "x", "[]", "clusters: 3\ncontexts: 1\nusers: 2\ncurrent-context: 1"])
def test_a_file_that_is_no_kubeconfig_is_named(esper, tmp_path, text):
    (tmp_path / "config").write_text(text)
    code, out, err = esper("list", "--kubeconfig", "config")
    assert (code, out) == (1, "")
    assert err.startswith(("error: kubeconfig config: cannot be read", "error: no cluster: "))


def test_a_cluster_that_is_not_there_is_said_so(esper, tmp_path):
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "current-context": "c",
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    code, _, err = esper("status", "x", "--kubeconfig", "config")
    assert code == 1
    assert "the cluster cannot be reached" in err
    assert "Connection refused" in err


def test_a_result_is_all_that_standard_output_gets(esper, tmp_path):
    state = StateDir.of("default", "r", below=tmp_path / ".esper")
    state.create()
    state.write_new({"metadata": {"name": "r", "namespace": "default", "uid": "u"}, "spec": {}})
    assert yaml.safe_load(esper("status", "r", "-o", "yaml")[1])["metadata"]["uid"] == "u"
    assert esper("list", "-o", "name")[1] == "espertrainingrun.esper.dev/r\n"
    code, out, err = esper("halt", "r", "--no-wait")
    assert (code, out) == (0, "")
    assert "nothing drives this run now" in err


def failing(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "error: /f: No space left on device: free some space, or choose another directory"),
        (errno.EROFS, "error: /f: Read-only file system: choose another directory with --state"),
        (errno.EACCES, "error: /f: Permission denied: choose another directory with --state"),
    ],
)
def test_errors_of_the_disk_are_no_tracebacks(capsys, number, remedy):
    assert guarded(failing(OSError(number, os.strerror(number), "/f"))) == 1
    assert remedy in capsys.readouterr().err


def test_each_problem_of_a_manifest_has_its_line(capsys):
    assert guarded(failing(ManifestError("spec.a: one", "spec.b: two"))) == 2
    assert capsys.readouterr().err == "error: spec.a: one\nerror: spec.b: two\n"


def test_ctrl_c_is_130():
    assert guarded(failing(KeyboardInterrupt())) == 130


def test_a_bug_is_not_hidden():
    with pytest.raises(OSError, match="odd"):
        guarded(failing(OSError(errno.ENOTTY, "odd")))
