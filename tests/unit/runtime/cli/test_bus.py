"""`esper bus` without a server: how messages and letters are shown, where Redis is looked for, what is refused."""

import contextlib
import json
import socket
import threading
import types

import pytest
import yaml
from esper_leyline.oona import STREAMS, Entry, Kept
from esper_leyline.oona.deadletter import letter
from esper_leyline.signing import Role, SigningKey, Verifier, seal
from esper_leyline.v1 import common_pb2 as pb
from esper_leyline.v1.bus_pb2 import DeadLetter, DeadLetterReason
from esper_leyline.v1.report_pb2 import RunReport
from esper_runtime.cli import buslink, busview
from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.buslink import Reach, forwarded, reached
from esper_runtime.cli.main import app, guarded
from esper_runtime.cli.output import Format
from esper_runtime.local.state import StateDir

KEY, OTHER = (SigningKey.derive(b"s" * 32, uid, Role.REPORT) for uid in ("uid", "other"))
NOW = 1_764_470_000_000


@pytest.fixture
def esper(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))

    def call(*words):
        code = guarded(lambda: app(["bus", *words], standalone_mode=False))
        return code, *capsys.readouterr()

    return call


def entry(text="x", *, kind=pb.BUS_MESSAGE_TYPE_RUN_REPORT, seconds_ago=5):
    payload = RunReport(run_uid="uid", seq=7).SerializeToString() if text == "x" else text
    return Entry(f"{NOW - seconds_ago * 1000}-0", seal(payload, kind, run_uid="uid", key=KEY).SerializeToString())


@pytest.mark.parametrize("name", [*STREAMS, *(n.removeprefix("oona.") for n in STREAMS)])
def test_a_stream_is_known_by_both_of_its_names(name):
    assert busview.stream_of(name).name.removeprefix("oona.") == name.removeprefix("oona.")


def test_signals_are_those_of_a_run():
    assert busview.stream_of("signals.uid").name == busview.stream_of("oona.signals.uid").name == "oona.signals.uid"
    assert busview.stream_of("signals.") is None
    assert busview.stream_of("oona.none") is None


@pytest.mark.parametrize(
    ("verifier", "said"),
    [
        (None, "unchecked"),
        (Verifier.from_text(KEY.public_text()), "valid"),
        (Verifier.from_text(OTHER.public_text()), "unknown_key_id"),
    ],
)
def test_a_signature_counts_only_where_its_key_is_given(verifier, said):
    row = busview.message(entry(), NOW, verifier)
    assert row["signature"] == said
    assert (row["type"], row["priority"], row["runUid"], row["age"]) == ("RUN_REPORT", "NORMAL", "uid", 5.0)
    assert row["payload"] == {"runUid": "uid", "seq": "7"}


def test_what_is_no_message_is_shown_as_such():
    assert busview.message(Entry("1-0", b"\xff"), NOW)["type"] == "UNDECODABLE"
    assert busview.message(entry(b"\xff"), NOW)["payload"] is None
    unsigned = busview.message(Entry("1-0", b"\x18\x01"), NOW)
    assert unsigned["signature"] == "missing_signature"


def test_each_format_has_its_line():
    row = busview.message(entry(), NOW)
    assert busview.line(row, Format.NAME) == row["id"]
    assert json.loads(busview.line(row, Format.JSON)) == row
    assert yaml.safe_load(busview.line(row, Format.YAML)) == row
    assert "\n" not in busview.line(row, Format.JSON)
    table, wide = busview.line(row, Format.TABLE), busview.line(row, Format.WIDE)
    assert table.split() == [row["id"], "5s", "RUN_REPORT", "NORMAL", "uid"]
    assert wide.split()[5:7] == [KEY.key_id, "unchecked"]
    assert busview.heading(Format.JSON) == ""
    assert busview.heading(Format.WIDE).split()[-2:] == ["BYTES", "CORRELATION"]


def test_a_letter_says_why_and_what():
    raw = letter(
        entry(), reason=DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED, detail="no\nway " * 30,
        stream=STREAMS["oona.normal"], group="g", consumer="c", attempts=5,
    )  # fmt: skip
    row = busview.letter(Kept("9-0", DeadLetter.FromString(raw)), whole=True)
    assert (row["reason"], row["stream"], row["attempts"]) == ("HANDLER_FAILED", "oona.normal", 5)
    assert row["message"]["payload"] == {"runUid": "uid", "seq": "7"}
    shown = busview.letters([row], Format.TABLE).splitlines()
    assert len(shown) == 2
    assert shown[1].endswith("...")
    assert busview.letters([row], Format.NAME) == "9-0"


def test_groups_are_listed_below_their_stream():
    group = {"name": "g", "pending": 1, "lag": None, "consumers": [{"name": "c", "pending": 1, "idleMs": 90_000}]}
    row = {"stream": "oona.normal", "length": 3, "newestAge": 4.2, "groups": [group, {**group, "name": "h", "lag": 2}]}
    lines = [line.split() for line in busview.streams([row], Format.TABLE).splitlines()]
    assert lines[1:] == [["oona.normal", "3", "4s", "g", "1", "?", "1"], ["h", "1", "2", "1"]]
    assert busview.consumers(row).split()[4:8] == ["g", "c", "1", "90s"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tail", "nonsense"], "no stream 'nonsense'"),
        (["tail", "reports", "--public-key", "/none"], "--public-key"),
        (["dead-letter", "--reason", "bored"], "--reason bored"),
        (["replay"], "give ids, or --all"),
        (["replay", "1-0", "--all"], "give ids, or --all"),
        (["replay", "1-0", "--reason", "INVALID"], "--reason belongs to --all"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_asked(esper, words, said):
    code, out, err = esper(*words)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--url", "http://x"], "must begin with redis://"),
        (["--url", "redis://127.0.0.1:1"], "Redis: "),
        (["--url", "redis://x", "--password-file", "/none"], "/none: cannot be read"),
        (["--username", "me"], "belong to --url"),
        (["--state", "nowhere"], "no `esper run` with Redis"),
        (["--local"], "no `esper run` with Redis"),
        ([], "no cluster to ask"),
    ],
)
def test_a_redis_that_cannot_be_reached_is_one_message(esper, words, said):
    code, out, err = esper("peek", *words)
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_what_the_operator_s_user_needs_is_printed_for_acl_setuser(esper):
    code, out, _ = esper("acl")
    assert code == 0
    assert "+acl|setuser" in out
    assert "acl|" not in esper("acl", "--no-users")[1]


def test_a_running_esper_run_is_found_by_its_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = [StateDir.of("default", name) for name in ("a", "b")]
    with contextlib.ExitStack() as stack:
        for number, state in enumerate(states):
            state.create()
            state.write_new({"metadata": {"name": state.root.name}, "spec": {}})
            scratch = tmp_path / f"esper-{number}"
            scratch.mkdir()
            (scratch / "redis.sock").touch()
            state.remember_scratch([scratch])
        stack.enter_context(states[0].runner_lock())
        with reached(Reach()) as config:
            assert config.url == f"unix://{tmp_path}/esper-0/redis.sock"
        stack.enter_context(states[1].runner_lock())
        with pytest.raises(BackendError, match="choose one with --state"), reached(Reach()):
            pass
        with reached(Reach(state=states[1].root)) as config:
            assert config.url == f"unix://{tmp_path}/esper-1/redis.sock"


# On a cluster


def fake_pod(*, tls=True):
    def volume(name, secret):
        return types.SimpleNamespace(name=name, secret=secret and types.SimpleNamespace(secret_name=secret))

    volumes = [volume("config", None), volume("auth", "esper-valkey"), *([volume("tls", "esper-tls")] if tls else [])]
    return types.SimpleNamespace(
        metadata=types.SimpleNamespace(name="esper-valkey-0", namespace="esper-system"),
        spec=types.SimpleNamespace(volumes=volumes),
        status=types.SimpleNamespace(phase="Running"),
    )


class FakeBackend:
    def __init__(self, pods):
        self.core = types.SimpleNamespace(
            list_namespaced_pod=lambda namespace, label_selector: types.SimpleNamespace(items=pods),
            read_namespaced_secret=lambda name, namespace: types.SimpleNamespace(
                data={"password": "c2VjcmV0", "ca.crt": "UEVN"} if name == "esper-tls" else {"password": "c2VjcmV0"}
            ),
        )

    def call(self, method, *, what="", **arguments):
        return method(**arguments)


@pytest.mark.parametrize("tls", [True, False])
def test_a_cluster_s_valkey_is_reached_as_the_operator(monkeypatch, tls):
    from esper_runtime.cli.cluster_backend import ClusterBackend

    monkeypatch.setattr(ClusterBackend, "connect", lambda **_: FakeBackend([fake_pod(tls=tls)]))
    with reached(Reach(local=False)) as config:
        assert config.url.startswith("rediss://localhost:" if tls else "redis://localhost:")
        assert (config.username, config.password, config.ca) == ("operator", "secret", "PEM" if tls else "")


def test_a_cluster_without_our_valkey_is_one_message(monkeypatch):
    from esper_runtime.cli.cluster_backend import ClusterBackend

    monkeypatch.setattr(ClusterBackend, "connect", lambda **_: FakeBackend([]))
    with (
        pytest.raises(BackendError, match="no Valkey of Esper runs in namespace esper-system"),
        reached(Reach(local=False)),
    ):
        pass


def test_a_forwarded_port_carries_bytes_both_ways_and_ends_with_its_context():
    with socket.create_server(("127.0.0.1", 0)) as echo:

        def serve():
            while True:
                try:
                    peer, _ = echo.accept()
                except OSError:
                    return
                with peer:
                    while chunk := peer.recv(1024):
                        peer.sendall(chunk.upper())

        threading.Thread(target=serve, daemon=True).start()
        with forwarded(lambda: socket.create_connection(echo.getsockname())) as port:
            for word in (b"one", b"two"):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as near:
                    near.sendall(word)
                    assert near.recv(1024) == word.upper()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
        echo.shutdown(socket.SHUT_RDWR)


def test_a_far_end_that_refuses_ends_the_connection():
    def refuse():
        raise BackendError("no")

    with forwarded(refuse) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as near:
        assert near.recv(1) == b""
    assert buslink.PORT == 6379
