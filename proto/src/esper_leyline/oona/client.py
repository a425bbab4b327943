"""The client of the fabric over redis-py. One instance per process; all its methods belong to one event loop."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from google.protobuf.message import DecodeError
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import Pipeline, PubSub
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from esper_leyline.oona.answers import (
    MAX_ANSWER_BYTES,
    MAX_BATCH,
    NONSENSE,
    SMALL_ANSWER_BYTES,
    entry_id,
    parser_for,
)
from esper_leyline.oona.breaker import Backoff, Breaker, BreakerState
from esper_leyline.oona.config import OonaConfig
from esper_leyline.oona.streams import EMERGENCY, FIELD, MAX_ENTRY_BYTES, REPORTS, Stream, signals
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import MessagePriority

BEGIN: Final = "0-0"
"""Reading position before the oldest entry."""

_TRANSPORT_ERRORS: Final = (RedisConnectionError, RedisTimeoutError, TimeoutError, OSError)
PER_MESSAGE_S: Final = 0.02
"""Added to the timeout of an exchange for each message after the first."""
_STALE_CONNECTIONS: Final = 2
"""One in the pool, and one to a server that has just stepped down."""


T = TypeVar("T")
_Adding = Callable[["_Lane", Sequence["_Message"]], Awaitable[list["Outcome"]]]


class OonaUnavailable(Exception):
    """Redis could not be asked in time, or refused; only the methods that read once raise it."""


class OonaRefused(OonaUnavailable):
    """Redis answered, and its answer is no."""


class OonaDenied(OonaRefused):
    """This user may not do that, or this Redis does not know it."""


class Status(StrEnum):
    PUBLISHED = "published"
    UNAVAILABLE = "unavailable"
    """No answer in time, or the breaker is open. It may have arrived all the same: send again, receivers cope."""
    REFUSED = "refused"
    """Redis answered no (out of memory, read-only, not permitted), or back-pressure did: keep it, try again."""
    DROPPED = "dropped"
    """Given up because of back-pressure."""
    COALESCED = "coalesced"
    """One of too many CRITICAL ones: counted, not sent."""


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

    def __init__(
        self,
        config: OonaConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_breaker: Callable[[BreakerState], None] = lambda state: None,
    ) -> None:
        """`on_breaker` is told each new state of the breaker at once; it must not wait."""
        self.config = config
        self._breaker = Breaker(
            failures=config.breaker_failures, backoff=self._backoff(), clock=clock, changed=on_breaker
        )
        self._normal = _Lane(self._client(SMALL_ANSWER_BYTES, self._notice_new_connections()))
        self._critical = _Lane(self._client(SMALL_ANSWER_BYTES, self._notice_new_connections()))
        self._readers: set[Redis] = set()
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._down.set()
        self.problem = ""
        """Why the last exchange with Redis failed; empty when it did not."""
        self.interruptions = 0
        """How often Redis may have gone away. It may then have forgotten what it had acknowledged shortly before."""

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

    @property
    def conservative(self) -> bool:
        """True while the breaker is not closed: what is not CRITICAL waits between single tries."""
        return self._breaker.state is not BreakerState.CLOSED

    async def wait_connected(self, connected: bool = True) -> None:
        """Returns when `connected` has that value."""
        await (self._up if connected else self._down).wait()

    async def stand_by(self) -> None:
        """Connects for CRITICAL messages ahead of need, or finds out that the connection is dead. OonaUnavailable."""
        async with self._critical.lock:
            await self.ask(self._critical.client.ping(), self.config.timeout_s)

    # --- publishing ----------------------------------------------------------------------------------------------

    async def publish_report(self, envelope: BusEnvelope) -> Outcome:
        return await self.publish(REPORTS, envelope)

    async def publish_signal(self, run_uid: str, envelope: BusEnvelope) -> Outcome:
        """Sends an emergency signal to the pods of a run, and to who follows all. Give it the priority CRITICAL."""
        return await self.publish(signals(run_uid), envelope, EMERGENCY)

    async def publish_signals(self, envelopes: Mapping[str, BusEnvelope]) -> dict[str, Outcome]:
        """As publish_signal, to many runs by UID, together; within timeout_s and some time for each."""
        messages = [_Message.of(envelope, signals(uid), EMERGENCY) for uid, envelope in envelopes.items()]
        return dict(zip(envelopes, await self._send(self._critical, self._add_again, messages), strict=True))

    async def publish(self, stream: Stream, envelope: BusEnvelope, *more: Stream) -> Outcome:
        """Adds the envelope to the stream and its channel, and to `more`, in one transaction, within timeout_s.

        Raises ValueError for an envelope over MAX_ENTRY_BYTES, and nothing for any state of Redis.
        """
        messages = [_Message.of(envelope, stream, *more)]
        critical = envelope.priority == MessagePriority.MESSAGE_PRIORITY_CRITICAL
        if not critical and not self._breaker.admits():
            return Outcome(status=Status.UNAVAILABLE, detail="Redis did not answer lately; waiting before the next try")
        lane = self._critical if critical else self._normal
        adding = self._add_again if critical else self._add
        return (await self._send(lane, adding, messages))[0]

    async def _send(self, lane: "_Lane", adding: "_Adding", messages: Sequence["_Message"]) -> list[Outcome]:
        """One exchange; an outcome for each message."""
        try:
            timeout_s = self.config.timeout_s + PER_MESSAGE_S * (len(messages) - 1)
            added = await _within(timeout_s, adding(lane, messages))
        except (*_TRANSPORT_ERRORS, *NONSENSE) as error:
            return [Outcome(status=Status.UNAVAILABLE, detail=self._failed(error))] * len(messages)
        except RedisError as error:
            self._succeeded()  # an answer, if not the one that was hoped for
            if isinstance(error, ReadOnlyError):
                await renew(lane.client)
            return [Outcome(status=Status.REFUSED, detail=_describe(error))] * len(messages)
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        self._succeeded()
        return added

    async def _add_again(self, lane: "_Lane", messages: Sequence["_Message"]) -> list[Outcome]:
        """As _add; a connection that turns out to be dead, or to lead to a server that has stepped down, costs no call
        but a new connection."""
        for _ in range(_STALE_CONNECTIONS):
            try:
                return await self._add(lane, messages)
            except (RedisConnectionError, OSError):
                continue
            except ReadOnlyError:
                await renew(lane.client)
        return await self._add(lane, messages)

    async def _add(self, lane: "_Lane", messages: Sequence["_Message"]) -> list[Outcome]:
        """All in one transaction. Redis may refuse some of them, such as one whose stream is something else there."""
        async with lane.lock, lane.client.pipeline(transaction=True) as transaction:
            sizes = [message.put_into(transaction) for message in messages]
            answers = iter(await transaction.execute(raise_on_error=False))
        return [_outcome(list(itertools.islice(answers, size))) for size in sizes]

    # --- reading -------------------------------------------------------------------------------------------------

    def reports(self, after_id: str = BEGIN) -> AsyncGenerator[Entry]:
        """All reports after an entry id, old ones first, then new ones as they come. Endless; survives Redis."""
        return self.entries(REPORTS, after_id)

    def signals(self, run_uid: str) -> AsyncGenerator[Entry]:
        """The newest signal of a run, then each new one. Endless; after every reconnection the newest comes again,
        so that a Redis which lost its data loses no signal."""
        return self._follow(signals(run_uid), BEGIN, newest_first=True, max_answer_bytes=SMALL_ANSWER_BYTES)

    def entries(self, stream: Stream, after_id: str = BEGIN) -> AsyncGenerator[Entry]:
        """All entries after an id. Endless: reconnects by itself, and begins anew when Redis has lost its data."""
        return self._follow(stream, after_id, newest_first=False)

    async def last(self, stream: Stream) -> Entry | None:
        """The newest entry; None when there is none. OonaUnavailable when Redis cannot say."""
        async with self.connection() as client:
            return await self._newest(client, stream)

    async def subscribe(self, channel: str) -> AsyncGenerator[Entry]:
        """Messages of a channel from now on, without ids. Endless; what is sent while Redis is away is lost."""
        backoff = self._backoff()
        while True:
            try:
                async with self.connection() as client, client.pubsub(ignore_subscribe_messages=True) as listener:
                    await self._attempt(listener.subscribe(channel), self.config.timeout_s)
                    while True:
                        message = await self._message(listener)
                        backoff.reset()
                        if message["type"] == "message":
                            yield Entry("", bytes(message["data"]))
            except OonaUnavailable:
                await asyncio.sleep(backoff.next_s())

    async def _follow(
        self, stream: Stream, position: str, *, newest_first: bool, max_answer_bytes: int = MAX_ANSWER_BYTES
    ) -> AsyncGenerator[Entry]:
        backoff = self._backoff()
        while True:
            try:
                async with self.connection(max_answer_bytes) as client:
                    again = newest_first
                    while True:
                        newest = await self._newest(client, stream)
                        lost = newest is None or newest.order < _order(position)
                        if newest is not None and newest_first and (again or lost):
                            position = newest.id
                            yield newest
                        elif lost:
                            position = BEGIN  # Redis has lost its data; its new entries may well have lower ids
                        again = False
                        while found := await self._read(client, stream, position):
                            for entry in found:
                                position = entry.id
                                yield entry
                            backoff.reset()
                        # A silence: perhaps because the stream is another one now, whose ids are lower.
                        backoff.reset()
            except OonaUnavailable:
                await asyncio.sleep(backoff.next_s())

    async def _newest(self, client: Redis, stream: Stream) -> Entry | None:
        found = await self.ask(client.xrevrange(stream.name, count=1), self.config.timeout_s)
        return entries_of(found)[0] if found else None

    async def _read(self, client: Redis, stream: Stream, position: str) -> list[Entry]:
        block_ms = max(1, int(self.config.block_s * 1000))
        found = await self.ask(
            client.xread({stream.name: position}, count=MAX_BATCH, block=block_ms),
            self.config.block_s + self.config.timeout_s,
        )
        return entries_of(found[0][1]) if found else []

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

    async def ask(self, call: Awaitable[Any], timeout_s: float) -> Any:
        """One exchange, with its result noted. OonaUnavailable for every way in which it can fail."""
        answer = await self._attempt(call, timeout_s)
        self._succeeded()
        return answer

    async def _attempt(self, call: Awaitable[Any], timeout_s: float) -> Any:
        """Like _ask for calls whose return is no proof of an answer: only a failure is noted."""
        try:
            return await _within(timeout_s, call)
        except (*_TRANSPORT_ERRORS, *NONSENSE) as error:
            raise OonaUnavailable(self._failed(error)) from error
        except RedisError as error:
            self._succeeded()
            denied = isinstance(error, NoPermissionError) or "unknown command" in str(error)
            raise (OonaDenied if denied else OonaRefused)(_describe(error)) from error

    @contextlib.asynccontextmanager
    async def connection(self, max_answer_bytes: int = MAX_ANSWER_BYTES) -> AsyncIterator[Redis]:
        """A connection of the caller's own, for `ask`. A larger answer is none."""
        client = self._client(max_answer_bytes)
        self._readers.add(client)
        try:
            yield client
        finally:
            self._readers.discard(client)
            with contextlib.suppress(*_TRANSPORT_ERRORS):
                await client.aclose()

    # --- connections ---------------------------------------------------------------------------------------------

    def _client(
        self, max_answer_bytes: int, on_connect: Callable[[AbstractConnection], Awaitable[None]] | None = None
    ) -> Redis:
        config = self.config
        pool = ConnectionPool.from_url(
            config.url,
            max_connections=1,
            socket_connect_timeout=config.timeout_s,
            socket_timeout=config.block_s + config.timeout_s,
            retry=Retry(NoBackoff(), 0),  # the breaker and the readers decide about trying again
            protocol=2,
            parser_class=parser_for(max_answer_bytes),
            driver_info=None,
            redis_connect_func=on_connect,
            **config.connection_options(),
        )
        return Redis.from_pool(pool)

    def _notice_new_connections(self) -> Callable[[AbstractConnection], Awaitable[None]]:
        """Of a lane: redis-py replaces a connection that has ended without a word."""
        before = False

        async def connect(connection: AbstractConnection) -> None:
            nonlocal before
            await connection.on_connect()
            self.interruptions += before and self.connected  # else it was noticed
            before = True

        return connect

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
        self.interruptions += 1
        self.problem = _describe(error)
        self._up.clear()
        self._down.set()
        return self.problem


@dataclass(frozen=True, slots=True)
class _Message:
    raw: bytes
    streams: tuple[Stream, ...]

    @classmethod
    def of(cls, envelope: BusEnvelope, *streams: Stream) -> "_Message":
        raw = envelope.SerializeToString()
        if len(raw) > MAX_ENTRY_BYTES:
            raise ValueError(f"envelope of {len(raw)} bytes; at most {MAX_ENTRY_BYTES}")
        return cls(raw, streams)

    def put_into(self, transaction: Pipeline) -> int:
        """How many answers there will be; the first is the entry's id in the first stream."""
        before = len(transaction)
        for stream in self.streams:
            transaction.xadd(stream.name, {FIELD: self.raw}, maxlen=stream.max_length, approximate=not stream.exact)
        for stream in self.streams:
            transaction.publish(stream.name, self.raw)
            if stream.idle_seconds is not None:
                transaction.expire(stream.name, stream.idle_seconds)
        return len(transaction) - before


def _outcome(answers: list[Any]) -> Outcome:
    """Of one message. NONSENSE for answers that are none."""
    refusal = next((answer for answer in answers if isinstance(answer, RedisError)), None)
    if refusal is not None:
        return Outcome(status=Status.REFUSED, detail=_describe(refusal))
    return Outcome(status=Status.PUBLISHED, entry_id=entry_id(answers[0]))


class _Lane:
    """A connection that serves one caller at a time."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.lock = asyncio.Lock()


async def renew(client: Redis) -> None:
    """Its next call connects anew: who answers READONLY has stepped down, and its address may be another's by now."""
    with contextlib.suppress(*_TRANSPORT_ERRORS):
        await client.connection_pool.disconnect(inuse_connections=False)


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


@contextlib.contextmanager
def sound_answers() -> Iterator[None]:
    """Around code that takes answers apart: OonaUnavailable where they have another shape than Redis gives them."""
    try:
        yield
    except NONSENSE as error:
        raise OonaUnavailable(f"this is no answer of Redis: {_describe(error)}") from error


def entries_of(found: list[tuple[bytes, dict[bytes, bytes] | None]]) -> list[Entry]:
    """Of Redis's answer; OonaUnavailable when it is none. An entry without our field is foreign; it stays in the list,
    so that the reading position passes it."""
    with sound_answers():
        return [Entry(entry_id(name), _raw((fields or {}).get(FIELD))) for name, fields in found]


def _raw(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""


def _order(place: str) -> tuple[int, int]:
    milliseconds, _, number = place.partition("-")
    return int(milliseconds), int(number or 0)


def _describe(error: BaseException) -> str:
    """The error's own words, or its kind when it has none; at most 256 characters."""
    return (str(error) or type(error).__name__)[:256]
