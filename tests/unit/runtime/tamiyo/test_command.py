"""From a state packet to facts, from a decision to a command."""

import pytest
from esper_leyline.v1.command_pb2 import CommandType, RiskReason
from esper_leyline.v1.common_pb2 import RollbackTier
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tamiyo.command import MAX_RATIONALE_BYTES, command_of, facts_of
from esper_runtime.tamiyo.policy import Action, Decision, Facts

PACKET = SystemStatePacket(version=1, training_run_id="run-1", packet_id="ab" * 16, global_step=7)


def decision(action: Action = Action.NO_OPERATION, rationale: str = "all is well", scale: float | None = None):
    return Decision(
        action=action,
        risk=RiskReason.RISK_REASON_UNSPECIFIED,
        conservative=False,
        rationale=rationale,
        learning_rate_scale=scale,
    )


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({}, Facts(step=7)),
        ({"training_loss": 0.5}, Facts(step=7, training_loss=0.5)),
        ({"training_loss": 0.0, "validation_loss": 0.0}, Facts(step=7, training_loss=0.0, validation=0.0)),
        ({"validation_accuracy": 0.75}, Facts(step=7, validation=0.25, metric="validation error rate")),
        ({"validation_loss": 2.0, "validation_accuracy": 0.75}, Facts(step=7, validation=2.0)),
    ],
)
def test_absent_is_unknown_and_zero_is_zero(fields: dict[str, float], facts: Facts) -> None:
    packet = SystemStatePacket()
    packet.CopyFrom(PACKET)
    packet.MergeFrom(SystemStatePacket(**fields))
    assert facts_of(packet) == facts


def test_a_command_echoes_its_packet_and_run() -> None:
    command = command_of(decision(), PACKET, command_id="c-1")
    assert command.version == 1
    assert command.command_id == "c-1"
    assert command.command_type == CommandType.COMMAND_TYPE_NO_OPERATION
    assert command.WhichOneof("payload") is None
    assert command.metadata.packet_id == PACKET.packet_id
    assert command.metadata.training_run_id == "run-1"
    assert command.metadata.policy.policy_version == "rules-1"
    assert command.rationale == "all is well"
    assert command.issued_by == "tamiyo"
    assert command.issued_at.seconds > 0


def test_a_scaling_and_a_rollback_carry_their_payload() -> None:
    scaling = command_of(decision(Action.SCALE_LEARNING_RATE, scale=0.5), PACKET, command_id="c")
    assert scaling.command_type == CommandType.COMMAND_TYPE_OPTIMIZER
    assert scaling.optimizer_adjustment.learning_rate_scale == 0.5
    rollback = command_of(decision(Action.ROLLBACK, "loss is nan"), PACKET, command_id="c")
    assert rollback.command_type == CommandType.COMMAND_TYPE_ROLLBACK
    assert rollback.rollback.tier == RollbackTier.ROLLBACK_TIER_FAST
    assert rollback.rollback.reason == "loss is nan"
    assert not rollback.rollback.HasField("target_epoch")


def test_a_long_rationale_is_cut_between_characters() -> None:
    command = command_of(decision(rationale="é" * 200), PACKET, command_id="c")
    assert command.rationale == "é" * (MAX_RATIONALE_BYTES // 2)
