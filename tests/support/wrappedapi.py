"""Something between the operator and a KubeApi that sees every request."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from esper_operator.kube.api import KubeApi, Object, Page, Resource, WatchEvent


class WrappedApi(ABC):
    """Lists and watches pass; all else goes through `_call`."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api

    @abstractmethod
    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Makes the request of that name, or does something else."""

    async def get(self, resource: Resource, name: str, *, namespace: str) -> Object:
        return await self._call("get", resource, name, namespace=namespace)

    async def create(self, resource: Resource, manifest: Object) -> Object:
        return await self._call("create", resource, manifest)

    async def apply(self, resource: Resource, manifest: Object) -> Object:
        return await self._call("apply", resource, manifest)

    async def apply_status(self, resource: Resource, manifest: Object) -> Object:
        return await self._call("apply_status", resource, manifest)

    async def patch(self, resource: Resource, name: str, *, namespace: str, body: Object) -> Object:
        return await self._call("patch", resource, name, namespace=namespace, body=body)

    async def delete(self, resource: Resource, name: str, **options: Any) -> Object | None:
        return await self._call("delete", resource, name, **options)

    async def list(self, resource: Resource, **options: Any) -> Page:
        return await self._api.list(resource, **options)

    def watch(self, resource: Resource, **options: Any) -> AsyncIterator[WatchEvent]:
        return self._api.watch(resource, **options)
