"""The Job of an attempt. Create-only: its template is immutable, and queue managers change it after us."""

from typing import Any

from esper_leyline import labels
from esper_leyline.exitcodes import ExitCode

from esper_operator.build import names, pod
from esper_operator.model import Manifest, ResumeSource, Run, Settings


def job(run: Run, attempt: int, settings: Settings, source: ResumeSource | None = None) -> Manifest:
    """An Indexed Job with one pod per worker. It replaces a pod that had to give way; any other failure ends it, and
    the operator decides about the next attempt. `source` is the run to resume from, which its pods can then read."""
    manifest = names.child(
        run,
        "batch/v1",
        "Job",
        labels.job_name(run.key.name, attempt),
        spec=_spec(run, attempt, settings, source),
    )
    manifest["metadata"]["labels"] = names.attempt_labels(run, attempt)
    queue = run.spec.scheduling.queue_name
    if queue is not None:
        manifest["metadata"]["labels"][labels.QUEUE_NAME] = queue
        manifest["spec"]["suspend"] = True  # Kueue lifts it when there is quota
    return manifest


def _spec(run: Run, attempt: int, settings: Settings, source: ResumeSource | None) -> Manifest:
    count = run.spec.workers.count
    return {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": pod.template(run, attempt, settings, source),
    }


def _failure_rules() -> list[dict[str, Any]]:
    """First match wins: a pod that was drained or disrupted is replaced and not counted; all else ends the Job."""
    drained = int(ExitCode.DRAINED)
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "Ignore",
            "onExitCodes": {"containerName": labels.TOLARIA, "operator": "In", "values": [drained]},
        },
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": labels.TOLARIA, "operator": "NotIn", "values": [drained]},
        },
    ]
