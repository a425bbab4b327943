"""The pod of a worker: the sidecars, then the trainer, under the 'restricted' Pod Security Standard."""

from typing import Any

from esper_leyline import env, labels, ports
from esper_leyline.paths import GID

from esper_operator.api.v1alpha1 import EnvVar
from esper_operator.build import config, names, sidecars, volumes
from esper_operator.model import Manifest, ResumeSource, Run, Settings

DEFAULT_REQUESTS = {"cpu": "500m", "memory": "1Gi"}
"""Of a trainer about which the user says nothing. No CPU limit: throttling helps nobody."""


def template(run: Run, attempt: int, settings: Settings, source: ResumeSource | None = None) -> Manifest:
    """The Job's pod template."""
    pod = run.spec.workers.pod
    annotations = {
        **(pod.annotations or {}),
        labels.DEFAULT_CONTAINER: labels.TOLARIA,
        labels.CONFIG_HASH: config.config_hash(run),
    }
    metadata = {
        "labels": {**(pod.labels or {}), **names.attempt_labels(run, attempt)},
        "annotations": annotations,
    }
    return {"metadata": metadata, "spec": _spec(run, attempt, settings, source)}


def _spec(run: Run, attempt: int, settings: Settings, source: ResumeSource | None) -> Manifest:
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "subdomain": labels.service_name(run.key.name),
        "terminationGracePeriodSeconds": run.spec.restart.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "fsGroup": GID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_placement(run, settings),
        "initContainers": sidecars.sidecars(run, attempt, settings),
        "containers": [_tolaria(run, attempt, settings, source)],
        "volumes": volumes.volumes(run, source),
    }


def _placement(run: Run, settings: Settings) -> Manifest:
    """Where the pod may run, and what it needs for that. Only what was asked for appears."""
    pod = run.spec.workers.pod
    pull = dict.fromkeys((*settings.image_pull_secrets, *(each.name for each in pod.image_pull_secrets or ())))
    wanted: dict[str, Any] = {
        "nodeSelector": dict(pod.node_selector or {}),
        "tolerations": [each.to_dict() for each in pod.tolerations or ()],
        "affinity": pod.affinity.to_dict() if pod.affinity else None,
        "runtimeClassName": pod.runtime_class_name,
        "priorityClassName": run.spec.scheduling.priority_class_name,
        "imagePullSecrets": [{"name": name} for name in pull],
    }
    return {key: value for key, value in wanted.items() if value}


def _tolaria(run: Run, attempt: int, settings: Settings, source: ResumeSource | None) -> Manifest:
    runtime = run.spec.runtime
    own = runtime.image is not None
    return {
        **sidecars.container(labels.TOLARIA, settings),
        "image": runtime.image if own else settings.runtime_image,
        "imagePullPolicy": runtime.image_pull_policy if own else settings.image_pull_policy,
        "command": ["python", "-m", "esper_runtime.tolaria"],
        "env": _environment(run, attempt, settings),
        "volumeMounts": volumes.trainer_mounts(run, settings, source),
        "resources": _resources(run),
        "livenessProbe": sidecars.liveness(labels.TOLARIA),
    }


def _environment(run: Run, attempt: int, settings: Settings) -> list[Manifest]:
    """Ours, then the user's. The user may replace what is only a default, such as HOME; never a name twice."""
    layout = settings.layout
    given = {env.SHM_DIR: layout.shm, env.CHECKPOINT_DIR: volumes.checkpoint_directory(run, settings)}
    if run.spec.runtime.code_config_map_name is not None:
        given[env.CODE_DIR] = layout.code
    if run.spec.workers.count > 1:
        first = f"{labels.job_name(run.key.name, attempt)}-0.{labels.service_name(run.key.name)}"
        given |= {"MASTER_ADDR": first, "MASTER_PORT": str(ports.RENDEZVOUS)}
    ours = sidecars.environment(labels.TOLARIA, run, attempt, settings) + sidecars.plain(given)
    users = {each.name for each in run.spec.runtime.env}
    kept = [each for each in ours if each["name"] not in users]
    return kept + [_user_variable(each) for each in run.spec.runtime.env]


def _user_variable(variable: EnvVar) -> Manifest:
    if variable.secret_key_ref is not None:
        return {"name": variable.name, "valueFrom": {"secretKeyRef": variable.secret_key_ref.to_dict()}}
    if variable.config_map_key_ref is not None:
        return {"name": variable.name, "valueFrom": {"configMapKeyRef": variable.config_map_key_ref.to_dict()}}
    return {"name": variable.name, "value": variable.value or ""}


def _resources(run: Run) -> Manifest:
    """As given; what is neither requested nor limited gets a small request, so that the scheduler counts it."""
    given = run.spec.workers.resources
    requests = {name: text for name, text in DEFAULT_REQUESTS.items() if name not in given.limits}
    found: Manifest = {"requests": {**requests, **given.requests}}
    if given.limits:
        found["limits"] = dict(given.limits)
    return found
