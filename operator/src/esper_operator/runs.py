"""The runs this process knows, fed by Kopf's watch, by our own status writes, and by a list now and then.

Kopf's re-list tells of no object that vanished meanwhile, so `resync` compares the cache with the server. A version
older than the cached one never replaces it. Everything is O(1) but `resync`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from esper_leyline.labels import claim_name
from esper_leyline.phases import ConditionType, Phase
from esper_leyline.reasons import RunReason

from esper_operator.kube.api import RUNS, KubeApi, Object, older
from esper_operator.kube.errors import NotFound
from esper_operator.model import Run, RunKey

logger = logging.getLogger(__name__)

FINISHED = (Phase.SUCCEEDED, Phase.FAILED)

Place = tuple[str, str, str]
"""(namespace, claim, subPath): where a run's checkpoints are."""


@dataclass(slots=True)
class _Cached:
    raw: Object
    uid: str
    version: str
    seen_at: float
    place: Place
    seniority: tuple[bool, str, str] | None
    """Order among the runs of one place: those with an attempt, then first come first; None for a run that is over."""
    stands: bool
    """False: refused for a reason of its own, so it keeps nobody out."""
    run: Run | None = None


class RunCache:
    def __init__(
        self,
        *,
        observe: Callable[[Object], Run],
        on_change: Callable[[RunKey], None],
        on_gone: Callable[[RunKey, str], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is called for every news of a run, and of a neighbour that concerns it."""
        self._observe = observe
        self._on_change = on_change
        self._on_gone = on_gone
        self._monotonic = monotonic
        self._runs: dict[RunKey, _Cached] = {}
        self._places: dict[Place, set[RunKey]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[RunKey]:
        return iter(tuple(self._runs))

    def get(self, key: RunKey) -> Run | None:
        """The run as last seen; parsed once per version."""
        cached = self._runs.get(key)
        if cached is None:
            return None
        if cached.run is None:
            cached.run = self._observe(cached.raw)
        return cached.run

    def uid_of(self, key: RunKey) -> str | None:
        cached = self._runs.get(key)
        return cached.uid if cached else None

    def phases(self) -> dict[str, int]:
        """How many runs are in each phase; every phase is there."""
        counts = dict.fromkeys((phase.value for phase in Phase), 0)
        for cached in self._runs.values():
            phase = _section(cached.raw, "status").get("phase") or Phase.PENDING.value
            counts[phase] = counts.get(phase, 0) + 1
        return counts

    def senior_on_claim(self, key: RunKey) -> str:
        """Another live run that was first on the same claim and subPath, as namespace/name; empty when none was."""
        cached = self._runs.get(key)
        if cached is None or cached.seniority is None:
            return ""
        rivals = [
            (rival.seniority, str(other))
            for other in self._places[cached.place]
            if other != key
            and (rival := self._runs[other]).seniority is not None
            and rival.seniority < cached.seniority
        ]
        return min(rivals)[1] if rivals else ""

    def put(self, raw: Object) -> None:
        """Takes a newer version in; wakes the run, and its neighbours on the same claim when their order changes."""
        metadata = raw["metadata"]
        key, version = RunKey(metadata["namespace"], metadata["name"]), str(metadata["resourceVersion"])
        known = self._runs.get(key)
        if known is not None and known.uid == metadata["uid"]:
            if known.version == version or older(version, known.version):
                return
        elif known is not None:
            self.drop(key, known.uid)
            known = None
        slim = {**raw, "metadata": {name: value for name, value in metadata.items() if name != "managedFields"}}
        now, place = self._monotonic(), _place(key, slim)
        cached = _Cached(slim, str(metadata["uid"]), version, now, place, _seniority(slim), _stands(slim))
        self._runs[key] = cached
        self._places.setdefault(place, set()).add(key)
        if known is not None and known.place != place:
            self._leave(known.place, key)
        self._on_change(key)
        if known is None or _standing(known) != _standing(cached):
            self._wake_neighbours(place, key)

    def drop(self, key: RunKey, uid: str = "") -> None:
        """The run is no more. With a UID only that very object."""
        known = self._runs.get(key)
        if known is None or uid not in ("", known.uid):
            return
        del self._runs[key]
        self._leave(known.place, key)
        self._on_gone(key, known.uid)
        self._wake_neighbours(known.place, key)

    async def load(self, api: KubeApi, namespaces: tuple[str, ...]) -> None:
        """Everything there is, before the first decision: two runs on one claim must both be known."""
        async for item in _items(api, namespaces, metadata_only=False):
            self.put(item)

    async def resync(self, api: KubeApi, namespaces: tuple[str, ...]) -> int:
        """Corrects what the watch has missed; returns how many runs that were."""
        started = self._monotonic()
        listed: dict[RunKey, str] = {}
        async for item in _items(api, namespaces, metadata_only=True):
            metadata = item["metadata"]
            listed[RunKey(metadata["namespace"], metadata["name"])] = metadata["uid"]
        gone = [k for k, c in self._runs.items() if listed.get(k) != c.uid and c.seen_at < started]
        for key in gone:
            self.drop(key)
        missing = [key for key in listed if key not in self._runs]
        for key in missing:
            await self.refresh(api, key)
        if gone or missing:
            logger.warning("the watch of runs had missed %d deletions and %d creations", len(gone), len(missing))
        return len(gone) + len(missing)

    async def refresh(self, api: KubeApi, key: RunKey) -> None:
        """Reads one run from the server, past the watch."""
        try:
            self.put(await api.get(RUNS, key.name, namespace=key.namespace))
        except NotFound:
            self.drop(key)

    def _leave(self, place: Place, key: RunKey) -> None:
        neighbours = self._places.get(place, set())
        neighbours.discard(key)
        if not neighbours:
            self._places.pop(place, None)

    def _wake_neighbours(self, place: Place, key: RunKey) -> None:
        for neighbour in self._places.get(place, ()):
            if neighbour != key:
                self._on_change(neighbour)


async def _items(api: KubeApi, namespaces: tuple[str, ...], *, metadata_only: bool) -> Any:
    for namespace in namespaces or (None,):
        token = ""
        while True:
            page = await api.list(RUNS, namespace=namespace, token=token, metadata_only=metadata_only)
            for item in page.items:
                yield item
            token = page.next_token
            if not token:
                break


def _section(raw: Any, *path: str) -> dict[str, Any]:
    """A nested object, {} where there is none: the API server has checked the schema, or nobody has."""
    for name in path:
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw if isinstance(raw, dict) else {}


def _place(key: RunKey, raw: Object) -> Place:
    storage = _section(raw, "spec", "checkpoint", "storage")
    claim = storage.get("claimName") or claim_name(key.name)
    parts = [part for part in str(storage.get("subPath") or "").split("/") if part not in ("", ".")]
    return key.namespace, str(claim), "/".join(parts)


def _seniority(raw: Object) -> tuple[bool, str, str] | None:
    metadata, status = raw["metadata"], _section(raw, "status")
    if metadata.get("deletionTimestamp") or status.get("phase") in FINISHED:
        return None
    return not status.get("attempt"), str(metadata.get("creationTimestamp", "")), str(metadata["uid"])


def _stands(raw: Object) -> bool:
    conditions = _section(raw, "status").get("conditions")
    return not isinstance(conditions, list) or not any(
        isinstance(c, dict)
        and c.get("type") == ConditionType.ACCEPTED
        and c.get("status") == "False"
        and c.get("reason") != RunReason.CHECKPOINT_CLAIM_IN_USE
        for c in conditions
    )


def _standing(cached: _Cached) -> tuple[object, ...]:
    return cached.place, cached.seniority, cached.stands
