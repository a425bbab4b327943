"""The real API client: credentials, TLS and connections of the `kubernetes` package, bodies as raw JSON.

Every request has a timeout, writes have a bounded concurrency and an order, and a pause that the server asked for is
kept by all requests of this client. Not retried here: the caller knows better what a repeat means.
"""

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import aiohttp
import orjson
from esper_leyline.labels import FIELD_MANAGER
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from esper_operator.kube.api import CONFIG_MAPS, EVENTS, PODS, Object, Page, Resource, WatchEvent
from esper_operator.kube.errors import Gone, KubeError, Throttled, Transient, from_status
from esper_operator.kube.gate import Gate

READ_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 4.0
"""Below the 5 s between the renew deadline and the end of the Lease: a late write cannot outlive our leadership."""
CONNECT_TIMEOUT_S = 4.0
WATCH_SERVER_TIMEOUT_S = 300
WATCH_INACTIVITY_S = 70.0
"""The server sends a bookmark a minute and remembers events for 75 s, so a silent stream loses nothing."""
MAX_WATCH_LINE = 8 * 1024 * 1024
MAX_WRITES_IN_FLIGHT = 16
"""Enough for 800 a second where one takes 20 ms; more only makes a small API server answer none in time. As many as
there are workers: while all of them write, Events wait."""
WRITE_RANKS = {CONFIG_MAPS.kind: 0, PODS.kind: 1, EVENTS.kind: 3}
"""Which write goes first when many wait: a signal's record, then the pods' touch, then all that is not here (2), and
last the Events."""

RequestObserver = Callable[[str, str, str, float], None]
"""(verb, kind, code, seconds) of every finished request; code "error" when no answer came."""

_loaders: Any = config
"""The package is not typed throughout."""
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


@dataclass(slots=True)
class Credentials:
    """A Configuration whose token stays fresh: re-read from its file, or asked of the kubeconfig's plugin again."""

    configuration: Configuration
    _reload: Callable[[Configuration], Awaitable[None]]

    @classmethod
    async def load(cls, environ: dict[str, str] | None = None) -> "Credentials":
        """From $KUBECONFIG when set, else the pod's service account, else ~/.kube/config."""
        variables = os.environ if environ is None else environ
        in_cluster = "KUBERNETES_SERVICE_HOST" in variables and not variables.get("KUBECONFIG")

        async def reload(target: Configuration) -> None:
            if in_cluster:
                _loaders.load_incluster_config(client_configuration=target)
            else:
                path = variables.get("KUBECONFIG") or None
                await _loaders.load_kube_config(config_file=path, client_configuration=target, persist_config=False)

        configuration = Configuration()
        await reload(configuration)
        return cls(configuration, reload)

    async def header(self) -> str | None:
        """Value of the Authorization header."""
        value = await self.configuration.get_api_key_with_prefix("BearerToken")
        return str(value) if value else None

    async def renew(self) -> None:
        await self._reload(self.configuration)


@dataclass(slots=True)
class _Call:
    verb: str
    method: str
    resource: Resource
    path: str
    query: dict[str, str] = field(default_factory=dict)
    body: Object | None = None
    content_type: str = "application/json"
    accept: str = "application/json"
    timeout_s: float = READ_TIMEOUT_S


class RestApi:
    """KubeApi over HTTP. Bound to the event loop that first uses it."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        on_request: RequestObserver | None = None,
        user_agent: str = "esper-operator",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._credentials = credentials
        self._rest: Any = RESTClientObject(credentials.configuration)
        self._on_request = on_request
        self._user_agent = user_agent
        self._monotonic = monotonic
        self._writes = Gate(MAX_WRITES_IN_FLIGHT)
        self._paused_until = 0.0

    async def close(self) -> None:
        await self._rest.close()

    # --- the nine calls ---

    async def get(self, resource: Resource, name: str, *, namespace: str) -> Object:
        return await self._json(_Call("get", "GET", resource, resource.path(namespace, name)))

    async def list(
        self,
        resource: Resource,
        *,
        namespace: str | None,
        selector: str = "",
        field_selector: str = "",
        limit: int = 500,
        token: str = "",
        metadata_only: bool = False,
    ) -> Page:
        query = _selection(selector, field_selector) | {"limit": str(limit)}
        if token:
            query["continue"] = token
        call = _Call("list", "GET", resource, resource.path(namespace), query)
        if metadata_only:
            call.accept = METADATA_LIST
        body = await self._json(call)
        metadata = body.get("metadata", {})
        return Page(body.get("items") or [], metadata.get("resourceVersion", ""), metadata.get("continue", ""))

    async def watch(
        self,
        resource: Resource,
        *,
        namespace: str | None,
        resource_version: str,
        selector: str = "",
        field_selector: str = "",
    ) -> AsyncIterator[WatchEvent]:
        query = _selection(selector, field_selector) | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(WATCH_SERVER_TIMEOUT_S),
        }
        call = _Call("watch", "GET", resource, resource.path(namespace), query)
        timeout = aiohttp.ClientTimeout(
            total=WATCH_SERVER_TIMEOUT_S + 30, connect=CONNECT_TIMEOUT_S, sock_read=WATCH_INACTIVITY_S
        )
        response = await self._open(call, timeout)
        try:
            async for line in _lines(response):
                yield _watch_event(line)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Transient(f"watch of {resource.plural}: {error!r}") from error
        finally:
            response.close()

    async def create(self, resource: Resource, manifest: Object) -> Object:
        path = resource.path(manifest["metadata"]["namespace"])
        return await self._write(_Call("create", "POST", resource, path, _manager(), manifest))

    async def apply(self, resource: Resource, manifest: Object) -> Object:
        return await self._apply("apply", resource, manifest, "")

    async def apply_status(self, resource: Resource, manifest: Object) -> Object:
        return await self._apply("apply_status", resource, manifest, "status")

    async def patch(self, resource: Resource, name: str, *, namespace: str, body: Object) -> Object:
        call = _Call("patch", "PATCH", resource, resource.path(namespace, name), _manager(), body)
        call.content_type = "application/merge-patch+json"
        return await self._write(call)

    async def delete(
        self,
        resource: Resource,
        name: str,
        *,
        namespace: str,
        uid: str,
        grace_seconds: int | None = None,
        foreground: bool = False,
    ) -> Object | None:
        options: Object = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Foreground" if foreground else "Background",
        }
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        answer = await self._write(_Call("delete", "DELETE", resource, resource.path(namespace, name), {}, options))
        return answer if answer.get("kind") == resource.kind else None

    # --- one request ---

    async def _apply(self, verb: str, resource: Resource, manifest: Object, subresource: str) -> Object:
        metadata = manifest["metadata"]
        path = resource.path(metadata["namespace"], metadata["name"], subresource)
        call = _Call(verb, "PATCH", resource, path, _manager() | {"force": "true"}, manifest)
        call.content_type = "application/apply-patch+yaml"
        return await self._write(call)

    async def _write(self, call: _Call) -> Object:
        call.timeout_s = WRITE_TIMEOUT_S
        async with self._writes.place(WRITE_RANKS.get(call.resource.kind, 2)):
            return await self._json(call)

    async def _json(self, call: _Call) -> Object:
        timeout = aiohttp.ClientTimeout(total=call.timeout_s, connect=CONNECT_TIMEOUT_S)
        response = await self._open(call, timeout)
        try:
            body: Object = orjson.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Transient(f"{call.method} {call.path}: {error!r}", code=response.status) from error
        except orjson.JSONDecodeError as error:
            raise Transient(f"{call.method} {call.path}: the answer is no JSON", code=response.status) from error
        finally:
            response.release()
        return body

    async def _open(self, call: _Call, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        """The response of a request that succeeded, body unread. A rejected token is renewed once."""
        response = await self._send(call, timeout)
        if response.status == 401:
            response.release()
            await self._credentials.renew()
            response = await self._send(call, timeout)
        if response.status < 300:
            return response
        error = from_status(response.status, await _status_body(response), response.headers.get("Retry-After"))
        if isinstance(error, Throttled):
            self._paused_until = max(self._paused_until, self._monotonic() + error.retry_after_s)
        raise error

    async def _send(self, call: _Call, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        started = self._monotonic()
        if started < self._paused_until:
            raise Throttled("a pause that the API server asked for", retry_after_s=self._paused_until - started)
        headers = {"Accept": call.accept, "Content-Type": call.content_type, "User-Agent": self._user_agent}
        authorization = await self._credentials.header()
        if authorization:
            headers["Authorization"] = authorization
        url = f"{self._credentials.configuration.host}{call.path}"
        if call.query:
            url += f"?{urlencode(call.query)}"
        code = "error"
        try:
            answer = await self._rest.request(call.method, url, headers, call.body, _request_timeout=timeout)
            code = str(answer.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Transient(f"{call.method} {call.path}: {error!r}") from error
        finally:
            if self._on_request is not None:
                self._on_request(call.verb, call.resource.kind, code, self._monotonic() - started)
        response: aiohttp.ClientResponse = answer.response
        return response


def _manager() -> dict[str, str]:
    return {"fieldManager": FIELD_MANAGER}


def _selection(selector: str, field_selector: str) -> dict[str, str]:
    pairs = {"labelSelector": selector, "fieldSelector": field_selector}
    return {name: value for name, value in pairs.items() if value}


async def _status_body(response: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        body = orjson.loads(await response.read())
    except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError):
        return {}  # a proxy's page or a broken stream: the code alone must do
    finally:
        response.release()
    return body if isinstance(body, dict) else {}


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines of the stream; a last line without its end was cut off and is dropped."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line
        if len(rest) > MAX_WATCH_LINE:
            raise Transient(f"a watch event of more than {MAX_WATCH_LINE} bytes")


def _watch_event(line: bytes) -> WatchEvent:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise Transient("a watch event that is no JSON") from error
    if event["type"] == "ERROR":
        error_found: KubeError = from_status(int(event["object"].get("code", 500)), event["object"])
        raise error_found if isinstance(error_found, Gone | Throttled) else Transient(str(error_found))
    return WatchEvent(event["type"], event["object"])
