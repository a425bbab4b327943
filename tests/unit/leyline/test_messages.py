"""The wire: what an earlier release wrote still means the same; numbers that the digests fix are what they are."""

import json
from typing import Any

import pytest
from esper_leyline.v1 import bus_pb2, command_pb2, common_pb2, emergency_pb2, report_pb2, telemetry_pb2
from google.protobuf.json_format import MessageToDict, ParseDict

from tests.support.golden import GOLDEN, message_types

TYPES = message_types()
ENTRIES: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())


def test_every_message_has_golden_bytes() -> None:
    assert set(TYPES) == set(ENTRIES), "run tests/golden/add_messages.py; a message is never taken away"


@pytest.mark.row("T30")
@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_golden_bytes_keep_their_meaning(name: str) -> None:
    message = TYPES[name].FromString(bytes.fromhex(ENTRIES[name]["hex"]))
    assert MessageToDict(message, preserving_proto_field_name=True) == ENTRIES[name]["fields"]


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_the_meaning_gives_the_golden_bytes(name: str) -> None:
    message = ParseDict(ENTRIES[name]["fields"], TYPES[name]())
    assert message.SerializeToString(deterministic=True).hex() == ENTRIES[name]["hex"]


@pytest.mark.parametrize(
    ("enum", "numbers"),
    [
        (
            command_pb2.CommandType,
            "UNSPECIFIED SEED ROLLBACK OPTIMIZER CIRCUIT_BREAKER PAUSE EMERGENCY STRUCTURAL_PRUNING NO_OPERATION",
        ),
        (common_pb2.MessagePriority, "UNSPECIFIED LOW NORMAL HIGH CRITICAL"),
        (common_pb2.HealthStatus, "UNSPECIFIED HEALTHY DEGRADED UNHEALTHY CRITICAL"),
        (common_pb2.CircuitBreakerState, "UNSPECIFIED CLOSED OPEN HALF_OPEN"),
        (telemetry_pb2.TelemetryLevel, "UNSPECIFIED INFO WARNING ERROR CRITICAL"),
        (emergency_pb2.EmergencyLevel, "UNSPECIFIED NOTICE ELEVATED CONSERVATIVE HALT"),
        (emergency_pb2.EmergencyMode, "UNSPECIFIED FREEZE CHECKPOINT KILL"),
        (emergency_pb2.AckStage, "UNSPECIFIED SEEN DONE"),
    ],
)
def test_values_of_an_enumeration_are_wire_fixed(enum: Any, numbers: str) -> None:
    for number, word in enumerate(numbers.split()):
        assert enum.Name(number).endswith(f"_{word}")
    assert len(enum.keys()) == len(numbers.split())


def test_bus_message_types_are_wire_fixed() -> None:
    kinds = bus_pb2.BusEnvelope.DESCRIPTOR.fields_by_name["message_type"].enum_type.values_by_name
    fixed = {"SYSTEM_STATE": 1, "ADAPTATION_COMMAND": 2, "TELEMETRY": 4, "EMERGENCY_SIGNAL": 10, "RUN_REPORT": 11, "EMERGENCY_ACK": 12, "BENCHMARK_REPORT": 22}  # fmt: skip # noqa: E501
    assert {name: kinds[f"BUS_MESSAGE_TYPE_{name}"].number for name in fixed} == fixed


def test_unknown_is_not_zero() -> None:
    """An absent measurement stays absent over the wire, and a measured zero stays a zero."""
    packet = telemetry_pb2.SystemStatePacket(training_loss=0.0)
    again = telemetry_pb2.SystemStatePacket.FromString(packet.SerializeToString())
    assert again.HasField("training_loss")
    assert not again.HasField("validation_loss")


@pytest.mark.parametrize("name", sorted(TYPES))
def test_a_newer_senders_fields_are_passed_over(name: str) -> None:
    unknown = bytes.fromhex("f8ffffff0f01")  # field 536870911, varint 1
    message = TYPES[name].FromString(bytes.fromhex(ENTRIES[name]["hex"]) + unknown)
    assert MessageToDict(message, preserving_proto_field_name=True) == ENTRIES[name]["fields"]


def test_the_largest_report_of_the_contract_fits_an_envelope() -> None:
    metrics = [report_pb2.NamedMetric(name="m" * 64, value=1.0)] * 32
    report = report_pb2.RunReport(
        progress=report_pb2.Progress(metrics=metrics),
        checkpoint=report_pb2.CheckpointState(last_error="x" * 2048, corrupt_files=["x" * 512] * 8),
        failure=report_pb2.Failure(message="x" * 2048),
    )
    assert report.ByteSize() < 16 * 1024
