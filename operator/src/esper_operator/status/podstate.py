"""The condition PodsReady: what the pods wait for, with the remedy. Waiting is no failure; it ends by itself."""

from esper_leyline import labels
from esper_leyline.reasons import RunReason

from esper_operator.model import Claim, Container, Pod
from esper_operator.observe.attempt import current_job, newest_pods, next_number, over, pod_end
from esper_operator.observe.timing import claim_patience_s
from esper_operator.status.draft import Draft
from esper_operator.status.halt import Row

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
WAITING = frozenset(
    {
        RunReason.UNSCHEDULABLE,
        RunReason.IMAGE_PULL_FAILED,
        RunReason.CLAIM_PENDING,
        RunReason.CONFIG_ERROR,
        RunReason.POD_REFUSED,
    }
)
"""Reasons that call for a person."""


def pods_ready(draft: Draft) -> Row:
    """While the run is meant to have pods; the caller knows when it is not."""
    seen = draft.seen
    job = current_job(seen)
    if draft.applied.refused and job is None:
        message = f"the API server refused {draft.applied.refused}; it is asked again until it agrees"
        return Row("False", RunReason.POD_REFUSED, message)
    if draft.applied.waiting and job is None:
        return Row("False", RunReason.PODS_PENDING, draft.applied.waiting)
    if draft.started is not None or job is None or over(seen):
        attempt = draft.started or next_number(seen)
        return Row("False", RunReason.PODS_PENDING, _pending(labels.job_name(seen.run.key.name, attempt)))
    if job.suspended:
        return Row("False", RunReason.QUEUED, "the queue manager holds the Job back until there is quota")
    pods = newest_pods(seen)
    desired = seen.run.spec.workers.count
    for pod in pods:
        row = _waits(draft, pod)
        if row is not None:
            return row
    ready = sum(pod.ready for pod in pods)
    if ready >= desired:
        return Row("True", RunReason.PODS_READY, "all pods are ready")
    return Row("False", RunReason.PODS_PENDING, _pending(job.name))


def _pending(job: str) -> str:
    return f"waiting for the pods of Job {job}; if this lasts: kubectl describe job {job}"


def _waits(draft: Draft, pod: Pod) -> Row | None:
    if pod_end(pod) is not None:
        return None
    for container in pod.containers:
        if container.waiting_reason in IMAGE_REASONS:
            return Row("False", RunReason.IMAGE_PULL_FAILED, _image(draft, pod, container))
        if container.waiting_reason in CONFIG_REASONS:
            said = container.waiting_message or container.waiting_reason
            message = f"container {container.name} of pod {pod.name} cannot be made: {said}"
            return Row("False", RunReason.CONFIG_ERROR, message)
    if claim_patience_s(draft.seen, pod) == 0 and draft.seen.claim is not None:
        return Row("False", RunReason.CLAIM_PENDING, _claim(draft, draft.seen.claim, pod))
    if not pod.unschedulable or claim_patience_s(draft.seen, pod) is not None:
        return None
    message = f"no node takes pod {pod.name}: {pod.unschedulable}"
    remedy = "it starts by itself as soon as one does; what it needs is in spec.workers.resources and spec.workers.pod"
    return Row("False", RunReason.UNSCHEDULABLE, f"{message}; {remedy}")


def _claim(draft: Draft, claim: Claim, pod: Pod) -> str:
    storage = draft.seen.run.spec.checkpoint.storage
    said = f"; {pod.unschedulable}" if pod.unschedulable else ""
    if not claim.phase:
        return f"claim {claim.name} of spec.checkpoint.storage does not exist: create it, the run then goes on{said}"
    if claim.phase != "Pending":
        return f"claim {claim.name} of spec.checkpoint.storage is {claim.phase}: restore its volume{said}"
    if claim.storage_class:
        remedy = f"check that StorageClass {claim.storage_class} exists and can make such a volume"
    else:
        remedy = "it names no StorageClass and the cluster has no default: make one the default, or make a new run"
        remedy += " with spec.checkpoint.storage.claimTemplate.storageClassName"
    size = f" of {storage.claim_template.size}" if storage.claim_template else ""
    return f"claim {claim.name}{size} is Pending: {remedy}; kubectl describe pvc {claim.name} says more{said}"


def _image(draft: Draft, pod: Pod, container: Container) -> str:
    """Without the kubelet's own words: they alternate between two states and would be a write each time."""
    spec, settings = draft.seen.run.spec, draft.seen.settings
    own = spec.runtime.image or settings.runtime_image
    image = own if container.name == labels.TOLARIA else settings.sidecar_image
    return (
        f"image {image} of container {container.name} cannot be pulled: check its name and tag, and imagePullSecrets; "
        f"the registry's answer: kubectl describe pod {pod.name}"
    )
