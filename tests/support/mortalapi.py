"""A KubeApi that dies at a chosen request, before or after it took effect: the operator is killed there."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from esper_operator.kube.api import KubeApi, Object, Page, Resource, WatchEvent


class Killed(BaseException):
    """The process is gone; nothing may catch this and go on."""


class MortalApi:
    """Counts get, create, apply, apply_status, patch and delete; the stream of runs and lists never kills."""

    def __init__(self, api: KubeApi, *, dies_at: int | None = None, after: bool = False) -> None:
        self._api = api
        self._dies_at = dies_at
        self._after = after
        self.count = 0
        self.died = asyncio.Event()

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.died.is_set():
            raise Killed
        self.count += 1
        fatal = self.count == self._dies_at
        if fatal and not self._after:
            self.died.set()
            raise Killed
        try:
            return await getattr(self._api, name)(*args, **kwargs)
        finally:
            if fatal:
                self.died.set()
                raise Killed

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
