"""The native sidecars, and what every container of a pod has in common."""

from esper_leyline import env, labels, ports
from esper_leyline.paths import GID, UIDS

from esper_operator.build import volumes
from esper_operator.model import Manifest, Run, Settings

HTTP_PORTS = {
    labels.WEATHERLIGHT: ports.WEATHERLIGHT_HTTP,
    labels.KASMINA: ports.KASMINA_HTTP,
    labels.TAMIYO: ports.TAMIYO_HTTP,
    labels.TOLARIA: ports.TOLARIA_HTTP,
}
REQUESTS = {
    labels.WEATHERLIGHT: ("20m", "96Mi"),
    labels.KASMINA: ("20m", "96Mi"),
    labels.TAMIYO: ("50m", "128Mi"),
}
"""CPU and memory: small, so that a run fits a node of two cores."""
MEMORY_LIMITS = {labels.WEATHERLIGHT: "256Mi", labels.KASMINA: "256Mi", labels.TAMIYO: "512Mi"}
"""What a sidecar writes into a memory volume counts here too."""


def sidecars(run: Run, attempt: int, settings: Settings) -> list[Manifest]:
    """In the order in which they start, each after the one before answers; they end in reverse."""
    return [_sidecar(name, run, attempt, settings) for name in labels.SIDECARS]


def _sidecar(name: str, run: Run, attempt: int, settings: Settings) -> Manifest:
    variables = {env.KEYS_DIR: settings.layout.keys}
    if name == labels.WEATHERLIGHT:
        variables |= {env.BUS_DIR: settings.layout.bus, env.EMERGENCY_DIR: settings.layout.emergency}
    return {
        **container(name, settings),
        "image": settings.sidecar_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", f"esper_runtime.{name}"],
        "restartPolicy": "Always",
        "env": environment(name, run, attempt, settings) + plain(variables),
        "volumeMounts": volumes.sidecar_mounts(name, settings),
        "resources": _resources(name),
        "startupProbe": _probe("/livez", name, period=1, failures=60),
        "readinessProbe": _probe("/readyz", name, period=2, failures=3),
        "livenessProbe": _probe("/livez", name, period=10, failures=6),
    }


def _resources(name: str) -> Manifest:
    cpu, memory = REQUESTS[name]
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": MEMORY_LIMITS[name]}}


def liveness(name: str) -> Manifest:
    """Of a process that answers at once and is given a minute: a busy machine is no reason to kill."""
    return _probe("/livez", name, period=10, failures=6)


def _probe(path: str, name: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": HTTP_PORTS[name]},
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    }


def container(name: str, settings: Settings) -> Manifest:
    """Name, ports, last word and rights: the same for all four."""
    found: Manifest = {
        "name": name,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UIDS[name],
            "runAsGroup": GID,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": settings.layout.termination_log,
        "terminationMessagePolicy": "File",
    }
    if settings.http_ports_fixed:
        found["ports"] = [{"name": name, "containerPort": HTTP_PORTS[name], "protocol": "TCP"}]
    return found


def environment(name: str, run: Run, attempt: int, settings: Settings) -> list[Manifest]:
    """What every container is told."""
    layout = settings.layout
    given = {
        env.RUN: run.key.name,
        env.NAMESPACE: run.key.namespace,
        env.RUN_UID: run.uid,
        env.ATTEMPT: str(attempt),
        env.WORLD_SIZE: str(run.spec.workers.count),
        env.GRACE_SECONDS: str(run.spec.restart.termination_grace_period_seconds),
        env.CONFIG_FILE: volumes.config_file(settings),
        env.RUN_DIR: layout.run,
        env.TERMINATION_LOG: layout.termination_log,
        env.HTTP_PORT: str(HTTP_PORTS[name] if settings.http_ports_fixed else 0),
        env.LOG_FORMAT: settings.log_format,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": layout.tmp,
    }
    fields = {
        env.RANK: f"metadata.annotations['{labels.COMPLETION_INDEX}']",
        env.POD_NAME: "metadata.name",
        env.POD_UID: "metadata.uid",
        env.POD_IP: "status.podIP",
        env.NODE_NAME: "spec.nodeName",
    }
    downward = [
        {"name": key, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}
        for key, path in fields.items()
    ]
    return plain(given) + downward


def plain(variables: dict[str, str]) -> list[Manifest]:
    return [{"name": key, "value": value} for key, value in variables.items()]
