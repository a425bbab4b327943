"""An API server in memory that speaks the operator's `KubeApi`: for unit tests and for faults at every request.

What it has of the real one: resource versions, generations, server-side apply that removes what we no longer name,
merge patch, preconditions, watches with replay, bookmarks and 410, owner references with background and foreground
deletion, graceful deletion of pods, status as a subresource. What it has not: schemas, defaults, admission.
`before` and `after` see every request of the operator and may raise; `add`, `edit` and `remove` are the rest of the
world and pass them by.
"""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from esper_operator.kube.api import PODS, Object, Page, Resource, WatchEvent, resource_of
from esper_operator.kube.errors import AlreadyExists, Conflict, Gone, KubeError, NotFound

FOREGROUND = "foregroundDeletion"
WRITES = frozenset({"create", "apply", "apply_status", "patch", "delete"})

Objects = list[Object]

Key = tuple[str, str, str]
"""(plural, namespace, name)"""


@dataclass(frozen=True, slots=True)
class Request:
    verb: str
    kind: str
    namespace: str
    name: str
    body: Object | None = None

    @property
    def writes(self) -> bool:
        return self.verb in WRITES

    def __str__(self) -> str:
        return f"{self.verb} {self.kind} {self.namespace}/{self.name}"


class FakeApi:
    def __init__(self, *, now: Callable[[], datetime] = lambda: datetime.now(UTC), graceful_pods: bool = False) -> None:
        """With `graceful_pods` a deleted pod stays, marked, until `remove` ends it."""
        self._now = now
        self._graceful_pods = graceful_pods
        self._objects: dict[Key, Object] = {}
        self._applied: dict[tuple[Key, str], Object] = {}
        self._version = 0
        self._uids = 0
        self._log: list[tuple[int, str, Key, Object]] = []
        self._oldest = 0
        self._epoch = 0
        self._grown = asyncio.Event()
        self.requests: list[Request] = []
        self.before: Callable[[Request], None] = lambda _: None
        self.after: Callable[[Request], None] = lambda _: None

    # --- the operator's nine calls ---

    async def get(self, resource: Resource, name: str, *, namespace: str) -> Object:
        with self._request(Request("get", resource.kind, namespace, name)):
            return copy.deepcopy(self._found((resource.plural, namespace, name)))

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
        with self._request(Request("list", resource.kind, namespace or "", "")):
            start, version = (int(part) for part in token.split("@")) if token else (0, self._version)
            if version < self._oldest:
                raise Gone("the provided continue parameter is too old", code=410)
            matching = [
                item
                for key, item in sorted(self._objects.items())
                if _selected(resource, namespace, selector, field_selector, key, item)
            ]
            items = copy.deepcopy(matching[start : start + limit])
            if metadata_only:
                items = [{"metadata": item["metadata"]} for item in items]
            more = start + limit < len(matching)
            return Page(items, str(version), f"{start + limit}@{version}" if more else "")

    async def watch(
        self,
        resource: Resource,
        *,
        namespace: str | None,
        resource_version: str,
        selector: str = "",
        field_selector: str = "",
    ) -> AsyncIterator[WatchEvent]:
        with self._request(Request("watch", resource.kind, namespace or "", "")):
            position, epoch = int(resource_version), self._epoch
        while epoch == self._epoch:
            if position < self._oldest:
                raise Gone("too old resource version", code=410)
            grown = self._grown
            for version, event_type, key, item in self._since(position):
                position = version
                if _selected(resource, namespace, selector, field_selector, key, item):
                    yield WatchEvent(event_type, copy.deepcopy(item))
            if position == self._version:
                await grown.wait()

    async def create(self, resource: Resource, manifest: Object) -> Object:
        metadata = manifest["metadata"]
        with self._request(Request("create", resource.kind, metadata["namespace"], metadata["name"], manifest)):
            return copy.deepcopy(self.add(manifest))

    async def apply(self, resource: Resource, manifest: Object) -> Object:
        return self._apply("apply", resource, manifest)

    async def apply_status(self, resource: Resource, manifest: Object) -> Object:
        return self._apply("apply_status", resource, manifest)

    async def patch(self, resource: Resource, name: str, *, namespace: str, body: Object) -> Object:
        with self._request(Request("patch", resource.kind, namespace, name, body)):
            key = (resource.plural, namespace, name)
            live = self._found(key)
            _check_version(live, body)
            changed = copy.deepcopy(live)
            _merge(changed, {k: v for k, v in body.items()}, delete_nulls=True)
            return copy.deepcopy(self._store(key, changed))

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
        body = {"uid": uid, "graceSeconds": grace_seconds, "foreground": foreground}
        with self._request(Request("delete", resource.kind, namespace, name, body)):
            key = (resource.plural, namespace, name)
            if self._found(key)["metadata"]["uid"] != uid:
                raise Conflict("the UID in the precondition does not match", code=409)
            self._delete(key, grace_seconds=grace_seconds, foreground=foreground)
            return copy.deepcopy(self._objects.get(key))

    # --- the rest of the world ---

    def add(self, manifest: Object) -> Object:
        """Creates an object; AlreadyExists as from the server."""
        resource, metadata = resource_of(manifest), manifest["metadata"]
        key = (resource.plural, metadata["namespace"], metadata["name"])
        if key in self._objects:
            raise AlreadyExists(f"{resource.plural} {metadata['name']!r} already exists", code=409)
        self._uids += 1
        item = copy.deepcopy(manifest)
        item["metadata"] = {
            **item["metadata"],
            "uid": f"00000000-0000-4000-8000-{self._uids:012d}",
            "creationTimestamp": self._now().strftime("%Y-%m-%dT%H:%M:%SZ"),
            "generation": 1,
        }
        return self._store(key, item)

    def edit(self, resource: Resource, namespace: str, name: str, change: Callable[[Object], None]) -> Object:
        """Lets somebody else change an object in place."""
        key = (resource.plural, namespace, name)
        item = copy.deepcopy(self._found(key))
        change(item)
        return self._store(key, item)

    def remove(self, resource: Resource, namespace: str, name: str, *, at_once: bool = True) -> None:
        """Lets somebody else delete it: at once, or gracefully like `kubectl delete`."""
        key = (resource.plural, namespace, name)
        self._found(key)
        if at_once:
            self._erase(key)
        else:
            self._delete(key, grace_seconds=None, foreground=False)

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        found = self._objects.get((resource.plural, namespace, name))
        return copy.deepcopy(found) if found is not None else None

    def all(self, resource: Resource) -> Objects:
        return [copy.deepcopy(item) for key, item in sorted(self._objects.items()) if key[0] == resource.plural]

    def forget_history(self) -> None:
        """Makes all versions so far too old: running watches end with 410."""
        self._oldest = self._version
        self._log.clear()
        self._version += 1
        self._oldest = self._version
        self._notify()

    def break_watches(self) -> None:
        """Ends all streams, as a server does that restarts."""
        self._epoch += 1
        self._notify()

    @property
    def writes(self) -> tuple[Request, ...]:
        return tuple(request for request in self.requests if request.writes)

    # --- inside ---

    def _request(self, request: Request) -> "_Guard":
        self.requests.append(request)
        return _Guard(self, request)

    def _found(self, key: Key) -> Object:
        item = self._objects.get(key)
        if item is None:
            raise NotFound(f"{key[0]} {key[2]!r} not found", code=404)
        return item

    def _apply(self, verb: str, resource: Resource, manifest: Object) -> Object:
        metadata = manifest["metadata"]
        key = (resource.plural, metadata["namespace"], metadata["name"])
        with self._request(Request(verb, resource.kind, key[1], key[2], manifest)):
            live = self._objects.get(key)
            if live is None and (verb == "apply_status" or "uid" in metadata or "resourceVersion" in metadata):
                raise NotFound(f"{key[0]} {key[2]!r} not found", code=404)
            if live is None:
                self._applied[key, verb] = copy.deepcopy(manifest)
                return copy.deepcopy(self.add(manifest))
            _check_version(live, manifest)
            if metadata.get("uid", live["metadata"]["uid"]) != live["metadata"]["uid"]:
                raise Conflict("the UID does not match", code=409)
            changed = copy.deepcopy(live)
            desired = {"status": manifest["status"]} if verb == "apply_status" else _own_part(manifest)
            _unset(changed, _own_part(self._applied.get((key, verb), {})), desired)
            _merge(changed, desired, delete_nulls=False)
            self._applied[key, verb] = copy.deepcopy(desired)
            return copy.deepcopy(self._store(key, changed))

    def _store(self, key: Key, item: Object) -> Object:
        known = self._objects.get(key)
        if known is not None and _same(known, item):
            return known
        if known is not None and known.get("spec") != item.get("spec"):
            item["metadata"]["generation"] = known["metadata"].get("generation", 1) + 1
        self._objects[key] = item
        self._publish("MODIFIED" if known is not None else "ADDED", key, item)
        return item

    def _publish(self, event_type: str, key: Key, item: Object) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._log.append((self._version, event_type, key, copy.deepcopy(item)))
        self._notify()

    def _notify(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    def _since(self, position: int) -> Iterator[tuple[int, str, Key, Object]]:
        return (entry for entry in list(self._log) if entry[0] > position)

    def _delete(self, key: Key, *, grace_seconds: int | None, foreground: bool) -> None:
        item = self._objects[key]
        lingers = (key[0] == PODS.plural and self._graceful_pods and grace_seconds != 0) or (
            foreground and any(self._dependents(item))
        )
        if not lingers:
            self._erase(key)
            return
        marked = copy.deepcopy(item)
        marked["metadata"].setdefault("deletionTimestamp", self._now().strftime("%Y-%m-%dT%H:%M:%SZ"))
        if foreground:
            marked["metadata"]["finalizers"] = [FOREGROUND]
        self._store(key, marked)
        if foreground:
            for dependent in list(self._dependents(item)):
                if "deletionTimestamp" not in self._objects[dependent]["metadata"]:
                    self._delete(dependent, grace_seconds=None, foreground=False)

    def _erase(self, key: Key) -> None:
        item = self._objects.pop(key)
        for verb in ("apply", "apply_status"):
            self._applied.pop((key, verb), None)
        self._publish("DELETED", key, item)
        for dependent in list(self._dependents(item)):
            if dependent in self._objects and "deletionTimestamp" not in self._objects[dependent]["metadata"]:
                self._delete(dependent, grace_seconds=None, foreground=False)
        for waiting, candidate in list(self._objects.items()):
            finalizers = candidate["metadata"].get("finalizers") or ()
            if FOREGROUND in finalizers and not any(self._dependents(candidate)):
                self._erase(waiting)

    def _dependents(self, owner: Object) -> Iterator[Key]:
        uid = owner["metadata"]["uid"]
        for key, item in self._objects.items():
            if any(ref.get("uid") == uid for ref in item["metadata"].get("ownerReferences") or ()):
                yield key


class _Guard:
    """Runs the hooks around one request."""

    def __init__(self, api: FakeApi, request: Request) -> None:
        self._api = api
        self._request = request

    def __enter__(self) -> None:
        self._api.before(self._request)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, KubeError):
            self._api.after(self._request)


def _selected(
    resource: Resource, namespace: str | None, selector: str, field_selector: str, key: Key, item: Object
) -> bool:
    if key[0] != resource.plural or namespace not in (None, key[1]):
        return False
    labels = item["metadata"].get("labels") or {}
    if selector and selector not in labels:
        return False
    return not field_selector or field_selector == f"metadata.name={key[2]}"


def _check_version(live: Object, body: Object) -> None:
    wanted = (body.get("metadata") or {}).get("resourceVersion")
    if wanted is not None and wanted != live["metadata"]["resourceVersion"]:
        raise Conflict("the object has been modified; please apply your changes to the latest version", code=409)


def _own_part(manifest: Object) -> Object:
    own = {name: value for name, value in manifest.items() if name != "status" or "metadata" not in manifest}
    metadata = {
        name: value
        for name, value in (manifest.get("metadata") or {}).items()
        if name in ("labels", "annotations", "ownerReferences", "finalizers")
    }
    return {**own, "metadata": metadata} if "metadata" in own else own


def _same(known: Object, item: Object) -> bool:
    return _without_version(known) == _without_version(item)


def _without_version(item: Object) -> Object:
    metadata = {name: value for name, value in item["metadata"].items() if name != "resourceVersion"}
    return {**item, "metadata": metadata}


def _merge(target: dict[str, Any], source: dict[str, Any], *, delete_nulls: bool) -> None:
    """Into `target`, map by map; lists are replaced. `metadata.resourceVersion` is only a precondition."""
    for name, value in source.items():
        if name == "resourceVersion":
            continue
        if value is None and delete_nulls:
            target.pop(name, None)
        elif isinstance(value, dict):
            nested = target.get(name)
            if not isinstance(nested, dict):
                nested = target[name] = {}
            _merge(nested, value, delete_nulls=delete_nulls)
        else:
            target[name] = copy.deepcopy(value)


def _unset(target: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Removes what the last apply named and this one does not."""
    for name, value in before.items():
        if name not in after:
            if isinstance(value, dict) and isinstance(target.get(name), dict):
                _unset(target[name], value, {})
                if not target[name]:
                    del target[name]
            else:
                target.pop(name, None)
        elif isinstance(value, dict) and isinstance(after[name], dict) and isinstance(target.get(name), dict):
            _unset(target[name], value, after[name])
