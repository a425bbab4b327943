"""One id leads through everything that a rollback, a death of the trainer, or a halt has left behind."""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from esper_leyline.events import RunEvent
from esper_leyline.incidents import FIELD
from esper_leyline.oona.streams import EMERGENCY, TELEMETRY
from esper_leyline.reasons import RunReason
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.telemetry_pb2 import TelemetryPacket
from esper_runtime.tolaria import record

from tests.support.localruns import Laptop, paced, spec_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROLLBACK = {RunEvent.ROLLBACK_STARTED, RunEvent.ROLLBACK_COMPLETED}
DEATH = {RunEvent.TRAINER_FAILED, RunEvent.RECOVERY_COMPLETED}
HALT = {RunEvent.ACKNOWLEDGED, RunEvent.TRANSITION}


class Traces:
    """What a run has left, by incident."""

    def __init__(self, laptop: Laptop) -> None:
        self._laptop = laptop

    def in_record(self, incident: str) -> set[str]:
        (path,) = self._laptop.state.glob("checkpoints/*/record.jsonl")
        return {line["event"] for line in record.read(path) if line["fields"].get(FIELD) == incident}

    def in_events(self, incident: str) -> set[str]:
        lines = (self._laptop.state / "events.jsonl").read_text().splitlines()
        return {event["reason"] for event in map(json.loads, lines) if event.get(FIELD) == incident}

    def on_the_bus(self, incident: str) -> set[str]:
        found = (packet for envelope, packet in self._packets() if envelope.correlation_id == incident)
        return {event.name for packet in found for event in packet.events}

    def in_log(self, container: str, incident: str) -> list[str]:
        logs = (self._laptop.state / "logs").rglob(f"{container}.log")
        return [line for path in logs for line in path.read_text().splitlines() if f"[{FIELD} {incident}]" in line]

    def _packets(self) -> Iterator[tuple[BusEnvelope, TelemetryPacket]]:
        with redis.Redis.from_url(f"unix://{self._laptop.scratch()[0] / 'redis.sock'}") as client:
            for stream in (TELEMETRY, EMERGENCY):
                for _, fields in client.xrange(stream.name):
                    envelope = BusEnvelope.FromString(fields[b"e"])
                    if envelope.message_type == TELEMETRY_TYPE:
                        yield envelope, TelemetryPacket.FromString(envelope.payload)


TELEMETRY_TYPE = BusEnvelope(message_type="BUS_MESSAGE_TYPE_TELEMETRY").message_type


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Laptop, dict[str, str]]]:
    """A run that has rolled back, lost its trainer, was halted, and goes on; the ids as its status told them."""
    documents = paced()
    spec_of(documents)["faultInjection"] = [{"kind": "NonFiniteLoss", "step": 40}]
    laptop = Laptop(tmp_path_factory.mktemp("laptop"), documents)
    try:
        laptop.run("--stay")
        laptop.until(lambda: laptop.status().get("rollbacks", {}).get("total"), "a rollback")
        ids = {"rollback": _last_recovery(laptop)}
        os.kill(laptop.trainer(), signal.SIGKILL)
        laptop.until(lambda: laptop.status().get("restarts", {}).get("total"), "a restart")
        laptop.until(lambda: _last_recovery(laptop) != ids["rollback"], "a recovery")
        ids["death"] = _last_recovery(laptop)
        assert laptop.esper("halt", laptop.name, "--mode", "Freeze").returncode == 0
        laptop.until_phase("Halted")
        ids["halt"] = laptop.status()["halt"]["id"]
        laptop.until(lambda: not laptop.status()["halt"].get("missing"), "all have answered")
        assert laptop.esper("resume", laptop.name).returncode == 0
        laptop.until_step(laptop.step() + 20)
        yield laptop, ids
    finally:
        laptop.close()


def _last_recovery(laptop: Laptop) -> str:
    return str(laptop.status()["lastRecovery"]["incident"])


CASES: dict[str, dict[str, Any]] = {
    "rollback": {
        "record": ROLLBACK,
        "events": {RunReason.ROLLED_BACK},
        "logs": ("tolaria", "weatherlight"),
    },
    "death": {
        "record": DEATH,
        "events": {RunReason.TRAINER_KILLED, RunReason.RESTARTED_IN_PLACE},
        "logs": ("tolaria", "weatherlight"),
    },
    "halt": {
        "record": HALT,
        "events": {RunReason.HALT_REQUESTED, RunReason.FROZEN, RunReason.RESUMED},
        "logs": ("tolaria", "weatherlight"),
    },
}


def test_three_incidents_have_three_ids(lived) -> None:
    _, ids = lived
    assert len(set(ids.values())) == 3
    assert all(len(name) == 32 for name in ids.values())


@pytest.mark.parametrize("what", CASES)
def test_an_id_alone_finds_all_that_tells_of_it(lived, what: str) -> None:
    laptop, ids = lived
    traces, incident, case = Traces(laptop), ids[what], CASES[what]
    laptop.until(lambda: case["record"] <= traces.in_record(incident), f"the record of {what}")
    laptop.until(lambda: case["record"] - {RunEvent.TRAINER_FAILED} <= traces.on_the_bus(incident), "telemetry")
    laptop.until(lambda: case["events"] <= traces.in_events(incident), f"Events of {what}")
    for container in case["logs"]:
        assert traces.in_log(container, incident), container


@pytest.mark.parametrize("what", CASES)
def test_an_id_finds_nothing_else(lived, what: str) -> None:
    """What the other incidents alone can say does not carry it."""
    laptop, ids = lived
    traces = Traces(laptop)
    others = set().union(*(case["record"] for name, case in CASES.items() if name != what)) - CASES[what]["record"]
    assert not traces.in_record(ids[what]) & (others - {RunEvent.TRANSITION})


def test_nothing_is_said_of_an_incident_when_nothing_is_wrong(lived) -> None:
    laptop, _ = lived
    (path,) = laptop.state.glob("checkpoints/*/record.jsonl")
    lines = [line for line in record.read(path) if line["event"] in (RunEvent.EPOCH, RunEvent.STARTED)]
    assert lines
    assert not [line for line in lines if FIELD in line["fields"]]
