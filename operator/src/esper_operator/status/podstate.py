"""The condition PodsReady: what the pods wait for, with the remedy. Waiting is no failure; it ends by itself."""

from esper_leyline import labels
from esper_leyline.reasons import RunReason

from esper_operator.model import Container, Pod
from esper_operator.observe.attempt import current_job, newest_pods, next_number, over, pod_end
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
    if draft.applied.refused:
        message = f"the API server refused the Job: {draft.applied.refused}; it is tried again until there is room"
        return Row("False", RunReason.POD_REFUSED, message)
    job = current_job(seen)
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
    if not pod.unschedulable:
        return None
    claim = draft.seen.claim
    if (
        claim is not None
        and claim.phase != "Bound"
        and "volume" in pod.unschedulable.lower().replace("persistentv", "v")
    ):
        message = (
            f"claim {claim.name} is {claim.phase or 'missing'}: check its storage class and size; {pod.unschedulable}"
        )
        return Row("False", RunReason.CLAIM_PENDING, message)
    message = f"no node has room for pod {pod.name}: {pod.unschedulable}; it starts by itself when one has"
    return Row("False", RunReason.UNSCHEDULABLE, message)


def _image(draft: Draft, pod: Pod, container: Container) -> str:
    """Without the kubelet's own words: they alternate between two states and would be a write each time."""
    spec, settings = draft.seen.run.spec, draft.seen.settings
    own = spec.runtime.image or settings.runtime_image
    image = own if container.name == labels.TOLARIA else settings.sidecar_image
    return (
        f"image {image} of container {container.name} cannot be pulled: check its name and tag, and imagePullSecrets; "
        f"the registry's answer: kubectl describe pod {pod.name}"
    )
