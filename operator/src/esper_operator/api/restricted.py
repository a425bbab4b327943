"""The 'restricted' Pod Security Standard as a function, so that the operator refuses a pod that it should never have
built, whatever went wrong before and whatever the namespace enforces.

Follows https://kubernetes.io/docs/concepts/security/pod-security-standards/ (v1.34, Linux), and adds that a pod of ours
gets no way to the API: no service account but the default one, and no token of it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from esper_leyline.reasons import RunReason

from esper_operator.model import Problem

Raw = Mapping[str, Any]
Check = Callable[[Raw], Iterator[tuple[str, str]]]

VOLUME_TYPES = frozenset(
    {
        "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
    }
)  # fmt: skip
CAPABILITIES = frozenset({"NET_BIND_SERVICE"})
SECCOMP_TYPES = frozenset({"RuntimeDefault", "Localhost"})
SELINUX_TYPES = frozenset({"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"})
SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
    }
)  # fmt: skip
APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"
_CONTAINER_LISTS = ("initContainers", "containers", "ephemeralContainers")
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_HOOKS = ("postStart", "preStop")


def check(pod: Raw) -> tuple[Problem, ...]:
    """What keeps the pod, or pod template, from being admitted. Empty: it may be created."""
    return tuple(
        Problem(f"pod.{field}", message, RunReason.POD_NOT_RESTRICTED)
        for rule in (*STANDARD, *NO_API_ACCESS)
        for field, message in rule(pod)
    )


# --- the pod ---------------------------------------------------------------------------------------------------


def _host_namespaces(pod: Raw) -> Iterator[tuple[str, str]]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if _spec(pod).get(name):
            yield f"spec.{name}", "shares a namespace of the node"


def _volumes(pod: Raw) -> Iterator[tuple[str, str]]:
    for i, volume in enumerate(_spec(pod).get("volumes") or ()):
        for kind in set(volume) - {"name"} - VOLUME_TYPES:
            yield (
                f"spec.volumes[{i}].{kind}",
                f"is no allowed type of volume; allowed: {', '.join(sorted(VOLUME_TYPES))}",
            )


def _sysctls(pod: Raw) -> Iterator[tuple[str, str]]:
    for i, sysctl in enumerate(_context(_spec(pod)).get("sysctls") or ()):
        if sysctl.get("name") not in SYSCTLS:
            yield f"spec.securityContext.sysctls[{i}]", f"{sysctl.get('name')} is no safe sysctl"


def _apparmor_annotations(pod: Raw) -> Iterator[tuple[str, str]]:
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    for key, value in annotations.items():
        allowed = value in ("", "runtime/default") or value.startswith("localhost/")
        if key.startswith(APPARMOR_ANNOTATION) and not allowed:
            yield f"metadata.annotations.{key}", f"{value} switches AppArmor off"


# --- pod and containers ----------------------------------------------------------------------------------------


def _security_options(pod: Raw) -> Iterator[tuple[str, str]]:
    """What may be wrong in the pod's own security context and in each container's alike."""
    for field, context in _contexts(pod):
        if (context.get("windowsOptions") or {}).get("hostProcess"):
            yield f"{field}.windowsOptions.hostProcess", "is a process of the node"
        selinux = context.get("seLinuxOptions") or {}
        if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
            yield f"{field}.seLinuxOptions", "may only name the type of a container"
        apparmor = (context.get("appArmorProfile") or {}).get("type")
        if apparmor not in (None, "RuntimeDefault", "Localhost"):
            yield f"{field}.appArmorProfile", f"{apparmor} switches AppArmor off"
        seccomp = (context.get("seccompProfile") or {}).get("type")
        if seccomp is not None and seccomp not in SECCOMP_TYPES:
            yield f"{field}.seccompProfile", f"{seccomp} switches seccomp off"
        if context.get("runAsUser") == 0:
            yield f"{field}.runAsUser", "is root"
        if context.get("runAsNonRoot") is False:
            yield f"{field}.runAsNonRoot", "allows root"


def _inherited(pod: Raw) -> Iterator[tuple[str, str]]:
    """What the pod or else every container must say."""
    shared = _context(_spec(pod))
    for field, container in _containers(pod):
        own = _context(container)
        if "seccompProfile" not in own and "seccompProfile" not in shared:
            yield f"{field}.securityContext.seccompProfile", "must be RuntimeDefault or Localhost"
        if own.get("runAsNonRoot", shared.get("runAsNonRoot")) is not True:
            yield f"{field}.securityContext.runAsNonRoot", "must be true"


def _containers_alone(pod: Raw) -> Iterator[tuple[str, str]]:
    for field, container in _containers(pod):
        context = _context(container)
        if context.get("privileged"):
            yield f"{field}.securityContext.privileged", "has all rights of the node"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{field}.securityContext.allowPrivilegeEscalation", "must be false"
        if context.get("procMount") not in (None, "Default"):
            yield f"{field}.securityContext.procMount", "must be Default"
        capabilities = context.get("capabilities") or {}
        if "ALL" not in (capabilities.get("drop") or ()):
            yield f"{field}.securityContext.capabilities.drop", "must contain ALL"
        for name in sorted(set(capabilities.get("add") or ()) - CAPABILITIES):
            yield f"{field}.securityContext.capabilities.add", f"{name} may not be added"


def _ports_and_hosts(pod: Raw) -> Iterator[tuple[str, str]]:
    for field, container in _containers(pod):
        for i, port in enumerate(container.get("ports") or ()):
            if port.get("hostPort"):
                yield f"{field}.ports[{i}].hostPort", "opens a port of the node"
        lifecycle = container.get("lifecycle") or {}
        actions = {name: container.get(name) for name in _PROBES}
        actions |= {f"lifecycle.{name}": lifecycle.get(name) for name in _HOOKS}
        for name, action in actions.items():
            for kind in ("httpGet", "tcpSocket"):
                if ((action or {}).get(kind) or {}).get("host"):
                    yield f"{field}.{name}.{kind}.host", "reaches beyond the pod"


# --- ours -------------------------------------------------------------------------------------------------------


def _service_account(pod: Raw) -> Iterator[tuple[str, str]]:
    spec = _spec(pod)
    for name in ("serviceAccountName", "serviceAccount"):
        if spec.get(name) not in (None, "", "default"):
            yield f"spec.{name}", "must be the default one: pods of a run have no rights in the cluster"
    if spec.get("automountServiceAccountToken") is not False:
        yield "spec.automountServiceAccountToken", "must be false"


def _tokens(pod: Raw) -> Iterator[tuple[str, str]]:
    for i, volume in enumerate(_spec(pod).get("volumes") or ()):
        sources = (volume.get("projected") or {}).get("sources") or ()
        if any("serviceAccountToken" in source for source in sources):
            yield f"spec.volumes[{i}].projected", "holds a service account's token"


STANDARD: tuple[Check, ...] = (
    _host_namespaces,
    _volumes,
    _sysctls,
    _apparmor_annotations,
    _security_options,
    _inherited,
    _containers_alone,
    _ports_and_hosts,
)
NO_API_ACCESS: tuple[Check, ...] = (_service_account, _tokens)


def _spec(pod: Raw) -> Raw:
    found: Raw = pod.get("spec") or {}
    return found


def _context(owner: Raw) -> Raw:
    found: Raw = owner.get("securityContext") or {}
    return found


def _containers(pod: Raw) -> Iterator[tuple[str, Raw]]:
    for name in _CONTAINER_LISTS:
        for i, container in enumerate(_spec(pod).get(name) or ()):
            yield f"spec.{name}[{i}]", container


def _contexts(pod: Raw) -> Iterator[tuple[str, Raw]]:
    yield "spec.securityContext", _context(_spec(pod))
    for field, container in _containers(pod):
        yield f"{field}.securityContext", _context(container)
