"""A KubeApi between the operator and its server that refuses, loses answers, and garbles watches, by plan."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from esper_operator.kube.api import KubeApi, Page, Resource, WatchEvent
from esper_operator.kube.errors import KubeError

from tests.support.wrappedapi import WrappedApi


@dataclass(frozen=True)
class Fault:
    """What becomes of one request. `after`: it took effect, and only its answer was lost."""

    error: Callable[[], KubeError]
    after: bool = False


class FaultyApi(WrappedApi):
    """Requests from number `first` to `last` meet the fault; lists and watches count too."""

    def __init__(self, api: KubeApi, fault: Fault | None = None, *, first: int = 0, last: int = 0) -> None:
        super().__init__(api)
        self._fault = fault
        self._first, self._last = first, last
        self.count = 0
        self.hit: list[str] = []

    def _due(self, name: str) -> Fault | None:
        self.count += 1
        if self._fault is None or not self._first <= self.count <= self._last:
            return None
        self.hit.append(name)
        return self._fault

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        fault = self._due(name)
        if fault is not None and not fault.after:
            raise fault.error()
        answer = await getattr(self._api, name)(*args, **kwargs)
        if fault is not None:
            raise fault.error()
        return answer

    async def list(self, resource: Resource, **options: Any) -> Page:
        return await self._call("list", resource, **options)

    async def watch(self, resource: Resource, **options: Any) -> AsyncIterator[WatchEvent]:
        fault = self._due("watch")
        if fault is not None and not fault.after:
            raise fault.error()
        async for event in self._api.watch(resource, **options):
            yield event
            if fault is not None:
                raise fault.error()


class GarblingApi(FaultyApi):
    """Watches that come late, say things twice, and mix up the order of different objects; never that of one."""

    def __init__(self, api: KubeApi, seed: int, *, delay_s: float = 1.5) -> None:
        super().__init__(api)
        self._random = Random(seed)
        self._delay_s = delay_s

    async def watch(self, resource: Resource, **options: Any) -> AsyncIterator[WatchEvent]:
        waiting: asyncio.Queue[WatchEvent | KubeError | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read(resource, options, waiting))
        try:
            while True:
                batch = [await waiting.get()]
                await asyncio.sleep(self._random.uniform(0, self._delay_s))
                while not waiting.empty():
                    batch.append(waiting.get_nowait())
                for item in self._garbled(batch):
                    if item is None:
                        return
                    if isinstance(item, KubeError):
                        raise item
                    yield item
        finally:
            reader.cancel()

    async def _read(
        self, resource: Resource, options: Any, into: "asyncio.Queue[WatchEvent | KubeError | None]"
    ) -> None:
        try:
            async for event in self._api.watch(resource, **options):
                into.put_nowait(event)
        except KubeError as error:
            into.put_nowait(error)
        into.put_nowait(None)

    def _garbled(self, batch: list[Any]) -> list[Any]:
        events = [item for item in batch if isinstance(item, WatchEvent)]
        ends = [item for item in batch if not isinstance(item, WatchEvent)]
        by_object: dict[str, list[WatchEvent]] = {}
        for event in events:
            by_object.setdefault(event.object["metadata"].get("name", ""), []).append(event)
        mixed: list[Any] = []
        queues = list(by_object.values())
        while queues:
            queue = self._random.choice(queues)
            event = queue.pop(0)
            mixed += [event] * self._random.choice((1, 1, 2))
            queues = [queue for queue in queues if queue]
        return mixed + ends
