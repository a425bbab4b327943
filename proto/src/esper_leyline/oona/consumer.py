"""A consumer of one stream in a group: every message is handled at least once, and given up only in plain sight.

An entry stays pending in Redis until its handler is done: a consumer that dies leaves its work to the others, who
claim what has been idle for long. A handler that asks for another try gets it after a back-off, in this process,
without holding up the entries behind it. What cannot be handled at all (undecodable, badly signed, failed too often)
goes to the dead letters in the same transaction that acknowledges it.

With `once`, a message is handled once per group even when it was published twice: the nonce under its signature is
remembered in Redis, marked in the transaction that acknowledges, and in this process, since a Redis that died may have
forgotten. Consumers of one group share that memory when they share a Done.

One consumer has two connections of its own, so that neither a long read nor a slow handler of another stream delays it.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from redis.asyncio import Redis

from esper_leyline import contracts
from esper_leyline.oona.breaker import Backoff
from esper_leyline.oona.client import Entry, Oona, OonaRefused, OonaUnavailable, entries_of, renew, sound_answers
from esper_leyline.oona.deadletter import letter
from esper_leyline.oona.streams import DEAD_LETTERS, FIELD, MAX_ENTRY_BYTES, Stream
from esper_leyline.v1.bus_pb2 import BusEnvelope, DeadLetterReason
from esper_leyline.v1.common_pb2 import MESSAGE_PRIORITY_UNSPECIFIED

SEEN_PREFIX: Final = "oona.seen."
_DONE: Final = b"done"
_LOCK_MARGIN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message for a handler; its signature has been judged."""

    envelope: BusEnvelope
    entry_id: str
    attempt: int
    """From 1; above 1 the message may have been handled before."""


class RetryLater(Exception):
    """Raised by a handler that could not do its work now."""


class Rejected(Exception):
    """Raised by a judge or handler: the message never counts."""

    def __init__(self, reason: DeadLetterReason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


Handler = Callable[[Delivery], Awaitable[None]]
"""RetryLater asks for another try, Rejected for none. Any other error ends the consumer: the entry stays pending and
counts as tried."""
Judge = Callable[[BusEnvelope], None]
"""Rejected unless the message is authentic and of a type that is handled here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsumerOptions:
    """Seconds and numbers of one consumer."""

    batch: int = 64
    claim_every_s: float = 15.0
    claim_idle_s: float = 30.0
    """Longer than a handler with all its tries may take, else work in progress would be claimed."""
    handler_timeout_s: float = 5.0
    max_attempts: int = 5
    retry_first_s: float = 0.1
    retry_max_s: float = 10.0
    concurrency: int = 1
    """Handlers at a time. 1 keeps the order of entries, but for those that are tried again."""
    max_outstanding: int = 256
    """Entries taken and not done."""
    once: bool = False
    remember_s: float = 24 * 3600.0
    """How long a nonce is remembered as done."""


@dataclass(slots=True)
class ConsumerStats:
    """Since the start of this process."""

    handled: int = 0
    retried: int = 0
    claimed: int = 0
    duplicates: int = 0
    lost: int = 0
    """Trimmed before they were handled: the stream was too short for its backlog."""
    dead: Counter[str] = field(default_factory=Counter)
    """By reason, such as BAD_SIGNATURE."""
    last_handled_ms: float = 0.0


class Done:
    """The last messages that this process has handled, by the names of their nonces in Redis."""

    LAST: Final = 4096

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._names[name] = None
        if len(self._names) > self.LAST:
            self._names.popitem(last=False)


@dataclass(slots=True)
class _Work:
    entry: Entry
    attempt: int
    seen: str = ""
    """Key of its nonce, when it must be handled once."""


class Consumer:
    """Runs until it is cancelled."""

    def __init__(
        self,
        oona: Oona,
        stream: Stream,
        *,
        group: str,
        name: str,
        handler: Handler,
        judge: Judge = lambda envelope: None,
        options: ConsumerOptions | None = None,
        done: Done | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`name` must be that of one process, and the same after its restart. A message may come on two streams of a
        group (one that back-pressure lets go to the ordinary one): their consumers then need one `done`."""
        self.stream, self.group, self.name = stream, group, name
        self.options = options or ConsumerOptions()
        self.stats = ConsumerStats()
        self._oona = oona
        self._handler = handler
        self._judge = judge
        self._clock = clock
        self._jitter = jitter
        self._ready: asyncio.Queue[_Work] = asyncio.Queue()
        self._outstanding: set[str] = set()
        self._done_here = done or Done()
        self._finished = asyncio.Event()
        """Set when an entry is done."""
        self._tasks: asyncio.TaskGroup | None = None
        self._answers = asyncio.Lock()
        self._answering: Redis | None = None
        self._claim_at = 0.0

    async def run(self) -> None:
        """Endless; survives Redis, and makes its group anew when Redis has lost its data."""
        async with self._oona.connection() as self._answering, asyncio.TaskGroup() as self._tasks:
            for _ in range(self.options.concurrency):
                self._tasks.create_task(self._work())
            self._tasks.create_task(self._read())

    # Taking

    async def _read(self) -> None:
        backoff = self._backoff()
        while True:
            try:
                async with self._oona.connection() as client:
                    with sound_answers():
                        await self._make_group(client)
                        await self._resume(client)
                        while True:
                            await self._claim(client)
                            self._take(await self._new(client))
                            backoff.reset()
            except OonaUnavailable:
                await asyncio.sleep(backoff.next_s())

    async def _make_group(self, client: Redis) -> None:
        """From the oldest entry on: what was published before the first consumer came counts too."""
        stream, group = self.stream.name, self.group
        known = await self._ask(client.exists(stream)) and [
            found["name"].decode() for found in await self._ask(client.xinfo_groups(stream))
        ]
        if not known or group not in known:
            with contextlib.suppress(OonaUnavailable):  # another consumer was faster; else the read will say so
                await self._ask(client.xgroup_create(stream, group, id="0", mkstream=True))

    async def _resume(self, client: Redis) -> None:
        """What this consumer had taken before it died."""
        position = "0"
        while True:
            found = await self._ask(
                client.xreadgroup(self.group, self.name, {self.stream.name: position}, count=self.options.batch)
            )
            entries = entries_of(found[0][1]) if found else []
            if not entries:
                return
            position = entries[-1].id
            tries = await self._tries(client, entries)
            self._take([(entry, tries.get(entry.id, 1)) for entry in entries if entry.id not in self._outstanding])

    async def _claim(self, client: Redis) -> None:
        """What other consumers have left lying."""
        if self._clock() < self._claim_at or not self._room:
            return
        self._claim_at = self._clock() + self.options.claim_every_s
        position = "0-0"
        idle_ms = int(self.options.claim_idle_s * 1000)
        while True:
            found = await self._ask(
                client.xautoclaim(
                    self.stream.name,
                    self.group,
                    self.name,
                    idle_ms,
                    start_id=position,
                    count=min(self.options.batch, self._room),
                )
            )
            position, deleted = found[0].decode(), found[2] if len(found) > 2 else []
            self.stats.lost += len(deleted)
            entries = [entry for entry in entries_of(found[1]) if entry.id not in self._outstanding]
            self.stats.claimed += len(entries)
            tries = await self._tries(client, entries)
            self._take([(entry, tries.get(entry.id, 1)) for entry in entries])
            if position == "0-0" or not self._room:
                return

    @property
    def _room(self) -> int:
        """Entries that may still be taken. What an earlier life had taken comes back however much it is."""
        return max(0, self.options.max_outstanding - len(self._outstanding))

    async def _new(self, client: Redis) -> list[tuple[Entry, int]]:
        while not self._room:  # what is not taken is there for others
            self._finished.clear()
            await self._finished.wait()
        block_s = max(0.001, min(self._oona.config.block_s, self._claim_at - self._clock()))
        found = await self._oona.ask(
            client.xreadgroup(
                self.group,
                self.name,
                {self.stream.name: ">"},
                count=min(self.options.batch, self._room),
                block=max(1, int(block_s * 1000)),
            ),
            self._oona.config.block_s + self._oona.config.timeout_s,
        )
        return [(entry, 1) for entry in (entries_of(found[0][1]) if found else [])]

    async def _tries(self, client: Redis, entries: list[Entry]) -> dict[str, int]:
        """How often each was delivered, this time included."""
        if not entries:
            return {}
        found = await self._ask(
            client.xpending_range(self.stream.name, self.group, entries[0].id, entries[-1].id, self.options.batch * 4)
        )
        return {one["message_id"].decode(): int(one["times_delivered"]) for one in found}

    def _take(self, entries: list[tuple[Entry, int]]) -> None:
        for entry, attempt in entries:
            self._outstanding.add(entry.id)
            self._ready.put_nowait(_Work(entry, attempt))

    # Working

    async def _work(self) -> None:
        while True:
            work = await self._ready.get()
            if await self._done(work):
                self._outstanding.discard(work.entry.id)
                self._finished.set()

    async def _done(self, work: _Work) -> bool:
        """False: it comes again later."""
        if not work.entry.raw:
            self.stats.lost += 1
            return await self._acknowledge(work)
        if work.attempt > self.options.max_attempts:
            why = "its consumer ended each time before it was done"
            return await self._give_up(work, DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED, why)
        try:
            envelope = _opened(work.entry)
            self._judge(envelope)
        except Rejected as rejection:
            return await self._give_up(work, rejection.reason, str(rejection))
        if self.options.once:
            work.seen = f"{SEEN_PREFIX}{self.group}.{envelope.nonce.hex()}"
            holder = _DONE if work.seen in self._done_here else await self._hold(work)
            if holder == _DONE:
                self.stats.duplicates += 1
                return await self._acknowledge(work)
            if holder not in (None, work.entry.id.encode()):
                self._again(work, self.options.retry_max_s)  # the same message is being handled under another id
                return False
        return await self._tried(work, envelope)

    async def _tried(self, work: _Work, envelope: BusEnvelope) -> bool:
        began = self._clock()
        try:
            async with asyncio.timeout(self.options.handler_timeout_s):
                await self._handler(Delivery(envelope, work.entry.id, work.attempt))
        except Rejected as rejection:
            return await self._give_up(work, rejection.reason, str(rejection))
        except RetryLater as error:
            reason, why = DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED, str(error)
        except TimeoutError:
            reason = DeadLetterReason.DEAD_LETTER_REASON_HANDLER_TIMEOUT
            why = f"took longer than {self.options.handler_timeout_s:g} s"
        else:
            self.stats.handled += 1
            self.stats.last_handled_ms = (self._clock() - began) * 1e3
            return await self._acknowledge(work)
        if work.attempt >= self.options.max_attempts:
            return await self._give_up(work, reason, why)
        self.stats.retried += 1
        delay_s = min(self.options.retry_max_s, self.options.retry_first_s * 2.0 ** min(30, work.attempt - 1))
        work.attempt += 1
        self._again(work, delay_s * (1.0 + 0.2 * self._jitter()))
        return False

    def _again(self, work: _Work, delay_s: float) -> None:
        """Later, while others get their turn. The entry stays pending: if this process ends, it is not lost."""
        assert self._tasks is not None
        self._tasks.create_task(self._after(delay_s, work))

    async def _after(self, delay_s: float, work: _Work) -> None:
        await asyncio.sleep(delay_s)
        self._ready.put_nowait(work)

    # Answering

    async def _hold(self, work: _Work) -> bytes | None:
        """Who holds the message's nonce: nobody until now, an entry's id, or _DONE."""
        options = self.options
        hold_s = options.max_attempts * (options.handler_timeout_s + options.retry_max_s) + _LOCK_MARGIN_S

        def ask(client: Redis) -> Awaitable[Any]:
            return client.set(work.seen, work.entry.id, nx=True, get=True, px=int(hold_s * 1000))

        found = await self._answer(ask)
        return None if found is None else bytes(found)

    async def _acknowledge(self, work: _Work) -> bool:
        if work.seen:
            self._done_here.add(work.seen)

        def ask(client: Redis) -> Awaitable[Any]:
            transaction = client.pipeline(transaction=True)
            if work.seen:
                transaction.set(work.seen, _DONE, px=int(self.options.remember_s * 1000))
            transaction.xack(self.stream.name, self.group, work.entry.id)
            return transaction.execute()

        await self._answer(ask)
        return True

    async def _give_up(self, work: _Work, reason: DeadLetterReason, why: str) -> bool:
        self.stats.dead[DeadLetterReason.Name(reason).removeprefix("DEAD_LETTER_REASON_")] += 1
        raw = letter(
            work.entry,
            reason=reason,
            detail=why,
            stream=self.stream,
            group=self.group,
            consumer=self.name,
            attempts=work.attempt,
        )

        def ask(client: Redis) -> Awaitable[Any]:
            transaction = client.pipeline(transaction=True)
            transaction.xadd(DEAD_LETTERS.name, {FIELD: raw}, maxlen=DEAD_LETTERS.max_length)
            transaction.xack(self.stream.name, self.group, work.entry.id)
            if work.seen:
                transaction.delete(work.seen)  # so that a replay is handled
            return transaction.execute()

        await self._answer(ask)
        return True

    async def _answer(self, ask: Callable[[Redis], Awaitable[Any]]) -> Any:
        """Until Redis has taken it: what is done must not be done again because nobody was told."""
        backoff = self._backoff()
        assert self._answering is not None
        while True:
            try:
                async with self._answers:
                    return await self._ask(ask(self._answering))
            except OonaRefused:
                await renew(self._answering)  # it may have stepped down
                await asyncio.sleep(backoff.next_s())
            except OonaUnavailable:
                await asyncio.sleep(backoff.next_s())

    async def _ask(self, call: Awaitable[Any]) -> Any:
        return await self._oona.ask(call, self._oona.config.timeout_s)

    def _backoff(self) -> Backoff:
        return Backoff(first_s=self._oona.config.backoff_first_s, max_s=self._oona.config.backoff_max_s)


def _opened(entry: Entry) -> BusEnvelope:
    """Rejected for what is no whole envelope."""
    if len(entry.raw) > MAX_ENTRY_BYTES:
        raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_OVERSIZED, f"{len(entry.raw)} bytes")
    envelope = entry.envelope()
    if envelope is None:
        raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_UNDECODABLE, "no BusEnvelope")
    if envelope.priority == MESSAGE_PRIORITY_UNSPECIFIED:
        raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_MISSING_PRIORITY)
    try:
        contracts.check(envelope)
    except contracts.ContractError as error:
        raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_INVALID, str(error)) from error
    return envelope
