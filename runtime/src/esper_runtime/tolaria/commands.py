"""Acts on commands of Tamiyo that Kasmina has verified. What Tolaria cannot or may not do is refused, counted and said.

A command either has its effect at the boundary or is refused with its reason. One that changes the model or the
optimizer is applied on the training thread and never abandoned half-way: when it raises or takes too long, the state
of before is put back, bit for bit.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from esper_leyline.labels import TAMIYO
from esper_leyline.reasons import RunReason
from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandType
from esper_leyline.v1.common_pb2 import RollbackTier
from torch import Tensor

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.levels import LevelError
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.optimizers import OptimizerRebuildError
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.rollback import Rollbacks, Trouble
from esper_runtime.tolaria.stability import Part, Standing
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

REMEMBERED: Final = 256
MAX_RATIONALE: Final = 256
HARD_APPLY_S: Final = 2.0
log = logging.getLogger(__name__)

Rebuild = Callable[[TrainState, str], None]
"""Rebuilds the optimizer under an id. Refused or OptimizerRebuildError: it is as before. Any other error: it has to be
put back."""


class Refused(Exception):
    """Why a command is not obeyed, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Obeyed:
    """What a command asks for beyond what has been done."""

    afterwards: Callable[[], Outcome | None] | None = None
    """Done when the boundary is over, and timed by itself: a rollback, a refusal for the run's log. An Outcome when
    training has to end."""
    failure: str = ""
    """Kind of failure, when the command was begun and had to be undone."""


NOTHING: Final = Obeyed()


class Commands:
    """Each command id counts once. `step_of_epoch` gives the step of a checkpoint from an epoch's end."""

    def __init__(
        self,
        *,
        rollbacks: Rollbacks,
        facts: Facts,
        events: Events,
        metrics: Metrics,
        standing: Standing,
        step_of_epoch: Callable[[int], int | None],
        rebuild: Rebuild | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rollbacks = rollbacks
        self._facts = facts
        self._events = events
        self._metrics = metrics
        self._standing = standing
        self._step_of_epoch = step_of_epoch
        self._rebuild = rebuild
        self._monotonic = monotonic
        self._seen: deque[str] = deque(maxlen=REMEMBERED)
        self._conservative = False

    def obey(self, command: AdaptationCommand, state: TrainState) -> Obeyed:
        """Its effect, or what is left to do of it."""
        if command.command_id in self._seen:
            self._count(command, "duplicate")
            return NOTHING
        self._seen.append(command.command_id)
        self._mode(command)
        try:
            obeyed = self._act(command, state)
        except Refused as refusal:
            why = str(refusal)
            return Obeyed(afterwards=lambda: self._refuse(command, why))
        if command.command_type != CommandType.COMMAND_TYPE_NO_OPERATION and obeyed.afterwards is None:
            self._applied(command)
        return obeyed

    def _act(self, command: AdaptationCommand, state: TrainState) -> Obeyed:
        match command.command_type:
            case CommandType.COMMAND_TYPE_NO_OPERATION:
                return NOTHING
            case CommandType.COMMAND_TYPE_OPTIMIZER:
                return self._optimizer(command, state)
            case CommandType.COMMAND_TYPE_ROLLBACK:
                return Obeyed(afterwards=lambda: self._rollback(command, state))
            case CommandType.COMMAND_TYPE_CIRCUIT_BREAKER:
                self._breaker(command)
                return NOTHING
            case CommandType.COMMAND_TYPE_EMERGENCY:
                self._emergency(command)
                return NOTHING
            case CommandType.COMMAND_TYPE_PAUSE:
                raise Refused(
                    "a paused run asks Tamiyo no more, so Tamiyo could not let it go on; spec.emergencyStop: Freeze "
                    "pauses a run, and there is no seed to pause"
                )
            case _:
                raise Refused(f"{_kind(command)} is not supported")

    def _mode(self, command: AdaptationCommand) -> None:
        conservative = command.metadata.risk.conservative_mode
        if conservative != self._conservative:
            self._conservative = conservative
            message = command.rationale or ("conservative mode" if conservative else "normal mode")
            self._events.degradation(TAMIYO, degraded=conservative, reason=RunReason.CONSERVATIVE_MODE, message=message)
            self._standing.advised(conservative=conservative, message=f"{TAMIYO}: {message[:MAX_RATIONALE]}")

    # Learning rate and optimizer

    def _optimizer(self, command: AdaptationCommand, state: TrainState) -> Obeyed:
        adjustment = command.optimizer_adjustment
        scales, rebuilds = adjustment.HasField("learning_rate_scale"), adjustment.optimizer_id
        scale = adjustment.learning_rate_scale
        if not scales and not rebuilds:
            raise Refused("it names neither a learning_rate_scale nor an optimizer_id")
        if scales and not 0.0 < scale <= 1.0:
            raise Refused(f"learning_rate_scale is {scale:g}; it must be above 0 and at most 1")
        if rebuilds:
            undone = self._rebuild_optimizer(rebuilds, state)
            if undone.failure:
                return undone
        if scales:
            self._rollbacks.scale_learning_rate(state, float(scale), "as Tamiyo asked")
        return NOTHING

    def _rebuild_optimizer(self, optimizer_id: str, state: TrainState) -> Obeyed:
        shown = optimizer_id[:MAX_RATIONALE]
        if self._rebuild is None:
            raise Refused(f"this trainer cannot rebuild its optimizer as {shown!r}")
        if self._standing.conservative:
            self._metrics.add("tolaria.opt.rebuild_skipped_total")
            why = "; ".join(self._standing.why_conservative.values())
            raise Refused(f"no optimizer is rebuilt in conservative mode: {why}")
        if not self._standing.allows(Part.OPTIMIZER_REBUILD):
            self._metrics.add("tolaria.opt.rebuild_skipped_total")
            raise Refused("the breaker optimizer_rebuild is open")
        rebuild = self._rebuild
        try:
            undone = self._undoable(state, lambda: rebuild(state, optimizer_id))
        except Refused:
            self._standing.give_back(Part.OPTIMIZER_REBUILD)
            raise
        except OptimizerRebuildError as error:  # nothing to undo: the old optimizer is in place
            self._standing.failed(Part.OPTIMIZER_REBUILD, str(error)[:MAX_RATIONALE])
            raise Refused(str(error)[:MAX_RATIONALE]) from error
        if not undone.failure:
            self._standing.succeeded(Part.OPTIMIZER_REBUILD)
        return undone

    def _undoable(self, state: TrainState, change: Callable[[], None]) -> Obeyed:
        """Applies a change to the model or optimizer; undoes it when it raises or takes more than HARD_APPLY_S."""
        before = _Before(state)
        began = self._monotonic()
        try:
            change()
        except (Refused, OptimizerRebuildError):
            raise
        except Exception as error:  # broad: an optimizer of the user's may raise anything; it is undone and told
            log.exception("a command could not be applied")
            return self._undo(before, "apply_error", f"{type(error).__name__}: {error}"[:MAX_RATIONALE])
        took_s = self._monotonic() - began
        if took_s > HARD_APPLY_S:
            return self._undo(before, "apply_overrun", f"it took {took_s:.1f} s; at most {HARD_APPLY_S:g}")
        return NOTHING

    def _undo(self, before: "_Before", failure: str, why: str) -> Obeyed:
        def put_back() -> Outcome | None:
            before.put_back()
            self._events.notice(RunReason.BOUNDARY_FAILED, f"a command was undone: {why}", warning=True)
            return None

        self._standing.failed(Part.OPTIMIZER_REBUILD, why)
        return Obeyed(afterwards=put_back, failure=failure)

    # Rollback

    def _rollback(self, command: AdaptationCommand, state: TrainState) -> Outcome | None:
        request = command.rollback
        first_suspect = state.step
        if request.HasField("target_epoch"):
            target = self._step_of_epoch(request.target_epoch)
            if target is None or target >= state.step:
                self._refuse(command, f"there is no checkpoint to go back to from epoch {request.target_epoch}")
                return None
            first_suspect = target + 1
        now = time.monotonic_ns()
        trouble = Trouble(
            cause=RunReason.TAMIYO_REQUEST,
            message=(request.reason or command.rationale)[:MAX_RATIONALE],
            at_step=state.step,
            first_suspect=first_suspect,
            poisoned=(),
            began_ns=now,
            detected_ns=now,
        )
        full = request.tier == RollbackTier.ROLLBACK_TIER_FULL or request.HasField("target_epoch")
        outcome = self._full_tier(state, trouble) if full else self._rollbacks.roll_back(state, trouble)
        if outcome is None:
            self._applied(command)
        return outcome

    def _full_tier(self, state: TrainState, trouble: Trouble) -> Outcome | None:
        """From the checkpoint volume, whatever memory holds."""
        configured = self._rollbacks.config
        if configured.target == "BeforeAnomaly":
            self._rollbacks.config = replace(configured, target="LatestVerified")
        try:
            return self._rollbacks.roll_back(state, trouble)
        finally:
            self._rollbacks.config = configured

    # Breakers and levels

    def _breaker(self, command: AdaptationCommand) -> None:
        order = command.circuit_breaker
        if order.name not in set(Part):
            raise Refused(f"there is no breaker {order.name[:64]!r}; there are {', '.join(Part)}")
        why = (order.rationale or command.rationale)[:MAX_RATIONALE] or "no reason was given"
        try:
            self._standing.force(Part(order.name), order.desired_state, f"forced by Tamiyo: {why}")
        except ValueError as error:
            raise Refused(str(error)) from error

    def _emergency(self, command: AdaptationCommand) -> None:
        order = command.emergency
        try:
            self._standing.order_level(order.level, order.reason)
        except LevelError as error:
            raise Refused(str(error)) from error

    # Telling

    def _applied(self, command: AdaptationCommand) -> None:
        because = command.rationale[:MAX_RATIONALE] or "without a reason"
        self._events.notice(RunReason.COMMAND_APPLIED, f"command of Tamiyo applied: {_kind(command)}, {because}")
        self._count(command, "applied")

    def _refuse(self, command: AdaptationCommand, why: str) -> None:
        self._facts.record(Kind.REJECTED_COMMAND, reason=why)
        self._events.notice(RunReason.COMMAND_REJECTED, f"command of Tamiyo refused: {why}", warning=True)
        self._count(command, "refused")

    def _count(self, command: AdaptationCommand, result: str) -> None:
        self._metrics.add("tolaria.command.handled_total", type=_kind(command), result=result)


def _kind(command: AdaptationCommand) -> str:
    known = command.command_type in CommandType.values()
    return CommandType.Name(command.command_type).removeprefix("COMMAND_TYPE_") if known else "OTHER"


class _Before:
    """A copy of the state, taken before something that may have to be undone."""

    def __init__(self, state: TrainState) -> None:
        tensors, blobs, meta = state.live()
        self._state = state
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._blobs: Mapping[str, bytes] = blobs
        self._meta: Mapping[str, Any] = meta
        self._parameters = [arena.name for arena in state.update.arenas]

    def put_back(self) -> None:
        """Into the very tensors that training uses. RuntimeError when those are gone: a new process has to restore."""
        targets: dict[str, Tensor] = self._state.restore_targets()
        kept = [
            name for name, tensor in self._tensors.items() if name in targets and targets[name].shape == tensor.shape
        ]
        lost = set(self._parameters) - set(kept)
        if lost:
            raise RuntimeError(f"a command that failed cannot be undone: {', '.join(sorted(lost))[:MAX_RATIONALE]}")
        for name in kept:
            targets[name].detach().copy_(self._tensors[name])
        self._state.restore_live(self._tensors, self._blobs, self._meta)
