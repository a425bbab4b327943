"""How `esper bus` reaches Redis: by a URL, by the socket of a running `esper run`, or through a port of a cluster's
Valkey."""

import base64
import binascii
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_leyline.labels import COMPONENT
from esper_leyline.oona import OonaConfig, OonaConfigError
from esper_leyline.oona.acl import OPERATOR

from esper_runtime.cli.backend import BackendError, NoCluster
from esper_runtime.local.state import DEFAULT_ROOT, StateDir, find_runs

PORT = 6379
TIMEOUT_S = 5.0
LOCAL_SOCKET = "redis.sock"
_CHUNK = 65536

Connect = Callable[[], socket.socket]
"""A new connection to the far port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """The options that say where Redis is."""

    url: str | None = None
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    state: Path | None = None
    local: bool | None = None
    namespace: str = "esper-system"
    """Of the operator."""
    context: str | None = None
    kubeconfig: Path | None = None


@contextlib.contextmanager
def reached(reach: Reach) -> Iterator[OonaConfig]:
    """A way to Redis for as long as the context lasts. BackendError says what is missing."""
    if reach.url is not None:
        yield _direct(reach, reach.url)
        return
    if reach.username or reach.password_file or reach.ca:
        raise BackendError("--username, --password-file and --ca belong to --url: give that too")
    here = None if reach.local is False else _local(reach)
    if here is not None:
        yield OonaConfig(url=f"unix://{here}", timeout_s=TIMEOUT_S)
        return
    with _cluster(reach) as config:
        yield config


def _direct(reach: Reach, url: str) -> OonaConfig:
    try:
        return OonaConfig(
            url=url,
            username=reach.username or "",
            password=_text(reach.password_file),
            ca=_text(reach.ca),
            timeout_s=TIMEOUT_S,
        )
    except OonaConfigError as error:
        raise BackendError(str(error)) from error


def _text(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BackendError(f"{path}: cannot be read: {error}") from error


# On this machine


def _local(reach: Reach) -> Path | None:
    """The socket of the run in --state, or of the only run that is driven here now. None: look on the cluster."""
    if reach.state is not None:
        found = _socket(StateDir(reach.state))
        if found is None:
            raise BackendError(f"{reach.state}: no `esper run` with Redis drives a run there now")
        return found
    if reach.local is None and (reach.context or reach.kubeconfig):
        return None
    living = [(state, path) for state in find_runs(DEFAULT_ROOT) if (path := _socket(state)) is not None]
    if len(living) > 1:
        raise BackendError(f"{len(living)} runs are driven here, each with its Redis: choose one with --state")
    if not living and reach.local:
        raise BackendError(f"no `esper run` with Redis drives a run below {DEFAULT_ROOT} now")
    return living[0][1] if living else None


def _socket(state: StateDir) -> Path | None:
    if state.runner_pid() is None:
        return None
    sockets = (directory / LOCAL_SOCKET for directory in state.scratch())
    return next((path for path in sockets if path.exists()), None)


# On a cluster


@contextlib.contextmanager
def _cluster(reach: Reach) -> Iterator[OonaConfig]:
    from esper_runtime.cli.cluster_backend import ClusterBackend

    try:
        backend = ClusterBackend.connect(namespace=reach.namespace, context=reach.context, kubeconfig=reach.kubeconfig)
    except NoCluster as error:
        raise BackendError(
            f"no `esper run` with Redis here, and no cluster to ask ({' '.join(str(error).split())}): give --url, "
            "--state or --kubeconfig"
        ) from None
    pod = _valkey(backend, reach.namespace)
    secrets = {v.name: v.secret.secret_name for v in pod.spec.volumes if v.secret is not None}
    auth = _secret(backend, reach.namespace, secrets.get("auth", ""))
    tls = _secret(backend, reach.namespace, secrets["tls"]) if "tls" in secrets else {}
    with forwarded(_port_of(backend, pod)) as port:
        yield OonaConfig(
            url=f"{'rediss' if tls else 'redis'}://localhost:{port}/0",
            username=OPERATOR,
            password=auth.get("password", ""),
            ca=tls.get("ca.crt", ""),
            timeout_s=TIMEOUT_S,
        )


def _valkey(backend: Any, namespace: str) -> Any:
    selector = f"app.kubernetes.io/part-of=esper,{COMPONENT}=valkey"
    found = backend.call(backend.core.list_namespaced_pod, namespace=namespace, label_selector=selector).items
    running = [pod for pod in found if pod.status.phase == "Running"]
    if not running:
        raise BackendError(
            f"no Valkey of Esper runs in namespace {namespace}: give the operator's namespace with -n, or --url for a "
            "Redis of your own"
        )
    return running[0]


def _secret(backend: Any, namespace: str, name: str) -> dict[str, str]:
    found = backend.call(backend.core.read_namespaced_secret, name=name, namespace=namespace, what=f"Secret {name}")
    try:
        return {key: base64.b64decode(value).decode().strip() for key, value in (found.data or {}).items()}
    except (binascii.Error, UnicodeDecodeError) as error:
        raise BackendError(f"Secret {name}: holds what is no text: {error}") from error


def _port_of(backend: Any, pod: Any) -> Connect:
    from kubernetes.stream import portforward

    def connect() -> socket.socket:
        opened = backend.call(
            portforward,
            api_method=backend.core.connect_get_namespaced_pod_portforward,
            name=pod.metadata.name,
            namespace=pod.metadata.namespace,
            ports=str(PORT),
        )
        found: socket.socket = opened.socket(PORT)
        return found

    return connect


# Forwarding


@contextlib.contextmanager
def forwarded(connect: Connect) -> Iterator[int]:
    """A port of this machine, each of whose connections goes on by one of `connect`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=_accept, args=(listener, connect), daemon=True)
        accepting.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()


def _accept(listener: socket.socket, connect: Connect) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return  # closed: the context has ended
        try:
            far = connect()
        except BackendError:
            near.close()  # whoever connected is told so by the end of the connection
            continue
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK):
            sink.sendall(chunk)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
