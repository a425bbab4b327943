"""The rules that are written at the fields of messages, and the check that enforces them."""

import math
import time
import timeit
from typing import Any

import pytest
from esper_leyline import contracts
from esper_leyline.contracts import ContractError, check
from esper_leyline.v1 import (
    blueprint_pb2,
    bus_pb2,
    command_pb2,
    emergency_pb2,
    learning_pb2,
    seed_pb2,
    telemetry_pb2,
)
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.support.golden import message_types

KINDS = message_types()
FLOATS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}
UNITS = ("_ms", "_gb", "_percent", "_celsius", "_s", "_per_second", "_hz")
"""Endings of a name that say its unit."""
RUN, ID = "6f0c51aa-7d0c-4b8f-9f3e-d9d6a5c6a001", "0123456789abcdef0123456789abcdef"


def command(**changes: Any) -> command_pb2.AdaptationCommand:
    metadata = command_pb2.DecisionMetadata(training_run_id=RUN, packet_id=ID)
    fields = {"version": 1, "command_id": RUN, "command_type": command_pb2.COMMAND_TYPE_NO_OPERATION}
    return command_pb2.AdaptationCommand(**{**fields, "metadata": metadata, **changes})


def packet(seeds: int) -> telemetry_pb2.SystemStatePacket:
    """As a trainer sends it: 15 measurements, and seeds."""
    metrics = telemetry_pb2.TrainingMetrics()
    for field in telemetry_pb2.TrainingMetrics.DESCRIPTOR.fields[:15]:
        setattr(metrics, field.name, 0.5)
    seed = seed_pb2.SeedState(
        seed_id="conv1", stage=seed_pb2.SEED_LIFECYCLE_STAGE_BLENDING, alpha=0.25, gradient_norm=1.0, age_epochs=3
    )
    return telemetry_pb2.SystemStatePacket(
        version=1, current_epoch=3, global_step=300, training_run_id=RUN, packet_id=ID, training_loss=0.5,
        metrics_struct=metrics, seed_states=[seed] * seeds,
    )  # fmt: skip


def signal(**changes: Any) -> emergency_pb2.EmergencySignal:
    fields = {"version": 1, "level": 4, "run_uid": RUN, "signal_id": ID, "mode": 2, "term": 7, "seq": 1, "source": 2}
    return emergency_pb2.EmergencySignal(**{**fields, **changes})


def field_report(**changes: Any) -> learning_pb2.FieldReport:
    fields = {"version": 1, "report_id": RUN, "command_id": RUN, "training_run_id": RUN, "outcome": 1}
    return learning_pb2.FieldReport(**{**fields, **changes})


# The rules themselves


def rules() -> list[tuple[FieldDescriptor, Any]]:
    return [(field, contracts.rule_of(field)) for kind in KINDS.values() for field in kind.DESCRIPTOR.fields]


@pytest.mark.row("T30", "K16")
def test_no_message_has_a_map() -> None:
    maps = [f.full_name for f, _ in rules() if f.message_type is not None and f.message_type.GetOptions().map_entry]
    assert maps == []


def test_every_repeated_field_and_every_bytes_field_has_a_bound() -> None:
    unbounded = [field.full_name for field, rule in rules() if field.is_repeated and not rule.max_items]
    raw = [(field, rule) for field, rule in rules() if field.type == FieldDescriptor.TYPE_BYTES]
    assert unbounded + [field.full_name for field, rule in raw if not rule.max_bytes] == []


def test_every_fraction_says_its_unit() -> None:
    def ratio(rule: Any) -> bool:
        return bool(rule.HasField("max"))  # bounded by itself, like a share from 0 to 1

    silent = [
        field.full_name
        for field, rule in rules()
        if field.cpp_type in FLOATS and "FieldRule" not in field.full_name
        and not (field.name.endswith(UNITS) or rule.unit or ratio(rule))
    ]  # fmt: skip
    assert silent == []


@pytest.mark.row("T32")
def test_the_eleven_stages_and_the_six_gates_have_their_numbers() -> None:
    stages = (
        "DORMANT GERMINATED TRAINING BLENDING SHADOWING PROBATIONARY FOSSILIZED CULLED EMBARGOED RESETTING TERMINATED"
    )
    gates = "G0_SANITY G1_GRADIENT_HEALTH G2_STABILITY G3_INTERFACE G4_SYSTEM_IMPACT G5_RESET"
    for enum, prefix, words in (
        (seed_pb2.SeedLifecycleStage, "SEED_LIFECYCLE_STAGE_", stages),
        (seed_pb2.SeedLifecycleGate, "SEED_LIFECYCLE_GATE_", gates),
    ):
        expected = {f"{prefix}{word}": number for number, word in enumerate(["UNSPECIFIED", *words.split()])}
        assert dict(enum.items()) == expected


@pytest.mark.row("K17")
def test_structured_fields_have_the_numbers_of_the_design() -> None:
    places = {
        (bus_pb2.BusEnvelope, "priority"): 4,
        (telemetry_pb2.TelemetryPacket, "priority"): 50,
        (command_pb2.AdaptationCommand, "metadata"): 16,
        (command_pb2.AdaptationCommand, "seed_operation"): 10,
        (command_pb2.CommandSecurity, "signature"): 1,
        (command_pb2.CommandSecurity, "nonce"): 2,
        (command_pb2.CommandSecurity, "issued_at"): 3,
        (command_pb2.CommandSecurity, "freshness_window"): 4,
        (seed_pb2.CommandSeedOperation, "blend_alpha"): 4,
        (seed_pb2.CommandSeedOperation, "include_teacher"): 9,
        (learning_pb2.FieldReport, "delta"): 14,
        (telemetry_pb2.SystemStatePacket, "metrics_struct"): 50,
        (telemetry_pb2.SystemStatePacket, "seed_states"): 8,
    }
    assert {key: key[0].DESCRIPTOR.fields_by_name[key[1]].number for key in places} == places


# The check


@pytest.mark.parametrize("message", [command(), packet(2), signal(), field_report()], ids=lambda m: type(m).__name__)
def test_a_message_that_keeps_its_contract_passes(message: Message) -> None:
    check(message)


@pytest.mark.row("T34")
@pytest.mark.parametrize("version", [0, 2, 4294967295])
@pytest.mark.parametrize("make", [command, signal, field_report])
def test_any_other_version_is_refused(make: Any, version: int) -> None:
    with pytest.raises(ContractError, match=f"version is {version}; it must be 1") as caught:
        check(make(version=version))
    assert caught.value.wrong_version


@pytest.mark.row("T35")
@pytest.mark.parametrize(
    ("message", "field"),
    [
        (command(command_id=""), "command_id"),
        (command(metadata=command_pb2.DecisionMetadata(packet_id=ID)), "metadata.training_run_id"),
        (signal(run_uid=""), "run_uid"),
        (signal(signal_id=""), "signal_id"),
        (field_report(training_run_id=""), "training_run_id"),
        (field_report(command_id=""), "command_id"),
        (blueprint_pb2.KernelPrefetchRequest(request_id=RUN, blueprint_id="b"), "training_run_id"),
        (blueprint_pb2.KernelPrefetchRequest(request_id=RUN, training_run_id=RUN), "blueprint_id"),
        (seed_pb2.GateEvent(gate=1, from_stage=1, verdict=1), "seed_id"),
    ],
)
def test_a_missing_identity_is_named(message: Message, field: str) -> None:
    with pytest.raises(ContractError, match="is missing") as caught:
        check(message)
    assert caught.value.field == field


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(value: float) -> None:
    deep = packet(2)
    deep.seed_states[1].learning_rate = value
    with pytest.raises(ContractError, match="must be finite") as caught:
        check(deep)
    assert caught.value.field == "seed_states[1].learning_rate"


def test_a_loss_that_has_diverged_is_a_measurement() -> None:
    diverged = packet(0)
    diverged.training_loss = diverged.validation_loss = diverged.metrics_struct.loss = math.nan
    check(diverged)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (command(command_type=99), "command_type is 99, which nobody knows"),
        (command(command_type=0), "command_type is missing"),
        (command(rationale="é" * 129), "rationale has 258 bytes; at most 256"),
        (packet(101), "seed_states has 101 elements; at most 100"),
        (signal(seq=0), "seq is 0; at least 1"),
        (signal(term=1 << 32), r"term is 4294967296; at most"),
        (seed_pb2.BlendConfig(mode=3, alpha_vec=[0.5] * 65), "alpha_vec has 65 elements; at most 64"),
        (seed_pb2.BlendConfig(mode=3, alpha_vec=[0.5, 1.5]), r"alpha_vec\[1\] is 1.5; at most 1"),
        (seed_pb2.BlendConfig(mode=3, alpha=-0.1), "alpha is -0.1; at least 0"),
        (command_pb2.CommandSecurity(signature=b"s" * 65, nonce="n", key_id="k"), "signature has 65 bytes; at most 64"),
        (telemetry_pb2.TelemetryPacket(packet_id=RUN, source_subsystem="tolaria", level=1), "priority is missing"),
    ],
)
def test_what_breaks_a_rule_is_named(message: Message, problem: str) -> None:
    with pytest.raises(ContractError, match=problem):
        check(message)


def test_a_message_over_its_size_is_refused_as_a_whole() -> None:
    events = [telemetry_pb2.TelemetryEvent(name="e" * 100, level=1, description="d" * 1000)] * 20
    many = telemetry_pb2.TelemetryPacket(packet_id=RUN, source_subsystem="tolaria", level=1, priority=2, events=events)
    with pytest.raises(ContractError, match="bytes; at most 16384"):
        check(many)


# Budgets


@pytest.mark.row("T33")
@pytest.mark.parametrize("seeds", [0, 1, 2, 10, 100])
def test_a_state_packet_keeps_its_size(seeds: int) -> None:
    """280 bytes up to two seeds, 200 + 40 a seed beyond."""
    assert packet(seeds).ByteSize() <= max(280, 200 + 40 * seeds)


@pytest.mark.row("T33")
@pytest.mark.parametrize(
    "message",
    [
        command(command_type=3, optimizer_adjustment=command_pb2.CommandOptimizerAdjustment(learning_rate_scale=0.5)),
        signal(reason="the loss has left the range of numbers", origin="esper.dev/operator"),
        blueprint_pb2.KernelPrefetchRequest(request_id=RUN, blueprint_id="blueprint-17", training_run_id=RUN),
        blueprint_pb2.KernelArtifactReady(
            request_id=RUN, blueprint_id="blueprint-17", training_run_id=RUN, artifact_ref="kernels/blueprint-17",
            digest=b"d" * 32, guard_digest=b"g" * 32, prewarm_p50_ms=1.0, prewarm_p95_ms=2.0,
        ),
        seed_pb2.GateEvent(gate=2, seed_id="conv1", from_stage=2, to_stage=3, verdict=2, reason="too few steps"),
    ],
    ids=lambda message: type(message).__name__,
)  # fmt: skip
def test_a_control_message_has_at_most_280_bytes(message: Message) -> None:
    check(message)
    assert message.ByteSize() <= 280


@pytest.mark.row("T33")
@pytest.mark.parametrize(
    ("message", "serialize_us"),
    [(packet(2), 80.0), (command(), 40.0), (field_report(), 120.0)],
    ids=["packet", "command", "report"],
)
def test_serializing_and_checking_keep_their_time(message: Message, serialize_us: float) -> None:
    """Budgets of the design: 80, 40 and 120 µs to serialize, 20 µs to check (here times three). Processor time, the
    best of many, since the machine may be busy. bench_leyline judges by the budgets themselves."""

    def best_us(call: Any) -> float:
        return min(timeit.repeat(call, timer=time.thread_time, number=200, repeat=50)) / 200 * 1e6

    assert best_us(message.SerializeToString) <= serialize_us
    assert best_us(lambda: check(message)) <= 3 * 20.0
