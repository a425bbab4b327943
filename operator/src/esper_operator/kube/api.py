"""The little of the Kubernetes API that the operator uses, as a protocol: nine calls over raw dicts.

`kube.client.RestApi` is the real one, `testing.fakeapi.FakeApi` the one for tests. Bodies stay raw dicts: the models
of client libraries drop or refuse fields that they do not know. All calls raise `kube.errors.KubeError`.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from esper_leyline.labels import GROUP, KIND, PLURAL, VERSION

from esper_operator.kube.errors import NotLeader

Object = dict[str, Any]
"""A Kubernetes object as JSON."""


@dataclass(frozen=True, slots=True)
class Resource:
    group: str
    """Empty for the core group."""
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        scope = f"/namespaces/{namespace}" if namespace else ""
        tail = "".join(f"/{part}" for part in (name, subresource) if part)
        return f"{root}{scope}/{self.plural}{tail}"


RUNS = Resource(GROUP, VERSION, PLURAL, KIND)
PODS = Resource("", "v1", "pods", "Pod")
SERVICES = Resource("", "v1", "services", "Service")
SECRETS = Resource("", "v1", "secrets", "Secret")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")
CLAIMS = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
JOBS = Resource("batch", "v1", "jobs", "Job")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
EVENTS = Resource("events.k8s.io", "v1", "events", "Event")
RESOURCES = (RUNS, PODS, SERVICES, SECRETS, CONFIG_MAPS, CLAIMS, JOBS, LEASES, EVENTS)

_BY_KIND = {(resource.api_version, resource.kind): resource for resource in RESOURCES}


def resource_of(manifest: Object) -> Resource:
    """The resource of a manifest that the operator may write."""
    return _BY_KIND[manifest["apiVersion"], manifest["kind"]]


@dataclass(frozen=True, slots=True)
class Page:
    items: list[Object]
    resource_version: str
    next_token: str
    """Empty on the last page."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    type: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    object: Object


class KubeApi(Protocol):
    async def get(self, resource: Resource, name: str, *, namespace: str) -> Object: ...

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
        """One page; namespace None means all. `Gone` when `token` is too old."""
        ...

    def watch(
        self,
        resource: Resource,
        *,
        namespace: str | None,
        resource_version: str,
        selector: str = "",
        field_selector: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """Events after that version, bookmarks too, until the server ends the stream. `Gone` when it is too old."""
        ...

    async def create(self, resource: Resource, manifest: Object) -> Object: ...

    async def apply(self, resource: Resource, manifest: Object) -> Object:
        """Server-side apply under our field manager, force."""
        ...

    async def apply_status(self, resource: Resource, manifest: Object) -> Object:
        """The same on the status subresource. `metadata.resourceVersion` in the manifest is a precondition."""
        ...

    async def patch(self, resource: Resource, name: str, *, namespace: str, body: Object) -> Object:
        """Merge patch. `metadata.resourceVersion` in the body is a precondition."""
        ...

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
        """Only the object with that UID (`Conflict` otherwise). Foreground: it stays until its dependents are gone.

        Returns the object when it lingers, None when it is gone.
        """
        ...


class FencedApi:
    """Passes reads on, and writes only while `allowed()`: a leader that lost its Lease sends nothing more."""

    def __init__(self, api: KubeApi, allowed: Callable[[], bool]) -> None:
        self._api = api
        self._allowed = allowed
        self.get = api.get
        self.list = api.list
        self.watch = api.watch

    def _check(self) -> None:
        if not self._allowed():
            raise NotLeader("the Lease is not held: not sent")

    async def create(self, resource: Resource, manifest: Object) -> Object:
        self._check()
        return await self._api.create(resource, manifest)

    async def apply(self, resource: Resource, manifest: Object) -> Object:
        self._check()
        return await self._api.apply(resource, manifest)

    async def apply_status(self, resource: Resource, manifest: Object) -> Object:
        self._check()
        return await self._api.apply_status(resource, manifest)

    async def patch(self, resource: Resource, name: str, *, namespace: str, body: Object) -> Object:
        self._check()
        return await self._api.patch(resource, name, namespace=namespace, body=body)

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
        self._check()
        return await self._api.delete(
            resource, name, namespace=namespace, uid=uid, grace_seconds=grace_seconds, foreground=foreground
        )


def older(version: str, than: str) -> bool:
    """Whether a resource version was given before another one of the same kind. Where they are no numbers the one that
    came last counts, so none is older."""
    return version.isdigit() and than.isdigit() and int(version) < int(than)


def controller_uid(item: Object) -> str:
    """UID of the object's controlling owner; empty when it has none."""
    owners = item.get("metadata", {}).get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")
