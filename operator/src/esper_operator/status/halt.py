"""status.halt and the condition Halted: who asked, who answered, whether the run stands still."""

from datetime import datetime
from typing import NamedTuple

from esper_leyline.labels import KASMINA, TAMIYO, TOLARIA
from esper_leyline.phases import ConditionType, EmergencyStop, HaltSource, Phase
from esper_leyline.reasons import RunReason
from esper_leyline.v1.emergency_pb2 import AckStage, EmergencyAck
from esper_leyline.v1.report_pb2 import RuntimePhase

from esper_operator.api.v1alpha1 import Halt
from esper_operator.model import Ending, Pod, SignalRecord
from esper_operator.observe.attempt import EndKind, holds, newest_pods, pod_end, training_pods
from esper_operator.observe.halting import HaltRequest, expresses, in_force, requested
from esper_operator.status.bounds import count, milliseconds
from esper_operator.status.draft import UNREPORTED, Draft

MAX_MISSING = 32
MAX_NAME = 253
ANSWERING = (KASMINA, TAMIYO)
"""Sidecars that answer a signal beside the trainer. A halt is complete without them: they stop nothing that matters
to the state, and one that is down must not keep a person waiting; but the status names it."""
_FREEZES = (RuntimePhase.RUNTIME_PHASE_FROZEN, RuntimePhase.RUNTIME_PHASE_HALTED)
_STOPS = (RuntimePhase.RUNTIME_PHASE_HALTED,)
_ENDING = (RuntimePhase.RUNTIME_PHASE_HALTING, RuntimePhase.RUNTIME_PHASE_HALTED)


class Row(NamedTuple):
    """What a condition is to say."""

    status: str
    reason: RunReason
    message: str


def request(draft: Draft) -> None:
    """Opens the record of the halt that is asked for, or goes on with it."""
    asked = requested(draft.seen)
    if asked is None:
        return
    record = in_force(draft.old)
    signal = _on_record(draft, asked)
    sent = signal.signal_id[:63] if signal is not None else ""
    if record is not None and record.mode is asked.mode:
        draft.halt = _with_successors(draft, record.changed(id=sent or record.id, source=asked.source))
        return
    pods = tuple(pod.name for pod in _expected(draft))
    draft.halt = Halt(
        id=sent or asked.id,
        mode=asked.mode,
        source=asked.source,
        requested_time=_since(draft, signal),
        expected=len(pods),
        missing=(*pods, *(name for pod in pods for name in _sidecars_of(pod)))[:MAX_MISSING],
    )


def _with_successors(draft: Draft, record: Halt) -> Halt:
    """A pod that was replaced before it answered answers no more: its successor does."""
    alive = [pod.name for pod in _expected(draft)]
    fresh = [name for name in alive if name not in record.missing]
    for gone in [name for name in record.missing if "/" not in name and name not in alive]:
        successor = next((name for name in fresh if _place(name) == _place(gone)), None)
        if successor is not None:
            named = {gone: successor, **dict(zip(_sidecars_of(gone), _sidecars_of(successor), strict=True))}
            record = record.changed(missing=tuple(named.get(name, name) for name in record.missing))
    return record


def _place(pod_name: str) -> str:
    """Job and rank of a pod: its name without what is random."""
    return pod_name.rpartition("-")[0]


def _since(draft: Draft, signal: SignalRecord | None) -> datetime:
    """A signal may be on its way for some time before a status speaks of it."""
    sent = draft.now if signal is None or signal.time is None else milliseconds(signal.time)
    return min(sent, draft.now)


def acknowledge(draft: Draft, ack: EmergencyAck, pod_name: str) -> None:
    """Takes in what a trainer or a sidecar answered to the halt in force. An answer to a clear counts nothing."""
    if ack.clear:
        return
    if requested(draft.seen) is None:
        _note_unasked(draft, ack)
        return
    record = draft.halt
    if record is None:
        return
    if ack.participant in ANSWERING:
        if ack.signal_id == record.id:
            draft.halt = _heard(record, f"{pod_name}/{ack.participant}"[:MAX_NAME])
        return
    if ack.participant != TOLARIA:
        return
    if ack.signal_id != record.id:
        if not _stands_in(draft, record) or ack.attempt != draft.number:
            return
        record = record.changed(id=ack.signal_id[:63])
    if record.expected == 0:  # a pod that came up under the halt
        record = record.changed(expected=1, missing=(pod_name[:MAX_NAME],))
    record = _answered(draft, record, pod_name)
    if ack.HasField("saved_step"):
        record = record.changed(saved_step=count(ack.saved_step))
    draft.halt = record
    draft.halt_done = draft.halt_done or ack.stage == AckStage.ACK_STAGE_DONE


def _note_unasked(draft: Draft, ack: EmergencyAck) -> None:
    """The answer to a signal that was lifted before anybody wrote of it: its sender was killed when only Redis had it.
    Kept, since the signal that lifts it must name it."""
    known = draft.seen.signal
    if ack.participant != TOLARIA or ack.attempt != draft.number or in_force(draft.old) is not None:
        return
    if known is not None and known.signal_id == ack.signal_id:
        return  # its clear is on the way
    draft.halt = Halt(
        id=ack.signal_id[:63],
        mode=EmergencyStop.FREEZE,
        source=HaltSource.SPEC,
        requested_time=draft.now,
        expected=1,
        acknowledged=1,
    )


def _stands_in(draft: Draft, record: Halt) -> bool:
    """No signal is on record: its sender was killed when only Redis had it, and the answer tells its id."""
    asked = requested(draft.seen)
    return asked is not None and record.id == asked.id and not _on_record(draft, asked)


def _on_record(draft: Draft, asked: HaltRequest) -> SignalRecord | None:
    """The signal that asks for this halt, as the ConfigMap has it."""
    signal = draft.applied.signal or draft.seen.signal
    return signal if expresses(signal, asked, draft.number) else None


def lead_up(draft: Draft, to: Phase, time: datetime) -> None:
    """A run whose pods answered before any status spoke of the halt was halting all the same, since the request."""
    record, history = draft.halt, draft.history
    if to is not Phase.HALTED or history.phase in (Phase.HALTING, Phase.HALTED) or in_force(draft.old) is not None:
        return
    if record is None or record.requested_time is None:
        return
    since, step = min(record.requested_time, time), draft.progress.step
    history.move(Phase.HALTING, time=since, reason=RunReason.HALT_REQUESTED, attempt=draft.number, step=step)


def settle(draft: Draft) -> Row:
    """The condition Halted; completes the record when the run stands still."""
    asked = requested(draft.seen)
    row = _unasked(draft) if asked is None else _asked(draft, asked)
    if row.status == "True" and draft.halt is not None and draft.halt.completed_time is None:
        draft.halt = draft.halt.changed(completed_time=draft.now)
    return row


def _asked(draft: Draft, asked: HaltRequest) -> Row:
    _note_ended(draft)
    record = in_force(draft.old)
    kept = holds(draft.old, ConditionType.HALTED) and record is not None and record.mode is asked.mode
    stands = _FREEZES if asked.mode is EmergencyStop.FREEZE else _STOPS
    still = draft.halt_done or draft.runtime in stands or not training_pods(draft.seen)
    if kept or still:
        frozen = asked.mode is EmergencyStop.FREEZE and bool(newest_pods(draft.seen))
        return Row("True", RunReason.FROZEN if frozen else RunReason.HALTED, asked.reason)
    missing = draft.halt.missing if draft.halt else ()
    waiting = f"; waiting for {', '.join(missing)}" if missing else ""
    return Row("False", RunReason.HALT_REQUESTED, f"{asked.reason}{waiting}")


def _unasked(draft: Draft) -> Row:
    quiet = Row("False", RunReason.NOT_HALTED, "nobody asks for a stop")
    if draft.seen.run.spec.suspend:
        return quiet
    outcome = draft.plan.outcome
    if outcome is not None and outcome.ending is Ending.HALTED:
        _runtime_halt(draft, saved_step=outcome.saved_step)
        return Row("True", RunReason.HALTED, f"{draft.plan.verdict.message}; {_GO_ON}")
    was = draft.old.condition(ConditionType.HALTED)
    record = in_force(draft.old)
    pods = training_pods(draft.seen)
    if was is None:
        return quiet
    own = record is not None and record.source is HaltSource.RUNTIME
    if own and was.status == "True" and not pods:
        return Row("True", RunReason.HALTED, was.message)
    frozen = was.status == "True" and was.reason == RunReason.FROZEN
    if pods and (draft.runtime == RuntimePhase.RUNTIME_PHASE_FROZEN or (frozen and draft.runtime == UNREPORTED)):
        return Row("True", RunReason.FROZEN, "lifted; waiting for the trainer to go on")
    ending = own and was.reason == RunReason.HALT_REQUESTED and draft.runtime == UNREPORTED
    if pods and outcome is None and (draft.runtime in _ENDING or ending):
        if record is None and draft.seen.signal is None and draft.halt is draft.old.halt:
            _runtime_halt(draft, saved_step=None)
        return Row("False", RunReason.HALT_REQUESTED, "the runtime is halting")
    return quiet


_GO_ON = "to go on, set spec.emergencyStop to Checkpoint and back to None"


def _runtime_halt(draft: Draft, *, saved_step: int | None) -> None:
    record = in_force(draft.old)
    if record is None or record.source is not HaltSource.RUNTIME:
        record = Halt(
            id=f"runtime-a{draft.number}",
            mode=EmergencyStop.CHECKPOINT,
            source=HaltSource.RUNTIME,
            requested_time=draft.now,
            expected=1,
            acknowledged=1,
        )
    draft.halt = record.changed(saved_step=record.saved_step if saved_step is None else saved_step)


def _note_ended(draft: Draft) -> None:
    """A pod that ended with exit code 75 has answered, whether or not its report came through."""
    for pod in newest_pods(draft.seen):
        end = pod_end(pod)
        if draft.halt is None or end is None or end.kind is not EndKind.HALTED:
            continue
        draft.halt = _answered(draft, draft.halt, pod.name)
        for name in _sidecars_of(pod.name):  # whoever has ended acts no more
            draft.halt = _heard(draft.halt, name)
        if end.saved_step is not None and draft.halt.saved_step is None:
            draft.halt = draft.halt.changed(saved_step=end.saved_step)


def _answered(draft: Draft, record: Halt, pod_name: str) -> Halt:
    if pod_name not in record.missing:
        return record
    record = _heard(record, pod_name)
    answered = record.acknowledged + 1
    took = record.milliseconds
    if answered >= record.expected and took is None and record.requested_time is not None:
        took = count((draft.now - record.requested_time).total_seconds() * 1000)
    return record.changed(acknowledged=answered, milliseconds=took)


def _heard(record: Halt, name: str) -> Halt:
    return record.changed(missing=tuple(one for one in record.missing if one != name))


def _sidecars_of(pod_name: str) -> tuple[str, ...]:
    return tuple(f"{pod_name}/{sidecar}" for sidecar in ANSWERING)


def _expected(draft: Draft) -> tuple[Pod, ...]:
    """Pods that must answer: those of the current attempt whose trainer runs."""
    return tuple(pod for pod in training_pods(draft.seen) if pod.attempt == draft.number)
