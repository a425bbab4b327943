"""Events of runs reach an OpenTelemetry receiver: a real Redis with the user that the export has, a real HTTP server
that reads the protobuf, and the export as a process."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import redis
from esper_leyline.oona import DEAD_LETTERS, EMERGENCY, TELEMETRY, acl
from esper_leyline.oona.streams import FIELD
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1.bus_pb2 import BusEnvelope, DeadLetter, DeadLetterReason
from esper_leyline.v1.common_pb2 import BUS_MESSAGE_TYPE_TELEMETRY, MessagePriority
from esper_leyline.v1.telemetry_pb2 import TelemetryEvent, TelemetryLevel, TelemetryPacket
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from prometheus_client.parser import text_string_to_metric_families

from tests.support.prometheus import free_port
from tests.support.redis_server import RedisServer
from tests.support.waiting import until_sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
RUN = "3b1e9a52-6f0c-4c7f-9a51-0d1f1b5c8e11"
KEY = SigningKey.derive(bytes(range(32)), RUN, Role.REPORT)
INCIDENT = "ab" * 16


class Receiver:
    """A collector as far as logs go. `refuses` and `away` choose its answers."""

    def __init__(self) -> None:
        self.records: list[LogRecord] = []
        self.runs: set[str] = set()
        self.headers: dict[str, str] = {}
        self.away = False
        self.refuses: Callable[[LogRecord], bool] = lambda record: False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1/logs"

    def names(self) -> list[str]:
        return [record.event_name for record in self.records]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _take(self, body: bytes) -> int:
        if self.away:
            return 503
        asked = ExportLogsServiceRequest.FromString(body)
        found = [r for one in asked.resource_logs for scope in one.scope_logs for r in scope.log_records]
        if any(map(self.refuses, found)):
            return 400
        self.records += found
        for one in asked.resource_logs:
            self.runs |= {a.value.string_value for a in one.resource.attributes if a.key == "esper.run.uid"}
        return 200

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.headers = dict(self.headers)
                status = receiver._take(self.rfile.read(int(self.headers["Content-Length"])))
                body = ExportLogsServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        return Handler


def packet(name: str, *, priority: str = "NORMAL", level: str = "INFO") -> BusEnvelope:
    made = TelemetryPacket(
        packet_id=f"1.0.{name}",
        source_subsystem="tolaria",
        level=f"TELEMETRY_LEVEL_{level}",
        events=[
            TelemetryEvent(event_id=name, name=name, level=f"TELEMETRY_LEVEL_{level}", description=f"about {name}")
        ],
        priority=f"MESSAGE_PRIORITY_{priority}",
    )
    made.timestamp.GetCurrentTime()
    return seal(
        made.SerializeToString(),
        BUS_MESSAGE_TYPE_TELEMETRY,
        run_uid=RUN,
        key=KEY,
        priority=MessagePriority.Value(f"MESSAGE_PRIORITY_{priority}"),
        correlation_id=INCIDENT,
    )


class Bench:
    def __init__(self, directory: Path, server: RedisServer, receiver: Receiver) -> None:
        self.receiver = receiver
        self.admin = redis.Redis(port=server.port)
        self.admin.execute_command("ACL SETUSER", *acl.setuser(acl.NISSA, "secret", acl.nissa_rules()))
        (directory / "password").write_text("secret")
        (directory / "headers").write_text("Authorization: Bearer token\n")
        self.port = free_port()
        self.words = [
            *(sys.executable, "-m", "esper_runtime.otlp", "--otlp", receiver.url, "--bus", server.url),
            *("--username", acl.NISSA, "--password-file", str(directory / "password")),
            *("--headers-file", str(directory / "headers"), "--port", str(self.port), "--name", "export-0"),
        ]
        self.log = directory / "log"
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.words, stderr=log)
        return self.process

    def publish(self, *envelopes: BusEnvelope, stream: str = TELEMETRY.name) -> None:
        for envelope in envelopes:
            self.admin.xadd(stream, {FIELD: envelope.SerializeToString()})

    def until(self, check: Callable[[], Any], what: str) -> Any:
        def look() -> Any:
            assert self.process.poll() is None, self.log.read_text()
            return check()

        return until_sync(look, what=what)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples; 0 while the process does not serve yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        except urllib.error.URLError:
            return 0.0
        samples = (s for family in families for s in family.samples if s.name == name)
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def pending(self) -> int:
        """Of telemetry; 0 while there is no group yet."""
        try:
            return int(self.admin.xpending(TELEMETRY.name, acl.NISSA)["pending"])
        except redis.ResponseError:
            return 0

    def letters(self) -> list[DeadLetter]:
        return [DeadLetter.FromString(fields[FIELD]) for _, fields in self.admin.xrange(DEAD_LETTERS.name)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.admin.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    receiver = Receiver()
    with RedisServer() as server:
        made = Bench(tmp_path, server, receiver)
        yield made
        made.close()
    receiver.close()


def test_events_arrive_as_logs_with_all_that_is_known_of_them(bench: Bench) -> None:
    bench.publish(packet("tolaria.rollback.started", priority="HIGH", level="WARNING"), stream=EMERGENCY.name)
    bench.publish(packet("tolaria.epoch.closed"))
    bench.until(lambda: len(bench.receiver.records) == 2, "both are there")
    record = next(r for r in bench.receiver.records if r.event_name == "tolaria.rollback.started")
    attributes = {a.key: a.value.string_value for a in record.attributes}
    assert attributes["esper.incident"] == INCIDENT
    assert (attributes["esper.source"], attributes["esper.priority"]) == ("tolaria", "HIGH")
    assert (record.severity_text, record.body.string_value) == ("WARNING", "about tolaria.rollback.started")
    assert abs(record.time_unix_nano / 1e9 - time.time()) < 60
    assert bench.receiver.runs == {RUN}
    assert bench.receiver.headers["Authorization"] == "Bearer token"
    counted = "esper_nissa_packets_total"
    bench.until(lambda: bench.metric("esper_nissa_events_total", outcome="exported") == 2, "they are counted")
    assert bench.metric(counted, source="tolaria", priority="HIGH") == 1
    assert bench.metric(counted) == 2


def test_what_is_published_twice_arrives_once(bench: Bench) -> None:
    once, again = packet("a"), packet("b")
    bench.publish(once, once, again)
    bench.until(lambda: set(bench.receiver.names()) == {"a", "b"} and not bench.pending(), "all is done")
    bench.until(lambda: bench.metric("esper_nissa_events_total", outcome="exported") == 2, "they are counted")
    assert Counter(bench.receiver.names()) == {"a": 1, "b": 1}


def test_a_receiver_that_is_away_is_waited_for_and_nothing_is_lost(bench: Bench) -> None:
    bench.receiver.away = True
    bench.publish(*(packet(f"e{n}") for n in range(300)))
    bench.until(lambda: bench.metric("esper_nissa_batches_total", outcome="unavailable") >= 2, "it was tried again")
    assert bench.receiver.records == []
    assert bench.letters() == []
    bench.receiver.away = False
    bench.until(lambda: set(bench.receiver.names()) == {f"e{n}" for n in range(300)}, "all have arrived")
    said = bench.log.read_text()
    assert (said.count("events wait in Redis"), said.count("the receiver takes events again")) == (1, 1)


def test_what_the_receiver_refuses_is_a_dead_letter_and_holds_up_nothing(bench: Bench) -> None:
    bench.receiver.refuses = lambda record: record.event_name == "bad"
    bench.publish(*(packet(f"e{n}") for n in range(20)), packet("bad"), *(packet(f"f{n}") for n in range(20)))
    bench.admin.xadd(TELEMETRY.name, {FIELD: b"no envelope"})
    bench.until(lambda: len(bench.letters()) == 2, "both are given up")
    bench.until(lambda: len(set(bench.receiver.names())) == 40, "all others have arrived")
    reasons = {letter.reason for letter in bench.letters()}
    assert reasons == {
        DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED, DeadLetterReason.DEAD_LETTER_REASON_UNDECODABLE,
    }  # fmt: skip
    assert any("400" in letter.detail for letter in bench.letters())
    assert "the receiver answers 400" in bench.log.read_text()


def test_a_process_that_is_killed_loses_nothing(bench: Bench) -> None:
    bench.receiver.away = True
    bench.publish(*(packet(f"e{n}") for n in range(50)))
    bench.until(bench.pending, "some are in hand")
    bench.process.kill()
    bench.process.wait()
    bench.receiver.away = False
    bench.start()
    bench.until(lambda: set(bench.receiver.names()) == {f"e{n}" for n in range(50)}, "all have arrived")


def test_it_ends_cleanly_when_it_is_asked_to(bench: Bench) -> None:
    bench.publish(packet("a"))
    bench.until(bench.receiver.names, "it works")
    bench.process.terminate()
    assert bench.process.wait(20) == 0


def test_levels_have_their_severity() -> None:
    from esper_runtime.otlp.message import _SEVERITIES

    assert set(_SEVERITIES) == set(TelemetryLevel.values()) - {TelemetryLevel.TELEMETRY_LEVEL_UNSPECIFIED}
