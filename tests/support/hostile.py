"""Values that somebody might try in order to get more than a training pod, and pods that should never be built."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esper_operator.api.restricted import APPARMOR_ANNOTATION

JsonDict = dict[str, Any]


@dataclass(frozen=True)
class HostileSpec:
    """A spec, as a patch of the smallest one, and which layer on its own must refuse it."""

    name: str
    patch: JsonDict
    by_api_server: bool = True
    """False: free-form content that only the operator can judge."""
    unknown_field: bool = False
    """Refused by strict field validation; without that the field is pruned and never stored."""


def _pod(**fields: Any) -> JsonDict:
    return {"workers": {"pod": fields}}


def _volume(**fields: Any) -> JsonDict:
    return _pod(volumes=[{"name": "v", "mountPath": "/data", **fields}])


def _env(name: str, value: str = "x") -> JsonDict:
    return {"runtime": {"env": [{"name": name, "value": value}]}}


def _limit(cpu: str) -> JsonDict:
    return {"workers": {"resources": {"limits": {"cpu": cpu}}}}


HUGE = "x" * 300_000

SPECS = (
    HostileSpec("hostPath volume", _volume(hostPath={"path": "/"}), unknown_field=True),
    HostileSpec("projected token", _volume(projected={"sources": []}), unknown_field=True),
    HostileSpec("privileged", _pod(securityContext={"privileged": True}), unknown_field=True),
    HostileSpec("service account", _pod(serviceAccountName="cluster-admin"), unknown_field=True),
    HostileSpec("token", _pod(automountServiceAccountToken=True), unknown_field=True),
    HostileSpec("host network", _pod(hostNetwork=True), unknown_field=True),
    HostileSpec("host processes", _pod(hostPID=True), unknown_field=True),
    HostileSpec("pinned node", _pod(nodeName="control-plane"), unknown_field=True),
    HostileSpec("another container", _pod(containers=[{"name": "x", "image": "x"}]), unknown_field=True),
    HostileSpec("another command", {"runtime": {"command": ["sh"]}}, unknown_field=True),
    HostileSpec("pod affinity", _pod(affinity={"podAffinity": {}}), unknown_field=True),
    HostileSpec("mount over the keys", _volume(mountPath="/etc/esper/keys", emptyDirSize="1Mi")),
    HostileSpec("mount over the sockets", _volume(mountPath="/run/esper", emptyDirSize="1Mi")),
    HostileSpec("mount over snapshots", _volume(mountPath="/dev/shm", emptyDirSize="1Mi")),
    HostileSpec("mount over the code", _volume(mountPath="/opt/esper/lib", emptyDirSize="1Mi")),
    HostileSpec("mount path that climbs", _volume(mountPath="/data/../etc/esper", emptyDirSize="1Mi")),
    HostileSpec("mount path with doubled slashes", _volume(mountPath="//etc/esper", emptyDirSize="1Mi")),
    HostileSpec("relative mount path", _volume(mountPath="etc", emptyDirSize="1Mi")),
    HostileSpec("sub path that climbs", _volume(subPath="../other-run", claimName="data")),
    HostileSpec("checkpoint path that climbs", {"checkpoint": {"storage": {"subPath": "a/../../b"}}}),
    HostileSpec("checkpoints on a system path", {"checkpoint": {"storage": {"mountPath": "/usr/lib"}}}),
    HostileSpec("variable of the operator", _env("ESPER_KEYS_DIR", "/data")),
    HostileSpec("variable of torchrun", _env("MASTER_ADDR", "elsewhere")),
    HostileSpec("variable that is none", _env("A=B")),
    HostileSpec("AppArmor off", _pod(annotations={f"{APPARMOR_ANNOTATION}tolaria": "unconfined"})),
    HostileSpec("another run's label", _pod(labels={"esper.dev/run-uid": "0"})),
    HostileSpec("another Job's label", _pod(labels={"batch.kubernetes.io/controller-uid": "0"})),
    HostileSpec("shell in the entrypoint", {"runtime": {"entrypoint": "os:system('x')"}}),
    HostileSpec("image with a blank", {"runtime": {"image": "a b"}}),
    HostileSpec("giant entrypoint", {"runtime": {"entrypoint": f"a:{HUGE}"}}),
    HostileSpec("giant variable", _env("A", HUGE)),
    HostileSpec("giant label", _pod(labels={"a": HUGE})),
    HostileSpec("giant annotation", _pod(annotations={"a": HUGE})),
    HostileSpec("giant quantity", _limit("1" * 5000)),
    HostileSpec("1025 workers", {"workers": {"count": 1025}}),
    HostileSpec("giant config", {"runtime": {"config": {"a": HUGE}}}, by_api_server=False),
    HostileSpec("the run's own keys", _volume(secretName="run-keys"), by_api_server=False),
    HostileSpec("giant label key", _pod(nodeSelector={"a" * 5000: "x"}), by_api_server=False),
    HostileSpec("quantity beyond all bounds", _limit("1e999999"), by_api_server=False),
)  # fmt: skip

Change = Callable[[JsonDict], None]


@dataclass(frozen=True)
class HostilePod:
    """A change to a pod that is well admitted, and whether the cluster's own 'restricted' standard refuses it."""

    name: str
    change: Change
    by_standard: bool = True
    """False: allowed by the standard, refused by us alone."""

    def applied(self, pod: JsonDict) -> JsonDict:
        changed = copy.deepcopy(pod)
        self.change(changed)
        return changed


def _spec(**fields: Any) -> Change:
    return lambda pod: pod["spec"].update(fields)


def _context(**fields: Any) -> Change:
    return lambda pod: pod["spec"]["securityContext"].update(fields)


def _container(**fields: Any) -> Change:
    return lambda pod: pod["spec"]["containers"][0].update(fields)


def _container_context(**fields: Any) -> Change:
    return lambda pod: pod["spec"]["containers"][0]["securityContext"].update(fields)


def _sidecar_context(**fields: Any) -> Change:
    return lambda pod: pod["spec"]["initContainers"][1]["securityContext"].update(fields)


def _without(*path: Any) -> Change:
    def change(pod: JsonDict) -> None:
        owner: Any = pod["spec"]
        for part in path[:-1]:
            owner = owner[part]
        del owner[path[-1]]

    return change


def _volume_of(**source: Any) -> Change:
    return lambda pod: pod["spec"]["volumes"].append({"name": "extra", **source})


def _both(first: Change, second: Change) -> Change:
    def change(pod: JsonDict) -> None:
        first(pod)
        second(pod)

    return change


PODS = (
    HostilePod("host network", _spec(hostNetwork=True)),
    HostilePod("host processes", _spec(hostPID=True)),
    HostilePod("host IPC", _spec(hostIPC=True)),
    HostilePod("hostPath", _volume_of(hostPath={"path": "/"})),
    HostilePod("NFS", _volume_of(nfs={"server": "a", "path": "/"})),
    HostilePod("unsafe sysctl", _context(sysctls=[{"name": "kernel.msgmax", "value": "1"}])),
    HostilePod("pod seccomp off", _context(seccompProfile={"type": "Unconfined"})),
    HostilePod("no seccomp", _without("securityContext", "seccompProfile")),
    HostilePod("pod may be root", _context(runAsNonRoot=False)),
    HostilePod("pod is root", _context(runAsUser=0)),
    HostilePod("pod SELinux type", _context(seLinuxOptions={"type": "spc_t"})),
    HostilePod("pod SELinux user", _context(seLinuxOptions={"user": "root"})),
    HostilePod("pod AppArmor off", _context(appArmorProfile={"type": "Unconfined"})),
    HostilePod("privileged", _container_context(privileged=True, allowPrivilegeEscalation=True)),
    HostilePod("escalation", _container_context(allowPrivilegeEscalation=True)),
    HostilePod("escalation unsaid", _without("containers", 0, "securityContext", "allowPrivilegeEscalation")),
    HostilePod("container is root", _container_context(runAsUser=0)),
    HostilePod("container may be root", _container_context(runAsNonRoot=False)),
    HostilePod("sidecar is root", _sidecar_context(runAsUser=0)),
    HostilePod("sidecar escalates", _sidecar_context(allowPrivilegeEscalation=True)),
    HostilePod("capability added", _container_context(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]})),
    HostilePod("capabilities kept", _container_context(capabilities={"drop": ["NET_RAW"]})),
    HostilePod("capabilities unsaid", _without("containers", 0, "securityContext", "capabilities")),
    HostilePod("container seccomp off", _container_context(seccompProfile={"type": "Unconfined"})),
    HostilePod("container AppArmor off", _container_context(appArmorProfile={"type": "Unconfined"})),
    HostilePod("no security context", _without("containers", 0, "securityContext")),
    HostilePod("host port", _container(ports=[{"containerPort": 80, "hostPort": 80}])),
    HostilePod("probe of another host", _container(livenessProbe={"httpGet": {"host": "10.0.0.1", "port": 80}})),
    HostilePod(
        "hook to another host",
        _container(lifecycle={"preStop": {"httpGet": {"host": "169.254.169.254", "port": 80, "path": "/"}}}),
    ),
    HostilePod(
        "AppArmor annotation",
        lambda pod: pod["metadata"]["annotations"].update({f"{APPARMOR_ANNOTATION}tolaria": "unconfined"}),
    ),
    HostilePod("service account", _spec(serviceAccountName="admin"), by_standard=False),
    HostilePod("token", _spec(automountServiceAccountToken=True), by_standard=False),
    HostilePod(
        "projected token",
        _both(
            _spec(serviceAccountName="default"),
            _volume_of(projected={"sources": [{"serviceAccountToken": {"path": "token"}}]}),
        ),
        by_standard=False,
    ),
)

HARMLESS = (
    HostilePod("as built", lambda _: None),
    HostilePod("allowed capability", _container_context(capabilities={"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]})),
    HostilePod("safe sysctl", _context(sysctls=[{"name": "net.ipv4.tcp_syncookies", "value": "1"}])),
    HostilePod("localhost seccomp", _context(seccompProfile={"type": "Localhost", "localhostProfile": "a"})),
    HostilePod("container SELinux", _context(seLinuxOptions={"type": "container_t", "level": "s0:c1"})),
    HostilePod("ephemeral volume", _volume_of(emptyDir={})),
    HostilePod("downward volume", _volume_of(downwardAPI={"items": []})),
)
