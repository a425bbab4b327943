"""Kubernetes Events: posted from the background, each at most once, never too many.

An Event's name is a hash of what it says and of the point in the object's life at which it says it, so a restarted
operator that repeats one gets AlreadyExists. Losing an Event loses nothing: the status has it all.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from esper_leyline.incidents import ANNOTATION
from esper_leyline.labels import API_VERSION, KIND, MANAGED_BY

from esper_operator.kube.api import EVENTS, KubeApi, Object
from esper_operator.kube.errors import AlreadyExists, Forbidden, Invalid, KubeError, NotFound, Throttled
from esper_operator.model import EventRecord, Run

logger = logging.getLogger(__name__)

MAX_QUEUED = 1_000
MAX_NOTE = 1_024
RUN_BURST, RUN_PERIOD_S = 25, 30.0
"""A life with a halt, a crash and a rollback says twelve things; the last of them is the most important."""
ALL_BURST, ALL_PERIOD_S = 50, 0.05
MAX_REMEMBERED = 10_000
RETRIES = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """The object that an Event is about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str

    @classmethod
    def of(cls, run: Run) -> "Subject":
        return cls(API_VERSION, KIND, run.key.namespace, run.key.name, run.uid)


@dataclass(slots=True)
class Bucket:
    """Token bucket: `burst` at once, one more per `period_s`."""

    burst: int
    period_s: float
    tokens: float
    at: float

    @classmethod
    def full(cls, burst: int, period_s: float, now: float) -> "Bucket":
        return cls(burst, period_s, float(burst), now)

    def take(self, now: float) -> bool:
        self.tokens = min(self.burst, self.tokens + (now - self.at) / self.period_s)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class EventPoster:
    """`post` never waits and never fails; `run` sends."""

    def __init__(
        self,
        api: KubeApi,
        *,
        instance: str,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
        on_outcome: Callable[[str], None] | None = None,
        turn: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`on_outcome` counts: posted, repeated, limited, dropped, failed. `turn` returns when an Event may go: what it
        waits for is more important."""
        self._api = api
        self._instance = instance
        self._now = now
        self._monotonic = monotonic
        self._count = on_outcome or (lambda _: None)
        self._turn = turn or _at_once
        self._queue: asyncio.Queue[Object] = asyncio.Queue(MAX_QUEUED)
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._all = Bucket.full(ALL_BURST, ALL_PERIOD_S, monotonic())
        self._said: OrderedDict[str, None] = OrderedDict()

    def post(self, subject: Subject, record: EventRecord, *, moment: str) -> None:
        """`moment` tells apart the times at which the same thing may be said again, such as attempt and seq."""
        event = self._event(subject, record, moment)
        name = event["metadata"]["name"]
        if name in self._said:
            return
        now = self._monotonic()
        if not self._bucket(subject.uid, now).take(now) or not self._all.take(now):
            self._count("limited")
            return
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._count("dropped")
            return
        self._said[name] = None
        if len(self._said) > MAX_REMEMBERED:
            self._said.popitem(last=False)

    async def run(self) -> None:
        while True:
            event = await self._queue.get()
            await self._turn()
            self._count(await self._send(event))
            self._queue.task_done()

    async def flush(self, timeout_s: float) -> None:
        """Waits until all is sent, but not longer than that."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._queue.join()
        except TimeoutError:
            logger.warning("%d Events were not sent in time", self._queue.qsize())

    async def _send(self, event: Object) -> str:
        for attempt in range(RETRIES):
            try:
                await self._api.create(EVENTS, event)
            except AlreadyExists:
                return "repeated"
            except (Forbidden, Invalid, NotFound) as error:
                logger.warning("Event %s was refused: %s", event["reason"], error)
                return "failed"
            except KubeError as error:
                wait = error.retry_after_s if isinstance(error, Throttled) else 0.5 * 2**attempt
                await asyncio.sleep(wait)
            else:
                return "posted"
        return "failed"

    def _bucket(self, uid: str, now: float) -> Bucket:
        bucket = self._buckets.get(uid)
        if bucket is None:
            bucket = self._buckets[uid] = Bucket.full(RUN_BURST, RUN_PERIOD_S, now)
            if len(self._buckets) > MAX_REMEMBERED:
                self._buckets.popitem(last=False)
        return bucket

    def _event(self, subject: Subject, record: EventRecord, moment: str) -> Object:
        identity = "\0".join((subject.uid, record.reason, record.message, moment))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        note = record.message.encode()[:MAX_NOTE].decode(errors="ignore")
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"namespace": subject.namespace, "name": f"{subject.name}.{digest}", **_annotated(record)},
            "eventTime": self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": MANAGED_BY,
            "reportingInstance": self._instance[:128],
            "action": record.action,
            "reason": str(record.reason),
            "type": "Warning" if record.warning else "Normal",
            "note": note,
            "regarding": {
                "apiVersion": subject.api_version,
                "kind": subject.kind,
                "namespace": subject.namespace,
                "name": subject.name,
                "uid": subject.uid,
            },
        }


async def _at_once() -> None:
    return


def _annotated(record: EventRecord) -> dict[str, dict[str, str]]:
    return {"annotations": {ANNOTATION: record.incident}} if record.incident else {}
