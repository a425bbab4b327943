"""Acts on commands of Tamiyo that Kasmina has verified. What Tolaria cannot do is refused, counted and said."""

import time
from collections import deque

from esper_leyline.labels import TAMIYO
from esper_leyline.reasons import RunReason
from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandType

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.rollback import Rollbacks, Trouble
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

REMEMBERED = 256


class Commands:
    """Each command id counts once."""

    def __init__(self, *, rollbacks: Rollbacks, facts: Facts, events: Events) -> None:
        self._rollbacks = rollbacks
        self._facts = facts
        self._events = events
        self._seen: deque[str] = deque(maxlen=REMEMBERED)
        self._conservative = False

    def obey(self, command: AdaptationCommand, state: TrainState) -> Outcome | None:
        """An Outcome when training has to end."""
        if command.command_id in self._seen:
            return None
        self._seen.append(command.command_id)
        self._mode(command)
        match command.command_type:
            case CommandType.COMMAND_TYPE_NO_OPERATION:
                return None
            case CommandType.COMMAND_TYPE_OPTIMIZER:
                self._optimizer(command, state)
                return None
            case CommandType.COMMAND_TYPE_ROLLBACK:
                return self._rollback(command, state)
            case other:
                self._refuse(f"{CommandType.Name(other)} is not supported")
                return None

    def _mode(self, command: AdaptationCommand) -> None:
        conservative = command.metadata.risk.conservative_mode
        if conservative != self._conservative:
            self._conservative = conservative
            message = command.rationale or ("conservative mode" if conservative else "normal mode")
            self._events.degradation(TAMIYO, degraded=conservative, reason=RunReason.CONSERVATIVE_MODE, message=message)

    def _optimizer(self, command: AdaptationCommand, state: TrainState) -> None:
        adjustment = command.optimizer_adjustment
        scale = adjustment.learning_rate_scale
        if not adjustment.HasField("learning_rate_scale") or not 0.0 < scale <= 1.0:
            self._refuse(f"learning_rate_scale is {scale:g}; it must be above 0 and at most 1")
            return
        self._rollbacks.scale_learning_rate(state, float(scale), "as Tamiyo asked")

    def _rollback(self, command: AdaptationCommand, state: TrainState) -> Outcome | None:
        now = time.monotonic_ns()
        trouble = Trouble(
            cause=RunReason.TAMIYO_REQUEST,
            message=command.rollback.reason or command.rationale,
            at_step=state.step,
            first_suspect=state.step,
            poisoned=(),
            began_ns=now,
            detected_ns=now,
        )
        return self._rollbacks.roll_back(state, trouble)

    def _refuse(self, why: str) -> None:
        self._facts.record(Kind.REJECTED_COMMAND, reason=why)
        self._events.notice(RunReason.COMMAND_REJECTED, f"command of Tamiyo refused: {why}", warning=True)
