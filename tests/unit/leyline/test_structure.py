"""Fields where the prototype had maps: all of them survive the wire, the old ones stay away for good."""

import ast
import random
from pathlib import Path
from typing import Any

import pytest
from esper_leyline import contracts
from esper_leyline.v1 import bus_pb2, command_pb2, emergency_pb2, learning_pb2, seed_pb2, telemetry_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto
from google.protobuf.message import Message

ROOT = Path(__file__).resolve().parents[3]
TYPED = (
    command_pb2.DecisionMetadata,
    command_pb2.PolicyMetadata,
    command_pb2.RiskMetadata,
    command_pb2.CoverageSummary,
    command_pb2.CommandSecurity,
    command_pb2.CommandOptimizerAdjustment,
    seed_pb2.CommandSeedOperation,
    seed_pb2.BlendConfig,
    seed_pb2.SeedState,
    learning_pb2.FieldReportDelta,
    learning_pb2.FieldReport,
    telemetry_pb2.TrainingMetrics,
)
RESERVED = {
    command_pb2.AdaptationCommand: {13, 17, 20},
    command_pb2.CoverageSummary: {2},
    command_pb2.CommandOptimizerAdjustment: {2},
    emergency_pb2.EmergencySignal: {6, 8, 9},
    bus_pb2.BusEnvelope: {3},
    seed_pb2.CommandSeedOperation: {3},
    seed_pb2.SeedState: {6},
    learning_pb2.FieldReport: {8},
    telemetry_pb2.SystemStatePacket: {7},
}
"""Numbers that maps and other ill-typed fields once had."""


def sample(field: FieldDescriptor, dice: random.Random) -> Any:
    """A value that the field's rule allows."""
    rule = contracts.rule_of(field)
    low = rule.min if rule.HasField("min") else 0.25
    high = rule.max if rule.HasField("max") else low + 100
    if field.message_type is not None:
        return None
    if field.enum_type is not None:
        return dice.choice([value.number for value in field.enum_type.values if value.number])
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return b"bytes" if field.type == FieldDescriptor.TYPE_BYTES else f"text {dice.randrange(99)}"
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return max(low, min(high, (low + high) / 2))
    return rule.equals or int(max(1, low))


def filled(message: Message, dice: random.Random) -> Message:
    """With every field set, at every depth; of a oneof the last."""
    for field in message.DESCRIPTOR.fields:
        value = sample(field, dice)
        if field.message_type is None:
            if field.is_repeated:
                getattr(message, field.name).extend([value, value])
            else:
                setattr(message, field.name, value)
        elif field.message_type.file.package != "google.protobuf":
            inner = getattr(message, field.name)
            filled(inner.add() if field.is_repeated else inner, dice)
        else:
            getattr(message, field.name).FromJsonString(
                "3s" if "Duration" in field.message_type.name else "2026-01-02T03:04:05Z"
            )
    return message


@pytest.mark.row("T30", "K16")
@pytest.mark.parametrize("kind", TYPED, ids=lambda kind: kind.DESCRIPTOR.name)
def test_every_field_survives_the_wire_and_keeps_its_contract(kind: type[Message]) -> None:
    made = filled(kind(), random.Random(1))
    again = kind.FromString(made.SerializeToString())
    contracts.check(again)
    for field in kind.DESCRIPTOR.fields:
        assert getattr(again, field.name) == getattr(made, field.name), field.name
        assert field.is_repeated or not field.has_presence or again.HasField(field.name), field.name


@pytest.mark.row("T30", "K17")
@pytest.mark.parametrize("kind", RESERVED, ids=lambda kind: kind.DESCRIPTOR.name)
def test_numbers_of_maps_that_are_gone_are_taken_by_nothing(kind: type[Message]) -> None:
    proto = DescriptorProto()
    kind.DESCRIPTOR.CopyToProto(proto)
    reserved = {number for span in proto.reserved_range for number in range(span.start, span.end)}
    assert reserved >= RESERVED[kind]
    assert {field.number for field in kind.DESCRIPTOR.fields}.isdisjoint(reserved)


@pytest.mark.row("T30", "K16")
def test_nobody_reads_what_a_map_once_held() -> None:
    """By subscript of an attribute that was a map in the prototype's messages."""
    maps = {"annotations", "parameters", "hyperparameters", "training_metrics", "indicators", "by_group", "attributes"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for part in ("proto/src", "runtime/src")
        for path in (ROOT / part).rglob("*.py")
        if "_pb2" not in path.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr in maps
    ]
    assert found == []


@pytest.mark.row("K16")
def test_a_command_that_says_all_in_annotations_says_nothing() -> None:
    """As the prototype would send it: run, seed and blueprint in field 20, a map of strings."""
    entry = b"\x0a\x0ftraining_run_id\x12\x05run-1"
    raw = command_pb2.AdaptationCommand(version=1, command_id="c", command_type=1).SerializeToString()
    raw += b"\xa2\x01" + bytes([len(entry)]) + entry
    command = command_pb2.AdaptationCommand.FromString(raw)
    with pytest.raises(contracts.ContractError, match="metadata is missing"):
        contracts.check(command)
