"""`esper bus` against a real server, as the operator's user."""

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import redis
import yaml
from esper_leyline.oona import DEAD_LETTERS, EMERGENCY, NORMAL, TELEMETRY, Oona, OonaConfig, Stream, acl
from esper_leyline.oona.client import Entry
from esper_leyline.oona.deadletter import letter
from esper_leyline.oona.streams import FIELD
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1 import common_pb2 as pb
from esper_leyline.v1.bus_pb2 import DeadLetterReason
from esper_runtime.cli.main import app, guarded

from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.timeout(120)
KEY = SigningKey.derive(b"s" * 32, "uid", Role.REPORT)
INVALID, FAILED = (DeadLetterReason.DEAD_LETTER_REASON_INVALID, DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED)


def message(uid="uid", kind=pb.BUS_MESSAGE_TYPE_FIELD_REPORT):
    return seal(b"", kind, run_uid=uid, key=KEY)


@pytest.fixture
def server():
    with RedisServer() as running:
        with redis.Redis(port=running.port) as admin:
            admin.execute_command("ACL SETUSER", *acl.setuser(acl.OPERATOR, "secret", acl.operator_rules()))
        yield running


@pytest.fixture
def admin(server):
    with redis.Redis(port=server.port) as client:
        yield client


@pytest.fixture
def options(server, tmp_path):
    (tmp_path / "password").write_text("secret\n")
    return ["--url", server.url, "--username", "operator", "--password-file", str(tmp_path / "password")]


@pytest.fixture
def esper(options, capsys):
    def call(*words):
        code = guarded(lambda: app(["bus", *words, *options], standalone_mode=False))
        return code, *capsys.readouterr()

    return call


def publish(server, stream: Stream, *envelopes):
    async def main():
        async with Oona(OonaConfig(url=server.url)) as oona:
            return [(await oona.publish(stream, envelope)).entry_id for envelope in envelopes]

    return asyncio.run(main())


def bury(admin, reason, stream=NORMAL, envelope=None):
    raw = (envelope or message()).SerializeToString()
    found = letter(Entry("1-0", raw), reason=reason, detail="why", stream=stream, group="g", consumer="c", attempts=5)
    return admin.xadd(DEAD_LETTERS.name, {FIELD: found}).decode()


def test_tail_shows_the_newest_and_only_what_is_asked_for(server, esper, tmp_path):
    ids = publish(server, TELEMETRY, *(message(uid) for uid in ("a", "uid", "uid", "b")))
    code, out, _ = esper("tail", "telemetry", "--no-follow", "--last", "3", "-o", "name")
    assert (code, out.split()) == (0, ids[1:])
    (tmp_path / "report.pub").write_text(KEY.public_text())
    words = ("tail", "telemetry", "--no-follow", "--run", "uid", "-o", "json", "--public-key", f"{tmp_path}/report.pub")
    rows = [json.loads(line) for line in esper(*words)[1].splitlines()]
    assert [(row["id"], row["signature"]) for row in rows] == [(ids[1], "valid"), (ids[2], "valid")]
    assert esper("tail", "telemetry", "--no-follow")[1].splitlines()[0].split() == [
        "ID", "AGE", "TYPE", "PRIORITY", "RUN",
    ]  # fmt: skip


def test_tail_follows_until_it_is_interrupted(server, options):
    publish(server, EMERGENCY, message())
    command = [sys.executable, "-m", "esper_runtime.cli.main", "bus", "tail", "emergency", "-o", "name", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as it:
        assert it.stdout is not None
        assert it.stdout.readline()
        (newest,) = publish(server, EMERGENCY, message())
        assert it.stdout.readline().strip() == newest
        it.send_signal(2)
        assert it.wait(30) == 130


def test_peek_shows_streams_and_their_groups_and_changes_nothing(server, admin, esper):
    publish(server, NORMAL, *(message() for _ in range(3)))
    admin.xgroup_create(NORMAL.name, "g", "0")
    admin.xreadgroup("g", "c", {NORMAL.name: ">"}, count=1)
    before = admin.xinfo_groups(NORMAL.name)
    code, out, _ = esper("peek", "-o", "json")
    rows = {row["stream"]: row for row in json.loads(out)}
    assert code == 0
    assert rows[TELEMETRY.name] == {"stream": TELEMETRY.name, "length": 0, "groups": []}
    (group,) = rows[NORMAL.name]["groups"]
    assert (group["name"], group["pending"], group["lag"]) == ("g", 1, 2)
    code, out, _ = esper("peek", "normal")
    assert code == 0
    assert [block.split()[0] for block in out.split("\n\n")] == ["STREAM", "GROUP", "ID"]
    one = yaml.safe_load(esper("peek", "normal", "-o", "yaml", "--count", "2")[1])
    assert (one["length"], len(one["messages"])) == (3, 2)
    assert admin.xinfo_groups(NORMAL.name) == before
    assert "oona.kernels.ready" in esper("peek")[1]


def test_dead_letters_are_listed_shown_and_sent_back(server, admin, esper):
    invalid, failed = bury(admin, INVALID), bury(admin, FAILED)
    assert esper("dead-letter", "-o", "name")[1].split() == [invalid, failed]
    assert esper("dead-letter", "--reason", "handler-failed", "-o", "name")[1].split() == [failed]
    shown = yaml.safe_load(esper("dead-letter", invalid)[1])
    assert (shown["reason"], shown["detail"], shown["message"]["runUid"]) == ("INVALID", "why", "uid")
    code, out, _ = esper("replay", "--all", "--reason", "INVALID", "--yes")
    assert code == 0
    old, new = out.split()
    assert old == invalid
    assert admin.xrange(NORMAL.name)[0][0].decode() == new
    assert esper("dead-letter", "-o", "name")[1].split() == [failed]
    assert esper("replay", failed, "--yes")[0] == 0
    code, out, err = esper("dead-letter")
    assert (code, out, err) == (0, "", "no dead letters\n")


def test_one_letter_that_cannot_go_back_does_not_hold_up_the_others(admin, esper):
    foreign, good = bury(admin, FAILED, stream=Stream(name="foreign", max_length=1)), bury(admin, FAILED)
    code, out, err = esper("replay", "--all", "--yes")
    assert code == 1
    assert out.split()[0] == good
    assert f"dead letter {foreign} is from 'foreign'" in err
    assert esper("dead-letter", "-o", "name")[1].split() == [foreign]


def test_nothing_is_sent_back_without_a_yes(admin, esper, monkeypatch):
    bury(admin, FAILED)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    code, _, err = esper("replay", "--all")
    assert (code, "nobody can be asked" in err, "-y" in err) == (1, True, True)
    assert admin.xlen(DEAD_LETTERS.name) == 1
    assert not admin.exists(NORMAL.name)


def test_what_the_user_may_not_do_is_one_message(server, esper, tmp_path):
    with redis.Redis(port=server.port) as admin:
        admin.execute_command("ACL SETUSER", *acl.setuser("operator", "secret", acl.run_rules("uid")))
    code, out, err = esper("peek")
    assert (code, out) == (1, "")
    assert "permission" in err
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "password").write_text("wrong")
    code, _, err = esper("peek")
    assert code == 1
    assert "Redis: " in err


def test_an_unknown_letter_is_named(esper):
    code, _, err = esper("dead-letter", "1-1")
    assert code == 1
    assert "no dead letter 1-1" in err
