"""Runs on a cluster, through the `kubernetes` package and the user's kubeconfig."""

import contextlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from esper_leyline import labels
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from esper_runtime.cli.backend import BackendError, NoCluster, NotFound, Resource
from esper_runtime.cli.output import find

REQUEST_TIMEOUT_S = 15
WATCH_TIMEOUT_S = 240
REPEAT_S = 1.0
PAGE = 200
"""Runs per request; one is some 10 KB."""
MERGE_PATCH = "application/merge-patch+json"
_config: Any = config
"""The package is not typed throughout."""


class ClusterBackend:
    """EsperTrainingRuns of one namespace."""

    is_local = False

    def __init__(self, api: Any, namespace: str) -> None:
        """`api` is a kubernetes.client.ApiClient."""
        self._namespace = namespace
        self._objects = client.CustomObjectsApi(api)
        self.core = client.CoreV1Api(api)
        self.batch = client.BatchV1Api(api)

    @classmethod
    def connect(cls, *, namespace: str | None, context: str | None, kubeconfig: Path | None) -> "ClusterBackend":
        """By kubeconfig, or inside a pod by its service account."""
        path = None if kubeconfig is None else str(kubeconfig)
        configuration = client.Configuration()
        try:
            _config.load_kube_config(path, context=context, client_configuration=configuration)
            _, active = _config.list_kube_config_contexts(path)
        except ConfigException as error:
            return cls._in_cluster(namespace, str(error))
        except (yaml.YAMLError, TypeError, KeyError, AttributeError, OSError) as error:
            # What the package makes of a file that is no kubeconfig.
            where = path or os.environ.get("KUBECONFIG", "~/.kube/config")
            problem = " ".join(str(error).split())
            raise BackendError(f"kubeconfig {where}: cannot be read ({problem}): give another one") from error
        if context is not None:
            contexts, _ = _config.list_kube_config_contexts(path)
            active = next(c for c in contexts if c["name"] == context)
        chosen = namespace or find(active, "context", "namespace") or "default"
        return cls(client.ApiClient(configuration), chosen)

    @classmethod
    def _in_cluster(cls, namespace: str | None, problem: str) -> "ClusterBackend":
        configuration = client.Configuration()
        try:
            _config.load_incluster_config(client_configuration=configuration)
        except ConfigException:
            raise NoCluster(problem) from None
        own = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
        return cls(client.ApiClient(configuration), namespace or own.read_text().strip())

    @property
    def namespace(self) -> str:
        return self._namespace

    def runs(self, *, all_namespaces: bool, selector: str = "") -> list[Resource]:
        objects = self._objects
        listing = objects.list_cluster_custom_object if all_namespaces else objects.list_namespaced_custom_object
        where = _group() | ({} if all_namespaces else {"namespace": self._namespace})
        if selector:
            where["label_selector"] = selector
        found: list[Resource] = []
        token = ""
        while True:
            more = {"_continue": token} if token else {}
            answer = self.call(listing, limit=PAGE, _preload_content=False, **where, **more)
            page = json.loads(answer.data)
            found += page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return found

    def get(self, name: str) -> Resource:
        found = self.call(
            self._objects.get_namespaced_custom_object, namespace=self._namespace, name=name, what=name, **_group()
        )
        return dict(found)

    def watch(self, name: str) -> Iterator[Resource]:
        resource = self.get(name)
        while True:
            yield resource
            version = find(resource, "metadata", "resourceVersion")
            with _Stream(self._open_watch(name, version)) as events:
                for event in events:
                    if event is None:
                        yield resource
                    elif event["type"] == "DELETED":
                        return
                    elif event["type"] == "ERROR":
                        break
                    else:
                        resource = event["object"]
                        yield resource
            try:
                resource = self.get(name)
            except NotFound:
                return

    def patch_spec(self, name: str, changes: dict[str, Any]) -> Resource:
        found = self.call(
            self._objects.patch_namespaced_custom_object,
            namespace=self._namespace,
            name=name,
            body={"spec": changes},
            field_manager="esper-cli",
            _content_type=MERGE_PATCH,
            what=name,
            **_group(),
        )
        return dict(found)

    def logs(self, name: str, *, container: str, follow: bool, tail: int | None) -> Iterator[bytes]:
        pod = self._newest_pod(name)
        response = self.call(
            self.core.read_namespaced_pod_log,
            name=pod,
            namespace=self._namespace,
            container=container,
            follow=follow,
            tail_lines=tail,
            _preload_content=False,
            _request_timeout=(REQUEST_TIMEOUT_S, None) if follow else REQUEST_TIMEOUT_S,
            what=f"{pod}, container {container}",
        )
        with contextlib.closing(response):
            yield from response.stream(65536)

    def fetch(self, name: str, destination: Path, *, image: str | None) -> list[Path]:
        from esper_runtime.cli.fetch import fetch_from_cluster

        return fetch_from_cluster(self, self.get(name), destination, image=image)

    def call(self, method: Callable[..., Any], *, what: str = "", **arguments: Any) -> Any:
        """One request; errors become messages for people."""
        arguments.setdefault("_request_timeout", REQUEST_TIMEOUT_S)
        try:
            return method(**arguments)
        except ApiException as error:
            raise _refusal(error, what, self._namespace) from error
        except (HTTPError, OSError) as error:
            raise BackendError(f"the cluster cannot be reached: {_reason(error)}") from error

    def _newest_pod(self, name: str) -> str:
        found = self.call(
            self.core.list_namespaced_pod,
            namespace=self._namespace,
            label_selector=f"{labels.RUN}={name},{labels.ATTEMPT}",
            _preload_content=False,
        )
        pods = json.loads(found.data)["items"]
        if not pods:
            self.get(name)  # says so when there is no such run at all
            raise BackendError(f"{name}: has no pods now; see `esper status {name}`")
        return str(max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])["metadata"]["name"])

    def _open_watch(self, name: str, version: str | None) -> Any:
        return self.call(
            self._objects.list_namespaced_custom_object,
            namespace=self._namespace,
            field_selector=f"metadata.name={name}",
            resource_version=version,
            watch=True,
            timeout_seconds=WATCH_TIMEOUT_S,
            _preload_content=False,
            _request_timeout=(REQUEST_TIMEOUT_S, WATCH_TIMEOUT_S + 30),
            **_group(),
        )


class _Stream:
    """Lines of a watch as decoded events, read by a thread; None once a second while nothing comes."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=256)
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Iterator[dict[str, Any] | None]:
        self._thread.start()
        return self._iterate()

    def __exit__(self, *_: object) -> None:
        self._response.close()

    def _iterate(self) -> Iterator[dict[str, Any] | None]:
        while True:
            try:
                event = self._events.get(timeout=REPEAT_S)
            except queue.Empty:
                yield None
                continue
            if event is None:
                return
            yield event

    def _read(self) -> None:
        pending = b""
        # A broken connection ends the stream like its regular end: the caller reads the run again. AttributeError is
        # http.client's when the response is closed beneath its own read.
        with contextlib.suppress(HTTPError, OSError, ValueError, AttributeError):
            for chunk in self._response.stream(None):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in filter(None, lines):
                    self._events.put(json.loads(line))
        self._events.put(None)


def _group() -> dict[str, str]:
    return {"group": labels.GROUP, "version": labels.VERSION, "plural": labels.PLURAL}


def _refusal(error: ApiException, what: str, namespace: str) -> BackendError:
    message = str(error.reason or "")
    with contextlib.suppress(ValueError, TypeError):
        message = json.loads(error.body or "")["message"]
    if error.status == 404 and what and "could not find the requested resource" not in message:
        return NotFound(f"{what}: not found on this machine nor in namespace {namespace} of the cluster ({message})")
    if error.status == 404:
        return BackendError(
            f"the cluster does not know {labels.KIND}: install the chart, or `esper crd | kubectl apply`"
        )
    if error.status in (401, 403):
        return BackendError(f"the cluster refuses: {message}: ask for the esper-editor role in namespace {namespace}")
    return BackendError(f"the cluster refuses ({error.status}): {message}")


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", None)
    return str(cause or error)
