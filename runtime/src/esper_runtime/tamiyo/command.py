"""Between the wire and the rules: facts out of a SystemStatePacket, an AdaptationCommand out of a decision."""

from typing import Final

from esper_leyline import contracts
from esper_leyline.v1.command_pb2 import (
    AdaptationCommand,
    CommandOptimizerAdjustment,
    CommandType,
    DecisionMetadata,
    PolicyMetadata,
    RiskMetadata,
    RollbackRequest,
)
from esper_leyline.v1.common_pb2 import RollbackTier
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket

from esper_runtime.tamiyo.policy import POLICY_VERSION, Action, Decision, Facts

MAX_RATIONALE_BYTES: Final = 256

COMMAND_TYPES: Final = {
    Action.NO_OPERATION: CommandType.COMMAND_TYPE_NO_OPERATION,
    Action.SCALE_LEARNING_RATE: CommandType.COMMAND_TYPE_OPTIMIZER,
    Action.ROLLBACK: CommandType.COMMAND_TYPE_ROLLBACK,
}


def facts_of(packet: SystemStatePacket) -> Facts:
    """Validation loss where there is one, else the error rate that a validation accuracy leaves."""
    loss = packet.training_loss if packet.HasField("training_loss") else None
    if packet.HasField("validation_loss"):
        return Facts(step=packet.global_step, training_loss=loss, validation=packet.validation_loss)
    if packet.HasField("validation_accuracy"):
        error = 1.0 - packet.validation_accuracy
        return Facts(step=packet.global_step, training_loss=loss, validation=error, metric="validation error rate")
    return Facts(step=packet.global_step, training_loss=loss)


def command_of(decision: Decision, packet: SystemStatePacket, *, command_id: str) -> AdaptationCommand:
    """The command for `packet`, which it echoes. Issued now by the wall clock, which is for people only."""
    command = AdaptationCommand(
        version=contracts.VERSION,
        command_id=command_id,
        command_type=COMMAND_TYPES[decision.action],
        issued_by="tamiyo",
        rationale=_cut(decision.rationale),
        metadata=DecisionMetadata(
            policy=PolicyMetadata(policy_version=POLICY_VERSION),
            risk=RiskMetadata(reason=decision.risk, conservative_mode=decision.conservative),
            training_run_id=packet.training_run_id,
            packet_id=packet.packet_id,
        ),
    )
    command.issued_at.GetCurrentTime()
    if decision.action is Action.SCALE_LEARNING_RATE:
        adjustment = CommandOptimizerAdjustment(learning_rate_scale=decision.learning_rate_scale)
        command.optimizer_adjustment.CopyFrom(adjustment)
    elif decision.action is Action.ROLLBACK:
        request = RollbackRequest(tier=RollbackTier.ROLLBACK_TIER_FAST, reason=_cut(decision.rationale))
        command.rollback.CopyFrom(request)
    return command


def _cut(text: str) -> str:
    return text.encode()[:MAX_RATIONALE_BYTES].decode(errors="ignore")
