"""Events of a transition: one per thing that happened, never per step; posted after the status write succeeded."""

from collections.abc import Iterable
from dataclasses import replace

from esper_leyline.incidents import incident_at
from esper_leyline.phases import ConditionType, Phase
from esper_leyline.reasons import RunReason

from esper_operator.api.v1alpha1 import Status
from esper_operator.model import Ending, EventRecord
from esper_operator.observe.halting import in_force
from esper_operator.status.bounds import reason
from esper_operator.status.draft import Draft
from esper_operator.status.podstate import WAITING

MAX_EVENTS = 12
MAX_PER_REASON = 3
MAX_NOTE = 1024


def announce(draft: Draft, new: Status) -> None:
    """Adds what the operator itself has to say about the change to what the reports said."""
    _outcome(draft, new)
    _job(draft, new)
    _phase(draft, new)
    _conditions(draft, new)
    _rejections(draft, new)


def _outcome(draft: Draft, new: Status) -> None:
    outcome, said = draft.plan.outcome, draft.plan.verdict
    if outcome is None:
        return
    match outcome.ending:
        case Ending.SUCCEEDED:
            draft.say(RunReason.COMPLETE, said.message, action="Finish")
        case Ending.FAILED:
            draft.say(said.reason, said.message, warning=True, action="Finish")
        case Ending.RESTART:
            incident = incident_at(draft.seen.run.uid, draft.number)
            draft.say(said.reason, said.message, warning=True, action="Restart", incident=incident)
        case Ending.HALTED:
            draft.say(RunReason.HALTED, said.message, warning=True, action="Halt", incident=_halt(draft, new))


def _job(draft: Draft, new: Status) -> None:
    if new.attempt == draft.old.attempt:
        return
    draft.say(RunReason.JOB_CREATED, f"Job {new.job_name} created for attempt {new.attempt}", action="Start")
    faults = draft.seen.run.spec.fault_injection
    if faults and draft.old.attempt == 0:
        what = ", ".join(f"{fault.kind} at step {fault.step}" for fault in faults)
        draft.say(RunReason.FAULT_INJECTED, f"spec.faultInjection is on: {what}", warning=True, action="Start")


def _phase(draft: Draft, new: Status) -> None:
    was, now = draft.old.phase, new.phase
    if was == now:
        return
    step = new.progress.step if new.progress else None
    if now is Phase.RUNNING and was in (Phase.HALTED, Phase.HALTING, Phase.SUSPENDED):
        draft.say(RunReason.RESUMED, f"training goes on at step {step}", action="Start", incident=_halt(draft, new))
    elif now is Phase.RUNNING and was not in (Phase.ROLLING_BACK, Phase.RESTARTING):
        draft.say(RunReason.TRAINING, f"training since step {step}", action="Start")
    elif now is Phase.HALTING:
        message = _message(new, ConditionType.HALTED, ConditionType.SUSPENDED)
        draft.say(RunReason.HALT_REQUESTED, message, action="Halt", incident=_halt(draft, new))
    elif now is Phase.HALTED and not draft.said({RunReason.HALTED}):
        halted = new.condition(ConditionType.HALTED)
        why = RunReason.FROZEN if halted is not None and halted.reason == RunReason.FROZEN else RunReason.HALTED
        draft.say(why, _halted(new), action="Halt", incident=_halt(draft, new))
    elif now is Phase.SUSPENDED:
        draft.say(RunReason.SUSPENDED, _message(new, ConditionType.SUSPENDED), action="Suspend")
    elif now is Phase.QUEUED:
        draft.say(RunReason.QUEUED, _message(new, ConditionType.PODS_READY), action="Start")
    elif now is Phase.RESTARTING and draft.plan.outcome is None and not any(e.warning for e in draft.events):
        draft.say(
            reason(new.reason or "", RunReason.POD_LOST), "training is interrupted", warning=True, action="Restart"
        )


def _halt(draft: Draft, new: Status) -> str:
    """The halt that is in force, or was until now."""
    halt = in_force(new) or in_force(draft.old)
    return "" if halt is None else halt.id


def _halted(new: Status) -> str:
    halt = new.halt
    if halt is None:
        return "the run stands still"
    saved = f", saved step {halt.saved_step}" if halt.saved_step is not None else ""
    return f"{halt.mode} by {halt.source}: acknowledged {halt.acknowledged}/{halt.expected}{saved}"


def _message(status: Status, *kinds: ConditionType) -> str:
    """Of the first of `kinds` that is True or on its way."""
    found = [c for kind in kinds if (c := status.condition(kind)) is not None]
    telling = (c for c in found if c.reason not in (RunReason.NOT_HALTED, RunReason.NOT_SUSPENDED))
    return next(telling, found[0]).message


def _conditions(draft: Draft, new: Status) -> None:
    """Conditions that turned to something a person should know of."""
    for kind in (ConditionType.ACCEPTED, ConditionType.PODS_READY, ConditionType.HEALTHY, ConditionType.RECOVERABLE):
        was, now = draft.old.condition(kind), new.condition(kind)
        if now is None or (was is not None and (was.status, was.reason) == (now.status, now.reason)):
            continue
        why = reason(now.reason, RunReason.NOT_FINISHED)
        healed = kind is ConditionType.HEALTHY and was is not None and was.status == "False" and now.status == "True"
        if healed and why is RunReason.TRAINING and was is not None and not draft.plan.outcome:
            draft.say(why, f"healthy again; it was {was.reason}")
        if now.status != "False" or draft.said({why}):
            continue
        if kind is not ConditionType.PODS_READY or why in WAITING:
            draft.say(why, now.message, warning=True)


def _rejections(draft: Draft, new: Status) -> None:
    was, now = draft.old.rejections, new.rejections
    if now is None:
        return
    signals = now.signals - (was.signals if was else 0)
    commands = now.commands - (was.commands if was else 0)
    if signals and not draft.said({RunReason.SIGNAL_REJECTED}):
        message = f"{signals} emergency signal(s) refused: forged, replayed or not for this run"
        draft.say(RunReason.SIGNAL_REJECTED, message, warning=True)
    if commands and not draft.said({RunReason.COMMAND_REJECTED}):
        draft.say(RunReason.COMMAND_REJECTED, f"{commands} command(s) refused by Kasmina", warning=True)


def aggregate(events: Iterable[EventRecord]) -> tuple[EventRecord, ...]:
    """Equal Events become one with a count; of one reason at most three are kept, twelve in all."""
    counts: dict[EventRecord, int] = {}
    for event in events:
        counts[event] = counts.get(event, 0) + 1
    kept: list[EventRecord] = []
    dropped: dict[RunReason, int] = {}
    for event, times in counts.items():
        if sum(e.reason is event.reason for e in kept) >= MAX_PER_REASON or len(kept) >= MAX_EVENTS:
            dropped[event.reason] = dropped.get(event.reason, 0) + times
            continue
        suffix = f" ({times} times)" if times > 1 else ""
        kept.append(_with_note(event, suffix))
    return tuple(_with_note(e, f" (and {dropped.pop(e.reason)} more)") if e.reason in dropped else e for e in kept)


def _with_note(event: EventRecord, suffix: str) -> EventRecord:
    message = event.message[: MAX_NOTE - len(suffix)] + suffix
    return replace(event, message=message)
