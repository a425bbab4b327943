"""Questions about the current attempt that policies and status both ask. Pure functions of an Observation.

The life of an attempt, and what remembers it when the operator is killed in between:

    number N+1  = Job <run>-a<N+1> exists, or status.attempt says so
    over        = status.nextAttemptTime is set (a failure, or the end of a halt, has been recorded)
    next number = N+1 once N is over; else N again, so that a stale cache meets AlreadyExists and nothing else
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from esper_leyline import labels
from esper_leyline.exitcodes import ExitCode
from esper_leyline.phases import ConditionType, Phase
from esper_leyline.reasons import RunReason

from esper_operator.api.v1alpha1 import LastFailure, Status
from esper_operator.model import Container, Job, Observation, Pod, Termination

REASON_OF_EXIT: Mapping[int, RunReason] = {
    ExitCode.TRAINER_CRASHED: RunReason.TRAINER_CRASHED,
    ExitCode.USER_CODE: RunReason.USER_CODE_ERROR,
    ExitCode.NO_VALID_CHECKPOINT: RunReason.NO_VALID_CHECKPOINT,
    ExitCode.ROLLBACK_EXHAUSTED: RunReason.ROLLBACKS_EXHAUSTED,
    ExitCode.CHECKPOINT_DIR: RunReason.CHECKPOINT_DIR_UNUSABLE,
    ExitCode.HALTED: RunReason.HALTED,
    ExitCode.HUNG: RunReason.HANG,
    ExitCode.CONFIG: RunReason.CONFIG_ERROR,
    ExitCode.DRAINED: RunReason.DRAINED,
}
_RUN_REASONS = frozenset(RunReason)


class EndKind(StrEnum):
    COMPLETE = "Complete"
    HALTED = "Halted"
    DRAINED = "Drained"
    """The pod gave way (SIGTERM, eviction); its Job makes another one."""
    FAILED = "Failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a pod, or the whole attempt, ended."""

    kind: EndKind
    exit_code: int | None
    reason: RunReason
    message: str
    pod: Pod | None = None
    container: str = ""
    finished: datetime | None = None
    saved_step: int | None = None

    def failure(self) -> LastFailure:
        """As status.lastFailure."""
        return LastFailure(
            rank=self.pod.rank if self.pod else None,
            pod_name=self.pod.name if self.pod else None,
            node_name=(self.pod.node or None) if self.pod else None,
            container_name=self.container or None,
            exit_code=self.exit_code,
            reason=self.reason,
            message=self.message,
            time=self.finished,
        )


# --- which attempt -------------------------------------------------------------------------------------------


def number(seen: Observation) -> int:
    """The current attempt; 0 before the first."""
    return max(seen.run.status.attempt, seen.job.attempt if seen.job else 0)


def unrecorded(seen: Observation) -> bool:
    """A Job exists whose attempt the status does not know yet: the operator died between the two writes."""
    return number(seen) > seen.run.status.attempt


def over(seen: Observation) -> bool:
    """The end of the current attempt is on record; whatever is left of it must go."""
    return not unrecorded(seen) and seen.run.status.next_attempt_time is not None


def stopped(status: Status) -> bool:
    """The run was last written as halted or suspended, or on the way there."""
    halted, suspended = status.condition(ConditionType.HALTED), status.condition(ConditionType.SUSPENDED)
    return (
        holds(status, ConditionType.HALTED)
        or holds(status, ConditionType.SUSPENDED)
        or (halted is not None and halted.reason == RunReason.HALT_REQUESTED)
        or (suspended is not None and suspended.reason == RunReason.SUSPENDED)
    )


def holds(status: Status, kind: ConditionType) -> bool:
    condition = status.condition(kind)
    return condition is not None and condition.status == "True"


def next_number(seen: Observation) -> int:
    """The number of the Job that is to be created when there is none."""
    at = number(seen)
    return at + 1 if at == 0 or over(seen) or (stopped(seen.run.status) and not unrecorded(seen)) else at


def current_job(seen: Observation) -> Job | None:
    """The Job of the current attempt, also while it is being deleted."""
    at = number(seen)
    return next((job for job in reversed(seen.jobs) if job.attempt == at), None)


def live_job(seen: Observation) -> Job | None:
    """The current Job while it may still start or keep pods."""
    job = current_job(seen)
    if job is None or job.deleting or job.complete or job.failed or over(seen):
        return None
    end = attempt_end(seen)
    return job if end is None or end.kind is EndKind.DRAINED else None


# --- pods ----------------------------------------------------------------------------------------------------


def attempt_pods(seen: Observation) -> tuple[Pod, ...]:
    """All pods of the current attempt, replaced ones too."""
    at = number(seen)
    return tuple(pod for pod in seen.pods if pod.attempt == at)


def newest_pods(seen: Observation) -> tuple[Pod, ...]:
    """The newest pod of each rank of the current attempt, by rank."""
    newest: dict[int, Pod] = {}
    for pod in attempt_pods(seen):
        known = newest.get(pod.rank)
        if known is None or (pod.created, pod.uid) >= (known.created, known.uid):
            newest[pod.rank] = pod
    return tuple(newest[rank] for rank in sorted(newest))


def trainer(pod: Pod) -> Container | None:
    return pod.container(labels.TOLARIA)


def training(pod: Pod) -> bool:
    """Its trainer's container runs."""
    container = trainer(pod)
    return container is not None and container.started and container.terminated is None and pod_end(pod) is None


def training_pods(seen: Observation) -> tuple[Pod, ...]:
    """Pods of any attempt whose trainer runs, by the kubelet's word or, where that is late, by the runtime's."""
    told = seen.run.status.phase in (Phase.RUNNING, Phase.ROLLING_BACK) and not unrecorded(seen)
    at = number(seen)
    return tuple(
        pod for pod in seen.pods if training(pod) or (told and pod.attempt == at and pod.node and pod_end(pod) is None)
    )


# --- ends ----------------------------------------------------------------------------------------------------


def pod_end(pod: Pod) -> End | None:
    """How `pod` ended, from the first container termination seen; None while it has not."""
    container = trainer(pod)
    if container is not None and container.terminated is not None:
        return _of_termination(pod, container.terminated)
    if pod.phase == "Succeeded":
        return End(kind=EndKind.COMPLETE, exit_code=0, reason=RunReason.COMPLETE, message="", pod=pod)
    if pod.phase != "Failed":
        return None
    kind = EndKind.DRAINED if pod.disrupted else EndKind.FAILED
    reason = RunReason.POD_DISRUPTED if pod.disrupted else RunReason.POD_LOST
    return End(kind=kind, exit_code=None, reason=reason, message=pod.status_message, pod=pod)


def attempt_end(seen: Observation) -> End | None:
    """How the current attempt ended, or None. One failed rank ends it; DRAINED means that the Job goes on."""
    pods = newest_pods(seen)
    ends = [end for pod in pods if (end := pod_end(pod)) is not None]
    for kind in (EndKind.FAILED, EndKind.HALTED):
        found = [end for end in ends if end.kind is kind]
        if found:
            return min(found, key=_when)
    job = current_job(seen)
    complete = [end for end in ends if end.kind is EndKind.COMPLETE]
    if _enough(seen, len(complete)) or (job is not None and job.complete):
        return complete[0] if complete else _of_job(EndKind.COMPLETE, RunReason.COMPLETE, "")
    drained = [end for end in ends if end.kind is EndKind.DRAINED]
    untold = any(pod_end(pod) is None and not pod.node_lost for pod in pods)  # its end is on the way to us
    if job is not None and job.failed and not untold:
        # The Job gave up though no pod of it says why: taken away by force, or a drained one that it does not replace.
        reason = RunReason.POD_DISRUPTED if drained else RunReason.POD_LOST
        return _of_job(EndKind.FAILED, reason, job.failed_message or job.failed_reason, drained)
    return min(drained, key=_when) if drained else None


def _enough(seen: Observation, complete: int) -> bool:
    spec = seen.run.spec
    return complete > 0 if spec.succeed_when == "FirstWorker" else complete >= spec.workers.count


def _when(end: End) -> tuple[bool, float, int]:
    finished = end.finished
    return finished is None, finished.timestamp() if finished else 0.0, end.pod.rank if end.pod else 0


def _of_job(kind: EndKind, reason: RunReason, message: str, ends: list[End] | None = None) -> End:
    last = ends[0] if ends else None
    return End(
        kind=kind,
        exit_code=last.exit_code if last else None,
        reason=reason,
        message=message,
        pod=last.pod if last else None,
        container=last.container if last else "",
        finished=last.finished if last else None,
    )


def _of_termination(pod: Pod, termination: Termination) -> End:
    word = last_word(termination.message)
    code = termination.exit_code
    disrupted = code == ExitCode.DRAINED or (pod.disrupted and code not in (ExitCode.COMPLETE, ExitCode.HALTED))
    if code == ExitCode.COMPLETE:
        kind = EndKind.COMPLETE  # whatever `reason` says: on cgroup v1 it may be OOMKilled beside a 0
    elif code == ExitCode.HALTED:
        kind = EndKind.HALTED
    else:
        kind = EndKind.DRAINED if disrupted else EndKind.FAILED
    told = word.get("reason")
    reason = (
        RunReason(told)
        if isinstance(told, str) and told in _RUN_REASONS
        else _reason_of(code, termination, disrupted=disrupted)
    )
    saved = word.get("savedStep")
    message = word.get("message", "" if word else termination.message)
    return End(
        kind=kind,
        exit_code=code,
        reason=reason,
        message=message if isinstance(message, str) else "",
        pod=pod,
        container=labels.TOLARIA,
        finished=termination.finished,
        saved_step=saved if isinstance(saved, int) and 0 <= saved < 2**63 else None,
    )


def _reason_of(code: int, termination: Termination, *, disrupted: bool) -> RunReason:
    if code in REASON_OF_EXIT:
        return REASON_OF_EXIT[ExitCode(code)]
    if disrupted:
        return RunReason.POD_DISRUPTED
    return RunReason.OUT_OF_MEMORY if termination.reason == "OOMKilled" else RunReason.CONTAINER_DIED


def last_word(message: str) -> dict[str, Any]:
    """The termination message as the supervisor writes it; empty when it is something else."""
    try:
        word = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return word if isinstance(word, dict) else {}
