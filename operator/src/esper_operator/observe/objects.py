"""Runs, pods, Jobs and claims as values. Called by the worker for each object that its caches hold."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from esper_leyline import labels
from esper_leyline.phases import ConditionType, EmergencyStop
from esper_leyline.reasons import RunReason

from esper_operator.api import base
from esper_operator.api.v1alpha1 import FieldError, Spec, Status
from esper_operator.api.validate import validate
from esper_operator.model import Claim, Container, Job, Pod, Problem, Run, RunKey, Secret, Settings, Termination
from esper_operator.observe import raw as read
from esper_operator.observe.launch import launched

MAX_MESSAGE = 2048
_NO_PLACE = ("Unschedulable", "SchedulerError")
_PART_OF = "app.kubernetes.io/part-of"
"""The chart marks its objects so."""
M = TypeVar("M", bound=base.Model)

_PLACEHOLDER = {
    "runtime": {"entrypoint": "unreadable:spec"},
    "checkpoint": {"storage": {"claimName": "unreadable"}},
}
"""Fills the required parts of a spec that does not parse. Never built: the run has problems."""


def run(raw: Any, settings: Settings) -> Run:
    """The run in `raw`. Whatever is wrong with its spec is in `problems`."""
    key = RunKey(read.text(raw, "metadata", "namespace"), read.text(raw, "metadata", "name"))
    status = _salvage(Status, read.section(raw, "status"), {})
    spec, problems = _spec(read.at(raw, "spec"))
    readable = not problems
    if readable:
        problems = validate(spec, key, settings) + _forbidden_edits(spec, status)
    return Run(
        key=key,
        uid=read.text(raw, "metadata", "uid"),
        generation=max(0, read.integer(raw, "metadata", "generation")),
        resource_version=read.text(raw, "metadata", "resourceVersion"),
        created=read.moment(raw, "metadata", "creationTimestamp") or read.EPOCH,
        deleting=bool(read.text(raw, "metadata", "deletionTimestamp")),
        labels=read.strings(raw, "metadata", "labels"),
        spec=spec,
        status=status,
        problems=problems,
        readable=readable,
    )


def pod(raw: Any) -> Pod | None:
    """None unless `raw` is a pod that a Job of some run controls."""
    owner = read.controller(raw)
    marks = read.strings(raw, "metadata", "labels")
    attempt = read.digits(marks.get(labels.ATTEMPT, ""))
    name, uid = read.text(raw, "metadata", "name"), read.text(raw, "metadata", "uid")
    if owner.get("kind") != "Job" or not (name and uid and marks.get(labels.RUN)) or attempt is None:
        return None
    found = read.conditions(raw)
    annotations = read.strings(raw, "metadata", "annotations")
    rank = marks.get(labels.COMPLETION_INDEX) or annotations.get(labels.COMPLETION_INDEX, "")
    return Pod(
        name=name,
        uid=uid,
        namespace=read.text(raw, "metadata", "namespace"),
        run=marks[labels.RUN],
        run_uid=marks.get(labels.RUN_UID, ""),
        job_uid=read.text(owner, "uid"),
        job_name=read.text(owner, "name"),
        attempt=attempt,
        rank=read.digits(rank) or 0,
        phase=read.text(raw, "status", "phase") or "Pending",
        node=read.text(raw, "spec", "nodeName"),
        ip=read.text(raw, "status", "podIP"),
        deleting=bool(read.text(raw, "metadata", "deletionTimestamp")),
        created=read.moment(raw, "metadata", "creationTimestamp") or read.EPOCH,
        started=read.moment(raw, "status", "startTime"),
        ready=_holds(found, "Ready"),
        disrupted=_holds(found, "DisruptionTarget"),
        node_lost=_node_lost(raw, found),
        unschedulable=_unschedulable(found),
        status_message=_cut(read.text(raw, "status", "message") or read.text(raw, "status", "reason")),
        containers=_containers(raw),
        config_hash=annotations.get(labels.CONFIG_HASH, ""),
    )


def job(raw: Any) -> Job | None:
    """None unless `raw` is a Job that an EsperTrainingRun controls and that names its attempt."""
    owner = read.controller(raw)
    name, uid = read.text(raw, "metadata", "name"), read.text(raw, "metadata", "uid")
    attempt = read.digits(read.strings(raw, "metadata", "labels").get(labels.ATTEMPT, ""))
    if owner.get("kind") != labels.KIND or not (name and uid) or attempt is None:
        return None
    found = read.conditions(raw)
    failure = next((found[t] for t in ("Failed", "FailureTarget") if _holds(found, t)), {})
    return Job(
        name=name,
        uid=uid,
        attempt=attempt,
        created=read.moment(raw, "metadata", "creationTimestamp") or read.EPOCH,
        deleting=bool(read.text(raw, "metadata", "deletionTimestamp")),
        suspended=read.flag(raw, "spec", "suspend"),
        complete=_holds(found, "Complete"),
        failed=bool(failure),
        failed_reason=read.text(failure, "reason"),
        failed_message=_cut(read.text(failure, "message")),
        owner_uid=read.text(owner, "uid"),
    )


def claim(name: str, raw: Any) -> Claim:
    """The PersistentVolumeClaim `name`; pass {} when it does not exist."""
    storage_class = read.text(raw, "spec", "storageClassName")
    return Claim(name=name, phase=read.text(raw, "status", "phase"), storage_class=storage_class)


def secret(name: str, raw: Any) -> Secret:
    """The Secret `name`; pass {} when it does not exist."""
    marks = read.strings(raw, "metadata", "labels")
    owner = f"run {marks[labels.RUN]}" if labels.RUN in marks else ""
    if not owner and (marks.get(labels.MANAGED) == labels.FIELD_MANAGER or marks.get(_PART_OF) == "esper"):
        owner = "the operator"
    return Secret(name=name, found=bool(read.text(raw, "metadata", "uid")), owner=owner)


def children_of(run: Run, jobs: Iterable[Job], pods: Iterable[Pod]) -> tuple[tuple[Job, ...], tuple[Pod, ...]]:
    """Of all Jobs and pods seen, those of `run`, in the order that Observation wants.

    A Job counts by the UID of its controller. A pod counts by the UID of its Job, or, when that Job is already gone,
    by the name that only a Job of this run can have had: such a pod must be waited for.
    """
    own = sorted((j for j in jobs if j.owner_uid == run.uid), key=lambda j: (j.attempt, j.created, j.uid))
    by_uid = {j.uid for j in own}
    names = {j.name for j in own}

    def belongs(pod: Pod) -> bool:
        if pod.namespace != run.key.namespace:
            return False
        orphan = pod.job_name not in names and pod.job_name == labels.job_name(run.key.name, pod.attempt)
        return pod.job_uid in by_uid or (orphan and pod.run_uid == run.uid)

    return tuple(own), tuple(sorted(filter(belongs, pods), key=lambda p: (p.attempt, p.rank, p.created, p.uid)))


# --- runs ----------------------------------------------------------------------------------------------------


def _spec(raw: Any) -> tuple[Spec, tuple[Problem, ...]]:
    try:
        return Spec.parse(raw if raw is not None else {}), ()
    except FieldError as error:
        problems = tuple(Problem(path, message) for path, message in error.problems)
    return _salvage(Spec, raw if isinstance(raw, Mapping) else {}, _PLACEHOLDER), problems


def _salvage(model: type[M], raw: Mapping[str, Any], required: Mapping[str, Any]) -> M:
    """The fields of `raw` that parse, over `required`."""
    try:
        return base.parse(model, {**required, **raw}, "")
    except FieldError:
        kept = dict(required)
    for name, value in raw.items():
        try:
            base.parse(model, {**kept, name: value}, "")
        except FieldError:
            continue  # named in the run's problems, or a status that the next write replaces
        kept[name] = value
    return base.parse(model, kept, "")


def _forbidden_edits(spec: Spec, status: Status) -> tuple[Problem, ...]:
    """Edits that CEL refuses, on an object that came past it. They take effect with the next attempt or never."""
    before, now = status.launched, launched(spec)
    if before is None:
        return ()
    problems = []
    if before.storage_hash not in ("", now.storage_hash):
        problems.append(_forbidden("checkpoint.storage", "is immutable: put it back, or make a new run"))
    if status.next_attempt_time is not None or _may_change(spec, status):
        return tuple(problems)
    remedy = "changed while training, so it is not in force: put it back, or set suspend to true and to false again"
    if before.runtime_hash not in ("", now.runtime_hash):
        problems.append(_forbidden("runtime", remedy))
    if before.workers_hash not in ("", now.workers_hash) and spec.workers.elastic is None:
        problems.append(_forbidden("workers", remedy))
    return tuple(problems)


def _forbidden(field: str, message: str) -> Problem:
    return Problem(f"spec.{field}", message, RunReason.FORBIDDEN_EDIT)


def _may_change(spec: Spec, status: Status) -> bool:
    stopped = spec.suspend or spec.emergency_stop in (EmergencyStop.CHECKPOINT, EmergencyStop.KILL)
    resting = (status.condition(kind) for kind in (ConditionType.HALTED, ConditionType.SUSPENDED))
    return stopped or any(c is not None and c.status == "True" for c in resting)


# --- pods ----------------------------------------------------------------------------------------------------


def _holds(found: Mapping[str, Mapping[str, Any]], kind: str) -> bool:
    return read.text(found.get(kind), "status") == "True"


def _node_lost(raw: Any, found: Mapping[str, Mapping[str, Any]]) -> bool:
    """The node controller turns only Ready to False; a kubelet always moves ContainersReady with it."""
    marked = read.text(found.get("Ready"), "status") == "False" and _holds(found, "ContainersReady")
    return marked or read.text(raw, "status", "reason") == "NodeLost"


def _unschedulable(found: Mapping[str, Mapping[str, Any]]) -> str:
    scheduled = found.get("PodScheduled")
    if read.text(scheduled, "status") != "False" or read.text(scheduled, "reason") not in _NO_PLACE:
        return ""
    return _cut(read.text(scheduled, "message")) or "no node fits"


def _containers(raw: Any) -> tuple[Container, ...]:
    return tuple(
        Container(
            name=read.text(status, "name"),
            ready=read.flag(status, "ready"),
            started=isinstance(read.at(status, "state", "running"), Mapping),
            restarts=read.integer(status, "restartCount"),
            waiting_reason=read.text(status, "state", "waiting", "reason"),
            waiting_message=_cut(read.text(status, "state", "waiting", "message")),
            terminated=_termination(read.at(status, "state", "terminated")),
            last_terminated=_termination(read.at(status, "lastState", "terminated")),
        )
        for kind in ("initContainerStatuses", "containerStatuses")
        for status in read.objects(raw, "status", kind)
    )


def _termination(raw: Any) -> Termination | None:
    if not isinstance(raw, Mapping):
        return None
    return Termination(
        exit_code=read.integer(raw, "exitCode"),
        reason=read.text(raw, "reason"),
        message=_cut(read.text(raw, "message")),
        finished=read.moment(raw, "finishedAt"),
    )


def _cut(message: str) -> str:
    return message[:MAX_MESSAGE]
