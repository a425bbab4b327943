"""The API server that the operator's signal sender sees on a laptop: ConfigMaps are files, pods need no touch."""

from collections.abc import Callable
from typing import Any

from esper_operator.kube.api import CONFIG_MAPS, Resource
from esper_operator.kube.errors import Conflict, NotFound

from esper_runtime.local.objects import Objects

Object = dict[str, Any]


class LocalApi:
    """`get` and `patch`, which is all that `esper_operator.signals` uses."""

    def __init__(self, objects: Objects, *, changed: Callable[[], None]) -> None:
        self._objects = objects
        self._changed = changed

    async def get(self, resource: Resource, name: str, *, namespace: str) -> Object:
        del namespace
        found = self._objects.get(resource.kind, name)
        if found is None:
            raise NotFound(f"{resource.kind} {name} does not exist")
        return found

    async def patch(self, resource: Resource, name: str, *, namespace: str, body: Object) -> Object:
        if resource is not CONFIG_MAPS:
            return body  # the touch of a pod makes a kubelet look at its mounts; here they are written at once
        found = await self.get(resource, name, namespace=namespace)
        expected, version = body["metadata"].get("resourceVersion"), found["metadata"]["resourceVersion"]
        if expected is not None and expected != version:
            raise Conflict(f"{resource.kind} {name} has version {version}, not {expected}")
        stored = self._objects.put(merge(found, body))
        self._changed()
        return stored


def merge(base: Object, change: Object) -> Object:
    """RFC 7386 without deletions."""
    result = dict(base)
    for key, value in change.items():
        known = result.get(key)
        result[key] = merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result
