"""The client of the fabric over redis-py. One instance per process; all its methods belong to one event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from google.protobuf.message import DecodeError
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from esper_leyline.oona.breaker import Backoff, Breaker
from esper_leyline.oona.config import OonaConfig
from esper_leyline.oona.streams import FIELD, MAX_ENTRY_BYTES, REPORTS, Stream, signals
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import MessagePriority

BEGIN: Final = "0-0"
"""Reading position before the oldest entry."""

_TRANSPORT_ERRORS: Final = (RedisConnectionError, RedisTimeoutError, TimeoutError, OSError)
_BATCH: Final = 128
"""Entries per read."""


T = TypeVar("T")


class OonaUnavailable(Exception):
    """Redis could not be asked in time, or refused; only the methods that read once raise it."""


class Status(StrEnum):
    PUBLISHED = "published"
    UNAVAILABLE = "unavailable"
    """No answer in time, or the breaker is open. It may have arrived all the same: send again, receivers cope."""
    REFUSED = "refused"
    """Redis answered no: out of memory, read-only, not permitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a publication."""

    status: Status
    detail: str = ""
    """Why it was not published."""
    entry_id: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One message as received; nothing about it is verified."""

    id: str
    """Place in the stream; empty when it came by a channel."""
    raw: bytes

    @property
    def order(self) -> tuple[int, int]:
        """Its id as numbers: greater is newer. Not for an entry that came by a channel."""
        return _order(self.id)

    def envelope(self) -> BusEnvelope | None:
        """None when the bytes are no envelope, or too many."""
        if not 0 < len(self.raw) <= MAX_ENTRY_BYTES:
            return None
        envelope = BusEnvelope()
        try:
            envelope.ParseFromString(self.raw)
        except DecodeError:
            return None
        return envelope


class Oona:
    """Publishes and reads envelopes.

    CRITICAL envelopes have a connection of their own and pass an open breaker, so that nothing else delays them.
    Every reader has its own connection.
    """

    def __init__(self, config: OonaConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._breaker = Breaker(failures=config.breaker_failures, backoff=self._backoff(), clock=clock)
        self._normal = _Lane(self._client())
        self._critical = _Lane(self._client())
        self._readers: set[Redis] = set()
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._down.set()
        self.problem = ""
        """Why the last exchange with Redis failed; empty when it did not."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections; running readers end with an error of their own making."""
        for client in (self._normal.client, self._critical.client, *self._readers):
            with contextlib.suppress(*_TRANSPORT_ERRORS):
                await client.aclose()

    # --- state ---------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """True when the last exchange with Redis succeeded; False before the first."""
        return self._up.is_set()

    async def wait_connected(self, connected: bool = True) -> None:
        """Returns when `connected` has that value."""
        await (self._up if connected else self._down).wait()

    # --- publishing ----------------------------------------------------------------------------------------------

    async def publish_report(self, envelope: BusEnvelope) -> Outcome:
        return await self.publish(REPORTS, envelope)

    async def publish_signal(self, run_uid: str, envelope: BusEnvelope) -> Outcome:
        """Sends an emergency signal to the pods of a run. Give it the priority CRITICAL."""
        return await self.publish(signals(run_uid), envelope)

    async def publish(self, stream: Stream, envelope: BusEnvelope) -> Outcome:
        """Adds the envelope to the stream and its channel in one transaction, within timeout_s.

        Raises ValueError for an envelope over MAX_ENTRY_BYTES, and nothing for any state of Redis.
        """
        raw = envelope.SerializeToString()
        if len(raw) > MAX_ENTRY_BYTES:
            raise ValueError(f"envelope of {len(raw)} bytes; at most {MAX_ENTRY_BYTES}")
        critical = envelope.priority == MessagePriority.MESSAGE_PRIORITY_CRITICAL
        if not self._breaker.admits() and not critical:
            return Outcome(status=Status.UNAVAILABLE, detail="Redis did not answer lately; waiting before the next try")
        lane = self._critical if critical else self._normal
        try:
            entry_id = await _within(self.config.timeout_s, self._add(lane, stream, raw))
        except _TRANSPORT_ERRORS as error:
            return Outcome(status=Status.UNAVAILABLE, detail=self._failed(error))
        except RedisError as error:
            self._succeeded()  # an answer, if not the one that was hoped for
            return Outcome(status=Status.REFUSED, detail=_describe(error))
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        self._succeeded()
        return Outcome(status=Status.PUBLISHED, entry_id=entry_id)

    async def _add(self, lane: "_Lane", stream: Stream, raw: bytes) -> str:
        async with lane.lock, lane.client.pipeline(transaction=True) as transaction:
            transaction.xadd(stream.name, {FIELD: raw}, maxlen=stream.max_length, approximate=not stream.exact)
            transaction.publish(stream.name, raw)
            if stream.idle_seconds is not None:
                transaction.expire(stream.name, stream.idle_seconds)
            results = await transaction.execute()
        return bytes(results[0]).decode()

    # --- reading -------------------------------------------------------------------------------------------------

    def reports(self, after_id: str = BEGIN) -> AsyncGenerator[Entry]:
        """All reports after an entry id, old ones first, then new ones as they come. Endless; survives Redis."""
        return self.entries(REPORTS, after_id)

    def signals(self, run_uid: str) -> AsyncGenerator[Entry]:
        """The newest signal of a run, then each new one. Endless; after every reconnection the newest comes again,
        so that a Redis which lost its data loses no signal."""
        return self._follow(signals(run_uid), BEGIN, newest_first=True)

    def entries(self, stream: Stream, after_id: str = BEGIN) -> AsyncGenerator[Entry]:
        """All entries after an id. Endless: reconnects by itself, and begins anew when Redis has lost its data."""
        return self._follow(stream, after_id, newest_first=False)

    async def last(self, stream: Stream) -> Entry | None:
        """The newest entry; None when there is none. OonaUnavailable when Redis cannot say."""
        async with self._reader() as client:
            return await self._newest(client, stream)

    async def subscribe(self, channel: str) -> AsyncGenerator[Entry]:
        """Messages of a channel from now on, without ids. Endless; what is sent while Redis is away is lost."""
        backoff = self._backoff()
        while True:
            try:
                async with self._reader() as client, client.pubsub(ignore_subscribe_messages=True) as listener:
                    await self._attempt(listener.subscribe(channel), self.config.timeout_s)
                    while True:
                        message = await self._message(listener)
                        backoff.reset()
                        if message["type"] == "message":
                            yield Entry("", bytes(message["data"]))
            except OonaUnavailable:
                await asyncio.sleep(backoff.next_s())

    async def _follow(self, stream: Stream, position: str, *, newest_first: bool) -> AsyncGenerator[Entry]:
        backoff = self._backoff()
        while True:
            try:
                async with self._reader() as client:
                    newest = await self._newest(client, stream)
                    if newest_first and newest is not None:
                        position = newest.id
                        yield newest
                    elif newest is None or _order(newest.id) < _order(position):
                        position = BEGIN  # Redis has lost its data; its new entries may well have lower ids
                    while True:
                        for entry in await self._read(client, stream, position):
                            position = entry.id
                            yield entry
                        backoff.reset()
            except OonaUnavailable:
                await asyncio.sleep(backoff.next_s())

    async def _newest(self, client: Redis, stream: Stream) -> Entry | None:
        found = await self._ask(client.xrevrange(stream.name, count=1), self.config.timeout_s)
        return _entries(found)[0] if found else None

    async def _read(self, client: Redis, stream: Stream, position: str) -> list[Entry]:
        block_ms = max(1, int(self.config.block_s * 1000))
        found = await self._ask(
            client.xread({stream.name: position}, count=_BATCH, block=block_ms),
            self.config.block_s + self.config.timeout_s,
        )
        return _entries(found[0][1]) if found else []

    async def _message(self, listener: PubSub) -> dict[str, Any]:
        """The next message; in a long silence the server must answer a PING, so that a frozen one is found out."""
        for _ in range(2):
            message = await self._attempt(
                listener.get_message(timeout=self.config.block_s), self.config.block_s + self.config.timeout_s
            )
            if message is not None:
                self._succeeded()
                return dict(message)
            await self._attempt(listener.ping(), self.config.timeout_s)
        raise OonaUnavailable(self._failed(TimeoutError("the server does not answer")))

    async def _ask(self, call: Awaitable[Any], timeout_s: float) -> Any:
        """One exchange, with its result noted. OonaUnavailable for every way in which it can fail."""
        answer = await self._attempt(call, timeout_s)
        self._succeeded()
        return answer

    async def _attempt(self, call: Awaitable[Any], timeout_s: float) -> Any:
        """Like _ask for calls whose return is no proof of an answer: only a failure is noted."""
        try:
            return await _within(timeout_s, call)
        except _TRANSPORT_ERRORS as error:
            raise OonaUnavailable(self._failed(error)) from error
        except RedisError as error:
            self._succeeded()
            raise OonaUnavailable(_describe(error)) from error

    @contextlib.asynccontextmanager
    async def _reader(self) -> AsyncIterator[Redis]:
        client = self._client()
        self._readers.add(client)
        try:
            yield client
        finally:
            self._readers.discard(client)
            with contextlib.suppress(*_TRANSPORT_ERRORS):
                await client.aclose()

    # --- connections ---------------------------------------------------------------------------------------------

    def _client(self) -> Redis:
        config = self.config
        pool = ConnectionPool.from_url(
            config.url,
            max_connections=1,
            socket_connect_timeout=config.timeout_s,
            socket_timeout=config.block_s + config.timeout_s,
            retry=Retry(NoBackoff(), 0),  # the breaker and the readers decide about trying again
            protocol=2,
            driver_info=None,
            **config.connection_options(),
        )
        return Redis.from_pool(pool)

    def _backoff(self) -> Backoff:
        return Backoff(first_s=self.config.backoff_first_s, max_s=self.config.backoff_max_s)

    def _succeeded(self) -> None:
        self._breaker.succeeded()
        self.problem = ""
        self._down.clear()
        self._up.set()

    def _failed(self, error: Exception) -> str:
        """Notes a failure of the transport; its description."""
        self._breaker.failed()
        self.problem = _describe(error)
        self._up.clear()
        self._down.set()
        return self.problem


class _Lane:
    """A connection that serves one caller at a time."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.lock = asyncio.Lock()


async def _within(timeout_s: float, call: Awaitable[T]) -> T:
    """The result of `call`, or TimeoutError. A cancellation from outside always gets through: before Python 3.12
    asyncio.wait_for, which redis-py uses, may swallow one that comes as its own result does."""
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


def _entries(found: list[tuple[bytes, dict[bytes, bytes] | None]]) -> list[Entry]:
    """An entry without our field is foreign; it stays in the list, so that the reading position passes it."""
    return [Entry(entry_id.decode(), (fields or {}).get(FIELD, b"")) for entry_id, fields in found]


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def _describe(error: BaseException) -> str:
    """The error's own words, or its kind when it has none; at most 256 characters."""
    return (str(error) or type(error).__name__)[:256]
