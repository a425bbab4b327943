"""A slim cache of one kind: paged list, watch with bookmarks, tombstones after a re-list.

Objects are projected to small values the moment they arrive; raw bodies are never kept. The cache wakes whoever owns
the object (the label `esper.dev/run`) and never says what changed: facts are read from here at reconcile time.
Cost: O(1) per event, O(objects) per re-list.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from esper_leyline.labels import RUN

from esper_operator.kube.api import KubeApi, Object, Resource, WatchEvent, controller_uid, older
from esper_operator.kube.errors import Gone, KubeError, Throttled, Transient
from esper_operator.model import RunKey

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIN_BACKOFF_S = 0.2
MAX_BACKOFF_S = 30.0
UNREACHABLE_BACKOFF_S = 1.0
"""At most, while the server is away: a status must follow soon after its return."""
RECONNECT_S = 0.1
"""Pause after a stream that ended well, plus jitter."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    namespace: str
    name: str
    uid: str
    version: str
    run: RunKey | None
    """From the label; the owner UID decides, not this."""
    owner_uid: str
    value: T


class Informer(Generic[T]):
    """Caches one kind in all or some namespaces. `run()` never returns; use `synced`, `of()` and `entries()`."""

    def __init__(
        self,
        api: KubeApi,
        resource: Resource,
        *,
        project: Callable[[Object], T | None],
        on_change: Callable[[RunKey | None], None],
        namespaces: Sequence[str] = (),
        selector: str = RUN,
        field_selector: str = "",
        on_event: Callable[[str, str], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`project` returns None for objects that are nobody's; `on_event` counts (kind, type), "RELIST" among them."""
        self._api = api
        self._resource = resource
        self._project = project
        self._on_change = on_change
        self._selector = selector
        self._field_selector = field_selector
        self._on_event = on_event
        self._monotonic = monotonic
        self._sleep = sleep
        self._jitter = jitter
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._entries: dict[tuple[str, str], Entry[T]] = {}
        self._by_run: dict[RunKey, dict[tuple[str, str], Entry[T]]] = {}
        self._unsynced = set(self._namespaces)
        self._heard_at = dict.fromkeys(self._namespaces, monotonic())
        self._synced = asyncio.Event()

    @property
    def kind(self) -> str:
        return self._resource.kind

    @property
    def synced(self) -> bool:
        return not self._unsynced

    async def wait_synced(self) -> None:
        await self._synced.wait()

    @property
    def silent_s(self) -> float:
        """Since the server was last heard from, by the stream that is worst off."""
        return self._monotonic() - min(self._heard_at.values())

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, run: RunKey) -> tuple[Entry[T], ...]:
        return tuple(self._by_run.get(run, {}).values())

    def entries(self) -> Iterator[Entry[T]]:
        return iter(tuple(self._entries.values()))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                group.create_task(self._reflect(namespace), name=f"{self.kind} informer {namespace or 'all'}")

    def learn(self, item: Object) -> None:
        """Takes in the answer to our own write, so that the next look is not older than it."""
        self._put(item)

    # --- one stream ---

    async def _reflect(self, namespace: str | None) -> None:
        version = ""
        failures = 0
        while True:
            try:
                if not version:
                    version = await self._relist(namespace)
                    failures = 0
                version = await self._follow(namespace, version)
                failures = 0
                await self._sleep(RECONNECT_S + self._jitter())
            except Gone:
                logger.info("%s: the watch is too old, listing again", self.kind)
                version = ""
                await self._sleep(self._jitter())
            except KubeError as error:
                failures += 1
                logger.warning("%s: %s: %s", self.kind, type(error).__name__, error)
                await self._sleep(self._backoff(failures, error))

    def _backoff(self, failures: int, error: KubeError) -> float:
        most = UNREACHABLE_BACKOFF_S if isinstance(error, Transient) and error.unreachable else MAX_BACKOFF_S
        wait = min(MIN_BACKOFF_S * 2.0 ** min(failures - 1, 20), most) * (0.5 + self._jitter())
        return max(wait, error.retry_after_s) if isinstance(error, Throttled) else wait

    async def _relist(self, namespace: str | None) -> str:
        """Replaces this stream's part of the cache by what the server has; returns the version to watch from."""
        self._count("RELIST")
        seen: set[tuple[str, str]] = set()
        token = ""
        while True:
            page = await self._api.list(
                self._resource,
                namespace=namespace,
                selector=self._selector,
                field_selector=self._field_selector,
                token=token,
            )
            self._heard(namespace)
            for item in page.items:
                seen.add(_name(item))
                self._put(item)
            token = page.next_token
            if not token:
                break
        for key in [k for k in self._entries if k not in seen and namespace in (None, k[0])]:
            self._drop(key)
        self._unsynced.discard(namespace)
        if self.synced:
            self._synced.set()
        return page.resource_version

    async def _follow(self, namespace: str | None, version: str) -> str:
        """Watches until the stream ends; returns the version to go on from. A broken stream goes on from there too."""
        stream = self._api.watch(
            self._resource,
            namespace=namespace,
            selector=self._selector,
            field_selector=self._field_selector,
            resource_version=version,
        )
        try:
            async for event in stream:
                self._heard(namespace)
                self._count(event.type)
                self._take(event)
                version = event.object["metadata"]["resourceVersion"]
        except Gone:
            raise
        except Throttled as error:
            await self._sleep(error.retry_after_s)
        except KubeError as error:
            logger.debug("%s: the watch broke: %s", self.kind, error)
            await self._sleep(self._jitter())
        return version

    # --- the cache ---

    def _take(self, event: WatchEvent) -> None:
        if event.type == "DELETED":
            key = _name(event.object)
            known = self._entries.get(key)
            if known is None or known.uid == event.object["metadata"].get("uid", ""):
                self._drop(key)
        elif event.type in ("ADDED", "MODIFIED"):
            self._put(event.object)

    def _put(self, item: Object) -> None:
        metadata = item["metadata"]
        key = _name(item)
        known = self._entries.get(key)
        version = str(metadata.get("resourceVersion", ""))
        same = known is not None and known.uid == metadata["uid"]
        if known is not None and same and (known.version == version or older(version, known.version)):
            return  # the answer to our own write came ahead of the watch
        value = self._project(item)
        if value is None:
            self._drop(key)
            return
        owner = (metadata.get("labels") or {}).get(RUN)
        run = RunKey(key[0], owner) if owner else None
        entry = Entry(key[0], key[1], str(metadata["uid"]), version, run, controller_uid(item), value)
        if known is not None and known.run != run:
            self._drop(key)
        self._entries[key] = entry
        if run is not None:
            self._by_run.setdefault(run, {})[key] = entry
        self._on_change(run)

    def _drop(self, key: tuple[str, str]) -> None:
        gone = self._entries.pop(key, None)
        if gone is None:
            return
        if gone.run is not None:
            siblings = self._by_run.get(gone.run, {})
            siblings.pop(key, None)
            if not siblings:
                self._by_run.pop(gone.run, None)
        self._on_change(gone.run)

    def _heard(self, namespace: str | None) -> None:
        self._heard_at[namespace] = self._monotonic()

    def _count(self, event_type: str) -> None:
        if self._on_event is not None:
            self._on_event(self.kind, event_type)


def _name(item: Object) -> tuple[str, str]:
    metadata = item["metadata"]
    return str(metadata["namespace"]), str(metadata["name"])
